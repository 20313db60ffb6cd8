"""self1e/data/sets/custom.py as a family of the mixture and as evaluation splits: flags, names, exclusion."""

import numpy as np
import pytest
from custom_trees import annotation, coco_set, mask, split, table, train
from trees import photo, questions

from self1e.data.families import DataConfig
from self1e.data.loader import build_mixture
from self1e.data.mixture import unpack
from self1e.data.splits import DEFAULT_SPLITS, file_stem, get_splits, load_split, split_paths
from self1e.errors import UserError
from self1e.training.args import parse


def build(*, batch_size=1, seed=0, mode="published", **flags):
    return build_mixture(DataConfig.parse(**flags), batch_size=batch_size, seed=seed, mode=mode)


def small(root, count, prompt="it"):
    for k in range(count):
        photo(root / f"{k}.jpg")
        mask(root / f"{k}.png", [0, 1])
    return table(root, [(f"{k}.jpg", f"{k}.png", prompt) for k in range(count)])


def test_a_family_of_several_sources_mixed_by_rate(tmp_path):
    sources = [small(tmp_path / "a", 3), small(tmp_path / "b", 2)]
    questions(tmp_path / "data", "vqav2/vqav2_train.jsonl", 4)
    arguments = {
        "dataset_dir": tmp_path,
        "data_dir": tmp_path / "data",
        "batch_size": 4,
        "seed": 0,
        "custom_data": "||".join(map(str, sources)),
        "vqa_data": "vqav2",
    }
    mixture = build(dataset="vqa||custom", sample_rates="1,2.2", mode="exact", **arguments)
    assert mixture.sizes == {"vqav2": 4, f"custom|{sources[0]}": 3, f"custom|{sources[1]}": 2}
    assert mixture.epoch_size == 4 + 11 and mixture.segmentation == [False, True, True]
    batches = mixture.micro_batches(0, rank=0, world_size=1)
    assert all(any(mixture.segmentation[unpack(place)[1]] for place in batch) for batch in batches)
    alone = build(dataset="custom", sample_rates="1", **arguments)
    places = [place for batch in alone.micro_batches(0, rank=0, world_size=1) for place in batch]
    assert {alone[place].id.rsplit("/", 1)[1] for place in places} <= {f"{k}.jpg" for k in range(3)}


def test_selection_errors_name_flags_and_files(tmp_path):
    arguments = {"dataset_dir": tmp_path, "data_dir": tmp_path, "batch_size": 1, "seed": 0, "sample_rates": "1"}
    with pytest.raises(UserError, match="--dataset custom needs --custom_data"):
        build(dataset="custom", **arguments)
    gone = f"{tmp_path / 'gone.csv'}||{tmp_path / 'lost'}"
    with pytest.raises(UserError, match=r"gone\.csv   \(custom\)\n.*lost   \(custom\)"):
        build(dataset="custom", custom_data=gone, **arguments)
    name = f"custom|{tmp_path / 'gone.csv'}"
    assert split_paths([name], tmp_path) == [(name, tmp_path / "gone.csv")]
    (tmp_path / "x.txt").touch()
    for path, message in (tmp_path, "should hold one .csv, found none"), (tmp_path / "x.txt", "expected a .json"):
        with pytest.raises(UserError, match=message):
            build(dataset="custom", custom_data=str(path), **arguments)
    for name in "a.csv", "b.csv":
        table(tmp_path, [], name=name)
    with pytest.raises(UserError, match="found a.csv, b.csv"):
        load_split(f"custom|{tmp_path}", tmp_path)


def test_exclude_val_knows_coco_photos_by_number_and_others_by_place(tmp_path):
    for folder in "a", "b":
        coco_set(tmp_path / folder, [annotation(1, 1), annotation(2, 2)], images=[(1, "x.jpg"), (2, f"{7:012d}.jpg")])
    (ax, a7), (bx, b7) = (split(tmp_path / folder / "train.json").keys() for folder in "ab")
    assert a7 == b7 == 7 and ax != bx
    data = train(tmp_path / "a" / "train.json")
    data.exclude(np.array([7]))
    assert len(data) == 1


def test_flags(capsys):
    known = ["--version", "v", "--exp_name", "e"]
    args = parse([*known, "--dataset", "custom||vqa", "--custom_data", "a.csv||b", "--val_dataset", "custom|c||x|y"])
    assert args.custom_data == "a.csv||b" and args.splits == ["custom|c", "x|y"]
    with pytest.raises(SystemExit):
        parse([*known, "--custom_data", "a.csv"])
    assert "--custom_data is read by the family custom" in capsys.readouterr().err


def test_benchmark_of_own_data():
    names = ["custom|own/val.csv", "refcoco|unc|val", "custom|/data/own/val.json"]
    benchmarks = get_splits(names)
    assert list(benchmarks) == names and benchmarks[names[0]].protocol == "lisa"
    assert not benchmarks[names[0]].published and not set(names[::2]) & set(DEFAULT_SPLITS)
    assert file_stem(names[1]) == "refcoco_unc_val" and file_stem(names[0]).startswith("custom_own_val_csv_")
    assert len({file_stem(f"custom|{path}") for path in ("own/val.csv", "own_val.csv", "own/val_csv", "x" * 300)}) == 4
    assert len(file_stem("custom|" + "x" * 300)) < 100
