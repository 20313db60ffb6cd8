"""`self1e segment`: files, records, names, broken pictures, exit codes."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, make_base
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from self1e import Self1EForSegmentation, Self1EProcessor, distributed
from self1e.apps import loading
from self1e.apps.results import Names
from self1e.cli import main
from self1e.model.inference import Reply


@pytest.fixture
def pictures(tmp_path):
    """Two folders with a picture of one name each, one of them stored on its side; and a broken file."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((60, 40), Image.Resampling.BILINEAR)
    image.save(folder / "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "deeper/CAT.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    return folder


def run(version, *arguments) -> int:
    return main(["segment", "--version", str(version), "--device", "cpu", *map(str, arguments)])


def records(output) -> list[dict]:
    return json.loads((output / "predictions.json").read_text(encoding="utf-8"))


def test_folder_of_pictures(version, pictures, tmp_path, capsys):
    output = pictures / "out"  # inside the folder of pictures: must not be taken for pictures on the second run
    (tmp_path / "prompts.txt").write_text("\ufeffWhich one flies?\n\n  das Ö / „Tier“ \n", encoding="utf-8")
    arguments = ["--image", pictures, "--prompt", "the cat", "--prompts_file", tmp_path / "prompts.txt"]
    for _ in range(2):
        assert run(version, *arguments, "--output", output, "--save_logits", "--batch_size", 4) == 1
        errors = capsys.readouterr().err
        assert (
            "broken.jpg" in errors and "1 picture could not be read, see above" in errors and ".hidden" not in errors
        )
    found = records(output)
    assert [(r["prompt"], r["width"], r["height"]) for r in found] == [
        (prompt, *size)
        for size in ((60, 40), (40, 60))
        for prompt in ("the cat", "Which one flies?", "das Ö / „Tier“")
    ]
    files = [r[kind] for r in found for kind in ("mask", "overlay", "logits")]
    assert len({name.casefold() for name in files}) == len(files) == 18
    assert {*files, "predictions.json"} == {path.name for path in output.iterdir()}
    for record in found:
        mask = np.array(Image.open(output / record["mask"]))
        assert mask.shape == (record["height"], record["width"]) and set(np.unique(mask)) <= {0, 255}
        decoded = coco.decode(record["segmentation"])
        assert isinstance(record["segmentation"]["counts"], str) and (decoded == (mask > 0)).all()
        assert record["area"] == decoded.sum() > 0 and 0.5 < record["score"] < 1 and record["seconds"] > 0
        rows, columns = np.nonzero(mask)
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert record["bbox"] == [columns.min(), rows.min(), width, height]
        assert Image.open(output / record["overlay"]).size == (8 * record["width"], 8 * record["height"])  # small
        assert record["text"] == "[SEG]."
    model = Self1EForSegmentation.from_pretrained(version, dtype=torch.float32)
    photo = Image.open(pictures / "cat.png")
    expected = model.segment(Self1EProcessor.from_pretrained(version), photo, "the cat")[0]
    logits = np.load(output / found[0]["logits"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)  # other batch, other summation order


def test_options_reach_the_model(version, pictures, tmp_path):
    image = pictures / "wide.png"
    Image.open(pictures / "cat.png").resize((200, 100)).save(image)

    def logits_and_area(name, *options):
        output = tmp_path / name
        assert run(version, "--image", image, "--prompt", "a cat.", "--output", output, "--save_logits", *options) == 0
        (record,) = records(output)
        return np.load(output / record["logits"]), record["area"]

    plain, area = logits_and_area("plain")
    assert logits_and_area("strict", "--threshold", 0.6)[1] < area
    assert logits_and_area("tiles", "--high_res")[0].size > plain.size
    assert not np.allclose(logits_and_area("phrase", "--prompt_kind", "phrase")[0], plain, atol=1e-3)
    assert 0 < np.abs(logits_and_area("half", "--dtype", "bf16")[0] - plain).max() < 2


def test_chat_records(version, pictures, tmp_path, monkeypatch):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, :10] = True
    replies = {
        "one": Reply("Here: [SEG].", masks[:1], np.ones((1, 8, 8), np.float32), [0.75]),
        "two": Reply("[SEG] and [SEG].", masks, np.ones((2, 8, 8), np.float32), [0.75, None]),
        "none": Reply("No.", masks[:0], np.zeros((0, 0, 0), np.float32), []),
    }
    monkeypatch.setattr(
        Self1EForSegmentation, "chat", lambda self, processor, images, messages, **_: [replies[m] for m in messages]
    )
    arguments = ["--image", pictures / "cat.png", "--prompt", *replies, "--output", tmp_path / "out", "--mode", "chat"]
    assert run(version, *arguments) == 0
    found = records(tmp_path / "out")
    assert [r["text"] for r in found] == ["Here: [SEG].", "[SEG] and [SEG].", "[SEG] and [SEG]."]
    assert [(r["area"], r["score"], r["category_id"]) for r in found] == [(600, 0.75, 1), (600, 0.75, 2), (0, 0.0, 2)]
    assert found[1]["mask"] != found[2]["mask"] and found[1]["overlay"] == found[2]["overlay"]
    answers = json.loads((tmp_path / "out/answers.json").read_text())
    assert [r["text"] for r in answers] == ["Here: [SEG].", "[SEG] and [SEG].", "No."]
    assert [r["masks"] for r in answers] == [[r["mask"] for r in found[:1]], [r["mask"] for r in found[1:]], []]
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_chat_generates(version, pictures, tmp_path, capsys):
    arguments = ["--image", pictures / "cat.png", "--prompt", "Where is it?", "What is it?", "--max_new_tokens", 5]
    assert run(version, *arguments, "--mode", "chat", "--output", tmp_path / "out") == 0
    answers = json.loads((tmp_path / "out/answers.json").read_text())
    assert {r["prompt"] for r in answers} == {"Where is it?", "What is it?"}
    printed = capsys.readouterr().out
    assert all(f"{r['image']}, {r['prompt']!r}: {r['text']}\n" in printed for r in answers)


def test_an_error_half_way_keeps_what_was_done(version, pictures, tmp_path, monkeypatch, capsys):
    segment, calls = Self1EForSegmentation.segment, []

    def fail_later(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise FloatingPointError("not finite")
        return segment(self, *args, **kwargs)

    monkeypatch.setattr(Self1EForSegmentation, "segment", fail_later)
    images = [pictures / "cat.png", pictures / "deeper/CAT.jpg"]
    output = tmp_path / "out"
    assert run(version, "--image", *images, "--prompt", "it", "--output", output, "--batch_size", 1) == 1
    assert "not finite" in capsys.readouterr().err
    (record,) = records(output)
    assert record["image"] == str(images[0]) and (output / record["mask"]).is_file()


def test_base_model_is_refused(tmp_path, pictures, capsys):
    base = make_base(tmp_path / "base")
    assert run(base, "--image", pictures / "cat.png", "--prompt", "it", "--output", tmp_path / "out") == 1
    assert "--model_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "{empty}", "--prompt", "it"], "no pictures"),
        (["--image", "{photo}"], "no prompt"),
        (["--image", "{photo}", "--prompt", "the [SEG]"], "reserved token"),
        (["--image", "{photo}", "--prompt", ""], "empty"),
        (["--image", "{photo}", "--prompts_file", "{empty}/nothing.txt"], "nothing.txt"),
        (["--image", "{photo}", "--prompt", "it", "--threshold", "1.5"], "--threshold"),
        (["--image", "{photo}", "--prompt", "it", "--threshold", "nan"], "--threshold"),
        (["--image", "{photo}", "--prompt", "it", "--batch_size", "0"], "--batch_size"),
        (["--image", "{photo}", "--prompt", "it", "--batch_size", "many"], "whole number"),
        (["--image", "{photo}", "absent.jpg", "gone.png", "--prompt", "it"], "absent.jpg, gone.png"),
        (["--image", "https://example.org/a.jpg", "--prompt", "it"], "URLs are not fetched"),
        (["--image", "{photo}", "{heic}", "--prompt", "it"], "pip install pillow-heif"),
        (["--image", "{photo}", "--prompts", "it"], "did you mean --prompt?"),
        (["--image", "{photo}", "--prompt", "it", "--device", "gpu", "--mode", "segmnt"], "did you mean"),
        (["--image", "{photo}", "--prompt", "it", "--max_new_tokens", "9"], "does nothing with --mode segment"),
        (["--image", "{photo}", "--prompt", "it", "--mode", "chat", "--prompt_kind", "auto"], "does nothing"),
        (["--image", "{photo}", "--prompt", "it", "--output", "{photo}"], "cannot be written to"),
        (["--image", "{out}", "--prompt", "it"], "holds the pictures"),
    ],
)
def test_wrong_arguments_exit_with_2(tmp_path, capsys, arguments, message):
    folders = {"empty": tmp_path / "empty", "out": tmp_path / "out"}
    for folder in folders.values():
        folder.mkdir()
    folders |= {name: tmp_path / f"photo.{name}" for name in ("photo", "heic")}
    Image.new("RGB", (8, 8)).save(folders["photo"], format="PNG")
    folders["heic"].write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run("none", "--output", folders["out"], *(a.format(**folders) for a in arguments))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_missing_accelerators_and_libraries_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda"):
        distributed.device("cuda")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        loading.quantization(4, torch.float32)


