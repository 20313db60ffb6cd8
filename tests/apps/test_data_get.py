"""`self1e data get` against a server with miniature archives, laid out as the real ones, of a synthetic tree."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from published import VOC, official, published, zipped
from webserver import Page, Site, serve

from self1e import cli
from self1e.apps import check_data, data_get
from self1e.apps import download as download_module
from self1e.apps.catalogue import Catalogue, File, load_catalogue
from self1e.apps.download import Address
from self1e.data.families import FAMILIES, DataConfig
from self1e.data.loader import build_mixture
from self1e.data.splits import DEFAULT_SPLITS, load_split, split_paths
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.synthetic.shapes_dataset import make_shapes_dataset

BY_HAND = ["mapillary", "grefcoco", "ReasonSeg"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A synthetic tree, with what pascal_part's train.json is made from."""
    root = make_shapes_dataset(tmp_path_factory.mktemp("shapes"), train=3, val=2, size=64)
    photos = sorted((root / VOC / "JPEGImages").glob("*.jpg"))
    (root / VOC / "ImageSets/Main").mkdir(parents=True)
    (root / VOC / "ImageSets/Main/train.txt").write_text("".join(f"{photo.stem}\n" for photo in photos))
    return root


@pytest.fixture(scope="module")
def pages(source) -> dict[str, bytes]:
    """Everything that is published, by "<set>/<name of the file>"."""
    inputs = official(source)
    found = {}
    for each in load_catalogue().sets.values():
        for file in each.files.values():
            if file.addresses:
                found[f"{each.name}/{file.name}"] = inputs.get(file.name) or published(source, each.name, file)
        found |= {f"{each.name}/{name}": inputs[name] for name in each.inputs}
    return found


@pytest.fixture
def site(pages, monkeypatch):
    """The real catalogue with addresses on this machine, and without the sizes and sums of the real files."""
    monkeypatch.setattr(download_module, "PAUSE", 0)
    with serve() as site:
        site |= {name: Page(content) for name, content in pages.items()}
        catalogue = load_catalogue()

        def local(name: str, file: File) -> File:
            addresses = (Address(site.url(f"{name}/{file.name}")),) if file.addresses else ()
            return replace(file, addresses=addresses, size=None)

        sets = {
            name: replace(
                each,
                files={key: local(name, file) for key, file in each.files.items()},
                inputs={key: local(name, file) for key, file in each.inputs.items()},
            )
            for name, each in catalogue.sets.items()
        }
        monkeypatch.setattr(data_get, "load_catalogue", lambda: Catalogue(sets, catalogue.groups))
        yield site


def get(root: Path, *arguments: str) -> int:
    return cli.main(["data", "get", *arguments, "--to", str(root / "dataset")])


def every_set(dataset_dir, data_dir):
    """The configuration of a training on all sets."""
    sets = {f"{name}_data": "||".join(family.sets) for name, family in FAMILIES.items() if family.sets}
    return DataConfig.parse(dataset_dir=dataset_dir, data_dir=data_dir, explanatory=0.5, **sets)


def test_every_set_arrives_and_is_read(site: Site, source, tmp_path, capsys):
    assert get(tmp_path, "all") == 1  # three sets wait for a person
    out, err = capsys.readouterr()
    for name in load_catalogue().sets:
        assert f"{name}: {'not in place' if name in BY_HAND else 'in place'}\n" in out
    assert "By hand: open https://www.mapillary.com/dataset/vistas (it takes an account" in err
    for name in BY_HAND:
        for file in load_catalogue().sets[name].files.values():
            if not file.addresses:
                (tmp_path / "dataset/downloads" / name).mkdir(exist_ok=True)
                (tmp_path / "dataset/downloads" / name / file.name).write_bytes(published(source, name, file))
    site.requests.clear()
    assert get(tmp_path, "all") == 0
    assert site.requests == []  # nothing is fetched twice

    config = every_set(tmp_path / "dataset", tmp_path / "data")
    mixture = build_mixture(config, batch_size=2, seed=0)
    batch = next(iter(mixture.micro_batches(0, rank=0, world_size=1)))
    assert all(mixture[place].conversations for place in batch)
    for name in DEFAULT_SPLITS:
        split, expected = load_split(name, tmp_path / "dataset"), load_split(name, source / "dataset")
        assert [unit.unit_ids for unit in split] == [unit.unit_ids for unit in expected]
        assert all(np.array_equal(a.load()[1], b.load()[1]) for a, b in zip(split, expected))
    for benchmark in VQA_BENCHMARKS.values():
        assert benchmark.questions(tmp_path / "data")[0].open_image()
    assert check_data.main([str(tmp_path / "dataset"), "--samples", "0", "--workers", "1"]) == 0


