"""`self1e segment` and `self1e chat`: files, records, COCO, broken photos, second runs, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, make_base
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.segment import Output
from self1e.cli import main
from self1e.model.inference import Reply

PROMPTS = ["the cat", "Which one flies?", "das Ö / „Tier“"]


@pytest.fixture
def photos(tmp_path):
    """Two folders with a photo of one name each, one of them stored on its side; a broken one; a hidden one."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((60, 40), Image.Resampling.BILINEAR)
    image.save(folder / "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "deeper/CAT.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "._cat.png").write_bytes(b"no photo")
    return folder


def run(version, output, *arguments, command="segment") -> int:
    return main([command, "--version", str(version), "--device", "cpu", "--output", str(output), *map(str, arguments)])


def records(output) -> list[dict]:
    lines = (output / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_a_folder_of_photos(version, photos, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"\ufeff{PROMPTS[1]}\n\n  {PROMPTS[2]} \n", encoding="utf-8")
    output = photos / "out"  # its files must not be taken for photos
    arguments = ["--image", photos, "--prompt", PROMPTS[0], "--prompts_file", tmp_path / "prompts.txt"]
    assert run(version, output, *arguments, "--save_logits", "--batch_size", 4) == 1
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err and "._cat" not in printed.err
    found = records(output)
    asked = [(Path(r["image"]).name, r["width"], r["height"], r["prompt"]) for r in found]
    assert asked == [(*photo, p) for photo in (("cat.png", 60, 40), ("CAT.jpg", 40, 60)) for p in PROMPTS]
    files = [name for r in found for name in (r["overlay"], r["masks"][0]["mask"], r["masks"][0]["logits"])]
    assert len({name.casefold() for name in files}) == len(files) == 18
    assert {*files, "coco.json", "records.jsonl"} == {path.name for path in output.iterdir()}
    for record in found:
        (mask,) = record["masks"]
        pixels = np.array(Image.open(output / mask["mask"]))
        assert pixels.shape == (record["height"], record["width"]) and set(np.unique(pixels)) <= {0, 255}
        assert (coco.decode(mask["segmentation"]) == (pixels > 0)).all() and record["text"] == "[SEG]."
        assert mask["area"] == (pixels > 0).sum() > 0 and 0.5 < mask["score"] < 1
        assert Image.open(output / record["overlay"]).size == pixels.shape[::-1]
    model = Self1EForSegmentation.from_pretrained(version, dtype=torch.float32)
    expected = model.segment(Self1EProcessor.from_pretrained(version), Image.open(photos / "cat.png"), "the cat")[0]
    logits = np.load(output / found[0]["masks"][0]["logits"])
    np.testing.assert_allclose(logits, expected.logits, rtol=1e-4, atol=1e-4)  # other batch, other summation order


def test_the_records_as_a_coco_data_set(version, photos, tmp_path):
    run(version, tmp_path / "out", "--image", photos, "--prompt", *PROMPTS, "--no-masks", "--no-overlays")
    data = COCO(str(tmp_path / "out/coco.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == ["cat.png", "deeper/CAT.jpg"]
    assert [category["name"] for category in data.loadCats([1, 2, 3])] == PROMPTS
    found = {(a["image_id"], a["category_id"]): data.annToMask(a) for a in data.loadAnns(data.getAnnIds())}
    assert [int(mask.sum()) for mask in found.values()] == [r["masks"][0]["area"] for r in records(tmp_path / "out")]
    assert found[2, 1].shape == (60, 40) and {path.suffix for path in (tmp_path / "out").iterdir()} == {
        ".json",
        ".jsonl",
    }


def test_options_reach_the_model(version, photos, tmp_path):
    Image.open(photos / "cat.png").resize((200, 100)).save(photos / "wide.png")

    def logits_and_area(name, *options):
        output = tmp_path / name
        flags = ["--image", photos / "wide.png", "--prompt", "a cat.", "--save_logits"]
        assert run(version, output, *flags, *options) == 0
        (mask,) = records(output)[0]["masks"]
        return np.load(output / mask["logits"]), mask["area"]

    plain, area = logits_and_area("plain")
    assert logits_and_area("strict", "--threshold", 0.6)[1] < area
    assert logits_and_area("tiles", "--high_res")[0].size > plain.size
    assert not np.allclose(logits_and_area("phrase", "--prompt_kind", "phrase")[0], plain, atol=1e-3)
    assert 0 < np.abs(logits_and_area("half", "--dtype", "bf16")[0] - plain).max() < 2


def test_a_second_run_adds_and_repeats_nothing(version, photos, tmp_path, monkeypatch, capsys):
    output, asked = tmp_path / "out", []
    segment = Self1EForSegmentation.segment

    def watched(self, processor, images, prompts, **options):
        asked.append(prompts)
        return segment(self, processor, images, prompts, **options)

    monkeypatch.setattr(Self1EForSegmentation, "segment", watched)
    cat, other = photos / "cat.png", photos / "deeper/CAT.jpg"
    assert run(version, output, "--image", cat, "--prompt", "a") == 0
    first, files = records(output), {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert run(version, output, "--image", cat, other, "--prompt", "a", "b") == 0
    assert run(version, output, "--image", cat, other, "--prompt", "b", "a") == 0
    assert asked == [[["a"]], [["b"], ["a", "b"]]]
    assert records(output)[:1] == first and len(records(output)) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(json.loads((output / "coco.json").read_text())["annotations"]) == 4
    assert run(version, output, "--image", cat, "--prompt", "a", "--threshold", 0.4) == 1
    assert "threshold" in capsys.readouterr().err and len(records(output)) == 4
    assert run(version, output, "--image", cat, "--prompt", "c", "--threshold", 0.4, "--overwrite") == 0
    assert [r["prompt"] for r in records(output)] == ["c"] and len(list(output.glob("*.png"))) == 1


@pytest.mark.parametrize("error, code", [(RuntimeError("broken"), 1), (KeyboardInterrupt(), 130)])
def test_what_was_done_before_an_error_is_there(version, photos, tmp_path, monkeypatch, error, code):
    segment, output = Self1EForSegmentation.segment, tmp_path / "out"

    def fail_at_the_second(self, *args, **options):
        if records(output):
            raise error
        return segment(self, *args, **options)

    arguments = ["--image", photos / "cat.png", photos / "deeper/CAT.jpg", "--prompt", "it", "--batch_size", 1]
    monkeypatch.setattr(Self1EForSegmentation, "segment", fail_at_the_second)
    if code == 1:
        with pytest.raises(RuntimeError):
            run(version, output, *arguments)
    else:
        assert run(version, output, *arguments) == code
    assert len(json.loads((output / "coco.json").read_text())["images"]) == 1
    with open(output / "records.jsonl", "a") as file:
        file.write('{"image": "cut off')
    monkeypatch.setattr(Self1EForSegmentation, "segment", segment)
    assert run(version, output, *arguments) == 0
    assert [Path(r["image"]).name for r in records(output)] == ["cat.png", "CAT.jpg"]


def test_chat_records(version, photos, tmp_path, monkeypatch, capsys):
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
    arguments = ["--image", photos / "cat.png", "--prompt", *replies]
    assert run(version, tmp_path / "out", *arguments, command="chat") == 0
    found = records(tmp_path / "out")
    assert [(r["text"], [m["area"] for m in r["masks"]]) for r in found] == [
        ("Here: [SEG].", [600]), ("[SEG] and [SEG].", [600, 0]), ("No.", []),
    ]  # fmt: skip
    assert (
        len({m["mask"] for r in found for m in r["masks"]}) == 3 and "two: [SEG] and [SEG]." in capsys.readouterr().out
    )
    data = json.loads((tmp_path / "out/coco.json").read_text())
    assert [a["category_id"] for a in data["annotations"]] == [1, 2]  # an empty mask is no annotation


def test_chat_generates(version, photos, tmp_path):
    arguments = ["--image", photos / "cat.png", "--prompt", "Where is it?", "What is it?", "--max_new_tokens", 5]
    assert run(version, tmp_path / "out", *arguments, command="chat") == 0
    assert [r["prompt"] for r in records(tmp_path / "out")] == ["Where is it?", "What is it?"]


@pytest.mark.parametrize("command", ["segment", "chat"])
def test_names_and_terminals_that_are_not_utf8(version, photos, tmp_path, command):
    """A photo whose name is no UTF-8, a prompt that the terminal cannot show, a locale that knows ASCII only."""
    odd = os.fsencode(photos) + b"/\xff.png"
    os.replace(photos / "cat.png", odd)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    arguments = ["-m", "self1e", command, "--version", version, "--image", odd, "--prompt", "红色的汽车 🚗"]
    arguments += ["--output", str(tmp_path / "out")] + ["--max_new_tokens", "4"] * (command == "chat")
    subprocess.run([sys.executable, *arguments], env=environment, check=True, timeout=300)
    (record,) = records(tmp_path / "out")
    assert record["prompt"] == "红色的汽车 🚗" and os.fsencode(record["image"]) == odd
    assert len(COCO(str(tmp_path / "out/coco.json")).imgs) == 1


def test_base_model_is_refused(tmp_path, photos, capsys):
    base = make_base(tmp_path / "base")
    assert run(base, tmp_path / "out", "--image", photos / "cat.png", "--prompt", "it") == 1
    assert "--model_weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "{empty}", "--prompt", "it"], 1, "no photos"),
        (["--image", "{photo}"], 1, "no prompt"),
        (["--image", "{photo}", "--prompt", "the [SEG]"], 1, "reserved token"),
        (["--image", "{photo}", "--prompts_file", "{empty}/nothing.txt"], 1, "nothing.txt"),
        (["--image", "{photo}", "absent.jpg", "gone.png", "--prompt", "it"], 1, "absent.jpg"),
        (["--image", "https://example.org/a.jpg", "--prompt", "it"], 1, "URLs are not fetched"),
        (["--image", "{out}", "--prompt", "it"], 1, "holds the photos"),
        (["--image", "{photo}", "--prompt", "it", "--threshold", "1.5"], 2, "--threshold"),
        (["--image", "{photo}", "--prompt", "it", "--batch_size", "0"], 2, "--batch_size"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, code, message):
    places = {"empty": tmp_path / "empty", "out": tmp_path / "out", "photo": tmp_path / "photo.png"}
    places["empty"].mkdir()
    places["out"].mkdir()
    Image.new("RGB", (8, 8)).save(places["photo"])
    arguments = [argument.format(**places) for argument in arguments]
    if code == 2:
        with pytest.raises(SystemExit) as stop:
            run("none", places["out"], *arguments)
        assert stop.value.code == 2
    else:
        assert run("none", places["out"], *arguments) == 1
    assert message in capsys.readouterr().err and not list(places["out"].iterdir())


def test_names_never_collide(tmp_path):
    output = Output(tmp_path / "out", {})
    wanted = (["a", "1"], ["A_1"], ["a_1"], ["ä/ö", ".."], ["x" * 400], ["x" * 400], ["."])
    claimed = [output.claim(*parts) for parts in wanted]
    assert claimed[:4] == ["a_1", "A_1-2", "a_1-3", "ä_ö"] and claimed[-1] == "photo"
    assert len({name.casefold() for name in claimed}) == 7 and max(len(name.encode()) for name in claimed) < 200


def test_a_run_folder_stands_for_its_model(version, photos, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ckpt_model").symlink_to(version)
    assert run(tmp_path / "run", tmp_path / "out", "--image", photos / "cat.png", "--prompt", "it") == 0