def test_names_never_collide():
    names = Names()
    wanted = (["a", "1"], ["A_1"], ["a_1"], ["ä/ö", ".."], ["x" * 400], ["x" * 400])
    claimed = [names.claim(*parts) for parts in wanted]
    assert claimed[:4] == ["a_1", "A_1-2", "a_1-3", "ä_ö"]
    assert len({name.casefold() for name in claimed}) == 6 and max(len(name.encode()) for name in claimed) < 200


def test_as_a_program(version, pictures, tmp_path, monkeypatch, capsys):
    arguments = ["--version", version, "--image", pictures / "cat.png", "--prompt", "it", "--output", tmp_path / "out"]
    arguments += ["--threshold", "0.999999"]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "self1e" / "predict.py"), run_name="__main__")
    assert end.value.code == 0 and "1 mask (1 empty) of 1 picture in" in capsys.readouterr().out


def test_predictions_load_as_coco_results(version, pictures, tmp_path, capsys):
    images = [pictures / "cat.png", pictures / "deeper/CAT.jpg"]
    assert run(version, "--image", *images, "--prompt", "the cat", "Which one?", "--output", tmp_path / "out") == 0
    found = records(tmp_path / "out")
    assert all((tmp_path / "out" / r[kind]).is_file() for r in found for kind in ("mask", "overlay"))
    assert [(r["image_id"], r["category_id"]) for r in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert main(["export", str(tmp_path / "out"), "--to", "coco"]) == 0
    data = COCO(str(tmp_path / "out/coco.json"))
    results = data.loadRes(str(tmp_path / "out/predictions.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == list(map(str, images))
    assert [category["name"] for category in data.loadCats([1, 2])] == ["the cat", "Which one?"]
    for record, annotation in zip(found, results.loadAnns(results.getAnnIds())):
        mask = np.array(Image.open(tmp_path / "out" / record["mask"])) > 0
        assert (results.annToMask(annotation) > 0).tolist() == mask.tolist()
    scorer = COCOeval(data, results, "segm")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    assert scorer.stats[0] == pytest.approx(1)


def test_ctrl_c_says_what_is_done(version, pictures, tmp_path, monkeypatch, capsys):
    segment, calls = Self1EForSegmentation.segment, []

    def interrupt(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return segment(self, *args, **kwargs)

    monkeypatch.setattr(Self1EForSegmentation, "segment", interrupt)
    images = [pictures / "cat.png", pictures / "deeper/CAT.jpg"]
    assert run(version, "--image", *images, "--prompt", "it", "--output", tmp_path / "out", "--batch_size", 1) == 130
    assert "stopped after 1 of 2 pictures;" in capsys.readouterr().err and len(records(tmp_path / "out")) == 1


def test_a_run_folder_stands_for_its_model(version, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt_model").symlink_to(version)
    assert run(tmp_path / "run", "--image", pictures / "cat.png", "--prompt", "it", "--output", tmp_path / "out") == 0
