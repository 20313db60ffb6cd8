"""`self1e segment` and `self1e chat`: files, records, COCO, broken photos, second runs, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, make_base, noise, stop_at_work
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps import segment
from self1e.apps.segment import Output
from self1e.cli import main
from self1e.data.splits import load_split
from self1e.files import alone_in
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
    return [json.loads(line) for line in (output / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_photos(version, photos, tmp_path, capsys):
    output = photos / "out"  # its files must not be taken for photos
    arguments = ["--image", photos, "--prompt", *PROMPTS]
    assert run(version, output, *arguments, "--batch_tokens", 300) == 1
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err and "._cat" not in printed.err and "photos per second" in printed.out
    found = records(output)
    asked = [(Path(r["image"]).name, r["width"], r["height"], r["prompt"]) for r in found]
    assert asked == [(*photo, p) for photo in (("cat.png", 60, 40), ("CAT.jpg", 40, 60)) for p in PROMPTS]
    files = [name for r in found for name in (r["overlay"], r["masks"][0]["mask"])]
    assert len({name.casefold() for name in files}) == len(files) == 12
    assert {*files, "coco.json", "records.jsonl", "settings.json", ".lock"} == {path.name for path in output.iterdir()}
    for record in found:
        (mask,) = record["masks"]
        pixels = np.array(Image.open(output / mask["mask"]))
        assert pixels.shape == (record["height"], record["width"]) and set(np.unique(pixels)) <= {0, 255}
        assert (coco.decode(mask["segmentation"]) == (pixels > 0)).all() and record["text"] == "[SEG]."
        assert mask["area"] == (pixels > 0).sum() > 0 and 0.5 < mask["score"] < 1
        assert Image.open(output / record["overlay"]).size == pixels.shape[::-1]
    model = Self1EForSegmentation.from_pretrained(version, dtype=torch.float32)
    expected = model.segment(Self1EProcessor.from_pretrained(version), Image.open(photos / "cat.png"), "the cat")[0]
    mask = coco.decode(found[0]["masks"][0]["segmentation"])
    assert (mask != expected.mask).mean() < 0.01  # another batch, another order of summation


def test_coco_for_other_tools_and_for_custom_data(version, photos, tmp_path):
    run(version, tmp_path / "out", "--image", photos, "--prompt", *PROMPTS, "--no-masks", "--no-overlays")
    assert {path.suffix for path in (tmp_path / "out").glob("[!.]*")} == {".json", ".jsonl"}
    data = COCO(str(tmp_path / "out/coco.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == ["cat.png", "deeper/CAT.jpg"]
    assert [category["name"] for category in data.loadCats([1, 2, 3])] == PROMPTS
    found = {(a["image_id"], a["category_id"]): data.annToMask(a) for a in data.loadAnns(data.getAnnIds())}
    assert [int(mask.sum()) for mask in found.values()] == [r["masks"][0]["area"] for r in records(tmp_path / "out")]
    assert found[2, 1].shape == (60, 40)
    shutil.copy(tmp_path / "out/coco.json", photos)
    split = load_split(f"custom|{photos}/coco.json", photos)
    assert [(photo.image_id, [each.text for each in photo.expressions]) for photo in split] == [
        ("cat.png", PROMPTS),
        ("deeper/CAT.jpg", PROMPTS),
    ]
    assert (split[0].load()[1] == [found[1, number] for number in (1, 2, 3)]).all()


def test_lists_with_prompts_of_their_own(version, photos, tmp_path):
    (photos / "of.csv").write_text('Image , Prompt\ncat.png ,"a cat, black"\ndeeper/CAT.jpg,Who?\ncat.png,its tail\n')
    lines = [{"image": "deeper/CAT.jpg", "prompt": "a hat"}, {"image": "deeper/../cat.png"}]
    (photos / "of.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (photos / "of.txt").write_text("cat.png\n")
    assert run(version, tmp_path / "a", "--image", photos / "of.csv", photos / "of.jsonl") == 0
    assert [(Path(r["image"]).name, r["prompt"]) for r in records(tmp_path / "a")] == [
        ("cat.png", "a cat, black"), ("cat.png", "its tail"), ("CAT.jpg", "Who?"), ("CAT.jpg", "a hat"),
    ]  # fmt: skip
    assert run(version, tmp_path / "b", "--image", photos / "of.txt", "--prompt", "it") == 0
    assert [(Path(r["image"]).name, r["prompt"]) for r in records(tmp_path / "b")] == [("cat.png", "it")]


def test_options_reach_the_model(version, photos, tmp_path):
    Image.open(photos / "cat.png").resize((200, 100)).save(photos / "wide.png")

    def mask(name, *options):
        assert run(version, tmp_path / name, "--image", photos / "wide.png", "--prompt", "a cat.", *options) == 0
        return coco.decode(records(tmp_path / name)[0]["masks"][0]["segmentation"]) > 0

    plain, strict = mask("plain"), mask("strict", "--threshold", 0.6)
    assert (strict <= plain).all() and strict.sum() < plain.sum()
    for options in (["--high_res"], ["--prompt_kind", "phrase"], ["--precision", "bf16"]):
        assert (mask(options[-1].strip("-"), *options) != plain).any()


def test_a_second_run_adds_and_repeats_nothing(version, photos, tmp_path, monkeypatch, capsys):
    output, asked = tmp_path / "out", []

    def watched(model, batch, *args, predict=segment.masks_of, **options):
        asked.append(len(batch["input_ids"]))
        return predict(model, batch, *args, **options)

    monkeypatch.setattr(segment, "masks_of", watched)
    cat, other = photos / "cat.png", photos / "deeper/CAT.jpg"
    output.mkdir()
    (output / "mine.jsonl").touch()  # is none of the records
    assert run(version, output, "--image", cat, "--prompt", "a") == 0
    first, files = records(output), {path: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert run(version, output, "--image", cat, other, "--prompt", "a", "b") == 0
    assert run(version, output, "--image", cat, other, "--prompt", "b", "a", "--precision", "fp32") == 0
    assert asked == [1, 3] and records(output)[:1] == first and len(records(output)) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert len(json.loads((output / "coco.json").read_text())["annotations"]) == len(list(output.glob("*.png"))) == 4
    assert run(version, output, "--image", cat, "--prompt", "a", "--threshold", 0.4) == 1
    assert "threshold" in capsys.readouterr().err and len(records(output)) == 4
    monkeypatch.setattr(segment, "alone_in", partial(alone_in, patience=0.1))
    with alone_in(output):
        assert run(version, output, "--image", cat, "--prompt", "d") == 1 and "another run" in capsys.readouterr().err
    assert run(version, output, "--image", cat, "--prompt", "c", "--threshold", 0.4, "--overwrite") == 0
    assert [r["prompt"] for r in records(output)] == ["c"] and len(list(output.glob("*.png"))) == 1


@pytest.mark.parametrize("error, code", [(RuntimeError("broken"), 1), (KeyboardInterrupt(), 130)])
def test_what_was_done_before_an_error_is_there(version, photos, tmp_path, monkeypatch, error, code):
    output, predict, calls = tmp_path / "out", segment.masks_of, []

    def fail_at_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return predict(*args, **options)

    arguments = ["--image", photos / "cat.png", photos / "deeper/CAT.jpg", "--prompt", "it", "--batch_tokens", 1]
    monkeypatch.setattr(segment, "masks_of", fail_at_the_second)
    if code == 1:
        with pytest.raises(RuntimeError):
            run(version, output, *arguments)
    else:
        assert run(version, output, *arguments) == code
    (part,) = output.glob("records.rank*.jsonl")
    assert len(part.read_text().splitlines()) == 1
    with open(part, "a") as file:
        file.write('{"image": "cut off')
    assert run(version, output, *arguments) == 0
    assert [Path(r["image"]).name for r in records(output)] == ["cat.png", "CAT.jpg"] and len(calls) == 3


def test_two_processes_stopped_and_continued_write_what_one_writes(version, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        noise(20 + number, 30, number).save(folder / f"{number}.png")
    (folder / "7.png").write_bytes(b"no photo")
    alone = ["-m", "self1e", "segment", "--version", version, "--device", "cpu", "--image", str(folder), "--prompt"]
    alone += ["it", "--batch_tokens", "1", "--output"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, *alone, str(tmp_path / "two")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", "PET_SIGNALS_TO_HANDLE": "SIGTERM"}
    stop_at_work(command, tmp_path / "two/records.rank1.jsonl", signal.SIGTERM, environment)
    assert not (tmp_path / "two/coco.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.count("skipped: ") == 1 and "photos are done already" in done.stdout
    done = subprocess.run([sys.executable, *alone, str(tmp_path / "one")], env=environment, timeout=300)
    assert done.returncode == 1
    one, two = ({r["image"]: r for r in records(tmp_path / name)} for name in ("one", "two"))
    assert one == two and len(records(tmp_path / "two")) == 59
    assert len(COCO(str(tmp_path / "two/coco.json")).imgs) == 59


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
        (["--image", "{photo}", "absent.jpg", "gone.png", "--prompt", "it"], 1, "absent.jpg"),
        (["--image", "{out}", "--prompt", "it"], 1, "outside of --output"),
        (["--image", "{photo}", "--prompt", "it", "--threshold", "1.5"], 1, "--threshold"),
        (["--image", "{list}"], 1, "holds no 'image'"),
        (["--image", "{jsonl}"], 1, "line 1: not one value for each column"),
        (["--image", "{nameless}"], 1, "line 2: image is empty"),
        (["--image", "{pointer}"], 1, "Git LFS"),
        (["--image", "which of these " * 20, "--prompt", "it"], 1, "255 bytes"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, code, message):
    places = {"empty": tmp_path / "empty", "out": tmp_path / "out", "photo": tmp_path / "photo.png"}
    places["empty"].mkdir()
    places["out"].mkdir()
    Image.new("RGB", (8, 8)).save(places["photo"])
    places["list"] = tmp_path / "list.csv"
    places["list"].write_text("photo,prompt\na.png,it\n")
    places |= {"jsonl": tmp_path / "list.jsonl", "pointer": tmp_path / "list.txt"}
    places["jsonl"].write_text('{"image": "photo.png", "prompt": ["it", "that"]}')
    places["nameless"] = tmp_path / "nameless.jsonl"
    places["nameless"].write_text('{"image": "photo.png"}\n{"prompt": "it"}\n')
    places["pointer"].write_text("version https://git-lfs.github.com/spec/v1\n")
    assert run("none", places["out"], *(argument.format(**places) for argument in arguments)) == code
    assert message in capsys.readouterr().err and not list(places["out"].iterdir())


def test_names_never_collide(tmp_path):
    wanted = [("a.png", "1"), ("b/A.png", "1"), ("a_b.png", "c"), ("a.b.png", "b_c"), ("a.b.png", "b c"),
              ("ä.png", "ö/"), ("x" * 400, "y" * 400), ("x" * 400, "y" * 401), ("/.", "..")]  # fmt: skip
    output = Output(tmp_path / "out", {}, photos=[path for path, _ in wanted], overlays=False)
    reply = Reply("", np.ones((2, 4, 4), bool), np.zeros((2, 1, 1)), [0.5, 0.5])
    saved = [output.save(path, None, prompt, reply) for path, prompt in wanted]
    names = [mask["mask"] for record in saved for mask in record["masks"]]
    assert len({name.casefold() for name in names}) == 18 and names[8] == "a.b__b_c.png"
    assert max(map(len, names)) < 200 and len(list((tmp_path / "out").glob("*.png"))) == 18