def test_photos_that_sets_share_are_kept_once(site: Site, tmp_path):
    assert get(tmp_path, "refcoco", "refcocog") == 0
    home = tmp_path / "dataset/refer_seg/images/mscoco/images/train2014"
    assert home.is_dir() and not home.is_symlink()
    assert not (tmp_path / "data").exists()
    assert get(tmp_path, "vqav2", "okvqa") == 0
    for place in "coco", "vqav2", "okvqa":
        link = tmp_path / "data" / place / "train2014"
        assert link.is_symlink() and link.resolve() == home and not link.readlink().is_absolute()
    assert get(tmp_path, "coco_train2014") == 0
    assert [path for path, _ in site.requests].count("coco_train2014/train2014.zip") == 1


def test_nothing_is_overwritten(site: Site, tmp_path):
    mine = tmp_path / "dataset/refer_seg/refcoco/refs(unc).p"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    photos = tmp_path / "dataset/refer_seg/images/mscoco/images/train2014"
    photos.mkdir(parents=True)
    assert get(tmp_path, "refcoco") == 0
    assert mine.read_bytes() == b"mine" and (mine.parent / "instances.json").stat().st_size > 100
    assert list(photos.iterdir()) == []


def test_question_files_are_made_where_their_address_fails(site: Site, source, tmp_path, capsys):
    made = {
        "vqav2": "vqav2/vqav2_train.jsonl", "okvqa": "okvqa/okvqa_train.jsonl", "gqa": "gqa/train_balanced.jsonl",
        "textvqa": "textvqa/textvqa_train.jsonl", "vizwiz": "vizwiz/vizwiz_train.jsonl",
        "vqa-vqav2-val": "vqav2/vqav2_val.jsonl", "vqa-textvqa-val": "textvqa/textvqa_val.jsonl",
        "vqa-gqa-testdev": "gqa/llava_gqa_testdev_balanced_qwen_format.jsonl",
    }  # fmt: skip
    for name, path in made.items():
        del site[f"{name}/{Path(path).name}"]
    del site["vqa-textvqa-val/textvqa_val_annotations.json"]
    assert get(tmp_path, *made) == 0
    assert "vqav2_train.jsonl is made from the official files instead" in capsys.readouterr().err
    for path in made.values():
        rows, expected = (
            [json.loads(line) for line in (root / "data" / path).read_text().splitlines()]
            for root in (tmp_path, source)
        )
        keys = ("image", "question", "question_id", "answer")
        assert rows == [{key: row[key] for key in keys} for row in expected], path
    for name in "vqa-textvqa-val", "vqa-vqav2-val":
        benchmark = VQA_BENCHMARKS[name]
        questions = benchmark.questions(tmp_path / "data")
        answers = [data_get_answer(question) for question in questions]
        assert benchmark.metric(answers, tmp_path / "data").summary["accuracy (VQA official)"] > 50


def data_get_answer(question):
    return SimpleNamespace(question=question, reply=question.record["answer"])


def test_pascal_part_is_made_from_mat_files(site: Site, source, tmp_path):
    assert get(tmp_path, "pascal_part") == 0
    made = json.loads((tmp_path / "dataset/vlpart/pascal_part/train.json").read_text())
    names = (source / VOC / "ImageSets/Main/train.txt").read_text().split()
    assert [image["file_name"] for image in made["images"]] == [f"{name}.jpg" for name in names[:-1]]
    assert made["images"][0]["id"] == int(names[0].replace("_", ""))
    assert [category["name"] for category in made["categories"]] == ["dog:ear", "dog:torso"]
    assert [a["category_id"] for a in made["annotations"][:3]] == [1, 1, 2]
    assert made["annotations"][0]["area"] == 20 * 2 and made["annotations"][0]["bbox"] == [10, 10, 2, 20]
    assert isinstance(made["annotations"][0]["segmentation"]["counts"], str)


def test_failures_are_messages_and_the_other_sets_go_on(site: Site, tmp_path, capsys):
    site["paco_lvis/paco_lvis_v1.zip"] = Page(b"<html>", kind="text/html")
    site["coco_train2017/train2017.zip"] = Page(zipped({"../evil.jpg": b"", "train2017/a.jpg": b""}))
    site["refcoco+/refcoco+.zip"] = Page(site["refcoco+/refcoco+.zip"].content, cuts=[70] * 9)
    assert get(tmp_path, "paco_lvis", "ade20k", "refcoco+") == 1
    out, err = capsys.readouterr()
    assert "ade20k: in place\n" in out and "paco_lvis: not in place\n" in out
    assert "a web page instead of the file" in err and "save paco_lvis_v1.zip as" in err
    assert "leads out of the archive's folder" in err and "delete it to fetch it again" in err
    assert "its photos (coco_train2017) are not in place" in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "dataset/refer_seg/refcoco+/refs(unc).p").exists()


def test_interrupted_run_continues(site: Site, tmp_path, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_get, "unpack", stop)
        assert get(tmp_path, "refcocog") == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not (tmp_path / "dataset/refer_seg/images/mscoco/images/train2014").exists()
    site.requests.clear()
    assert get(tmp_path, "refcocog") == 0
    assert site.requests == [("refcocog/refcocog.zip", None)]


def test_archives_are_removed_on_request(site: Site, tmp_path):
    assert get(tmp_path, "ade20k", "--remove_archives") == 0
    assert [path.name for path in (tmp_path / "dataset/downloads").rglob("*.zip")] == []


def test_dry_run_and_list_touch_nothing(site: Site, tmp_path, capsys):
    assert get(tmp_path, "refcoco", "mapillary", "--dry_run") == 0
    out = capsys.readouterr().out
    for part in (
        "licence: not stated for the data",
        "account: an account at mapillary.com",
        "unchecked",
        "by hand, from",
    ):
        assert part in out
    assert get(tmp_path, "--list") == 0
    assert "The addresses are unchecked" in capsys.readouterr().out
    assert site.requests == [] and list(tmp_path.iterdir()) == []


def test_wrong_arguments(site: Site, tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, message in [
        (["refcocco"], "unknown set 'refcocco'; known: sem_seg"),
        (["REFCOCO"], "did you mean refcoco?"),
        ([], "name a set or a group"),
        (["refcoco", "--downloads", str(tmp_path / "file")], "is a file; expected a folder"),
    ]:
        with pytest.raises(SystemExit) as stop:
            get(tmp_path, *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_disk_is_looked_at_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20 << 30))
    assert get(tmp_path, "coco_train2017") == 1
    assert "getting these sets needs 36.0 GB and the disk of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "dataset/downloads/coco_train2017").mkdir(parents=True)
    (tmp_path / "dataset/downloads/coco_train2017/train2017.zip").touch()  # only the contents are wanting
    assert get(tmp_path, "coco_train2017", "--dry_run") == 0
    assert "1 file to download, 0 B;" in capsys.readouterr().out
    assert get(tmp_path, "coco_train2017") == 1
    assert "needs" not in capsys.readouterr().err


def test_obstacles_are_found_before_anything_is_fetched(site: Site, tmp_path, monkeypatch, capsys):
    place = tmp_path / "dataset/ade20k/images"
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "gone")
    assert get(tmp_path, "ade20k") == 1
    assert f"{place} is a link to {tmp_path / 'gone'}, which does not exist" in capsys.readouterr().err
    place.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(data_get, "find_spec", lambda name: None)
        assert get(tmp_path, "pascal_part") == 1
        assert 'pip install "self1e[data]"' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert get(tmp_path, "ade20k") == 1
        assert f"no right to write in {tmp_path}/dataset" in capsys.readouterr().err
    place.parent.rmdir()
    place.parent.touch()
    assert get(tmp_path, "ade20k") == 1
    assert f"{place.parent} is a file where a folder is needed" in capsys.readouterr().err
    assert site.requests == []


def test_two_at_once(site: Site, tmp_path, capsys):
    downloads = tmp_path / "dataset/downloads"
    downloads.mkdir(parents=True)
    with FileLock(downloads / ".lock"):
        assert get(tmp_path, "ade20k") == 1
    assert "another `self1e data get` uses" in capsys.readouterr().err


def test_catalogue_covers_what_the_project_reads(tmp_path):
    catalogue = load_catalogue()
    assert {name for family in FAMILIES.values() for name in family.sets} | set(VQA_BENCHMARKS) <= set(catalogue.sets)
    places = {place for each in catalogue.sets.values() for file in each.files.values() for place in file.places}
    places |= {place for each in catalogue.sets.values() for paths in each.photos.values() for place in paths}
    wanted = every_set("dataset", "data").paths() + split_paths(DEFAULT_SPLITS, "dataset")
    for name, path in wanted:
        assert any(f"{path}/".startswith(f"{place}/") or place.startswith(f"{path}/") for place in places), (
            name,
            path,
        )
