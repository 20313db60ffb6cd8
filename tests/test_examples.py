"""The scripts in examples/, run as users run them, on a tiny model."""

import csv
import json
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny_models import make_base, make_trained


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return str(make_trained(tmp_path_factory.mktemp("examples") / "trained"))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return str(path)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_segment(monkeypatch, version, photo, tmp_path, capsys):
    output = tmp_path / "overlay.jpg"
    run(monkeypatch, "segment.py", "--version", version, photo, "the star", "Which one?", "--output", output)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["the star", "Which one?"]
    assert Image.open(output).size == (60, 40)


def test_chat(monkeypatch, version, photo, tmp_path, capsys):
    arguments = ["--version", version, photo, "Where is it?", "Why?", "--output", tmp_path / "chat"]
    run(monkeypatch, "chat.py", *arguments, "--max_new_tokens", 6)
    text = capsys.readouterr().out
    assert text.count("> ") >= 2 and len(list((tmp_path / "chat").iterdir())) == text.count("[SEG]")


def test_finetune_on_own_data(monkeypatch, photo, tmp_path):
    data, masks = tmp_path / "mine", np.zeros((40, 60), np.uint8)
    data.mkdir()
    masks[10:30, 20:40] = 255
    rows = [["image", "mask", "prompt"]]
    for number in range(4):
        Image.open(photo).rotate(90 * number).save(data / f"{number}.jpg")
        Image.fromarray(np.roll(masks, 5 * number, 1)).save(data / f"{number}.png")
        rows.append([f"{number}.jpg", f"{number}.png", f"the thing number {number}"])
    with open(data / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--precision", "fp32", "--batch_size", 2, "--grad_accumulation_steps", 1, "--workers", 0, "--lora_r", 4]
    arguments = ["--version", make_base(tmp_path / "base"), "--data", data / "train.csv"]
    arguments += ["--output", tmp_path / "runs/own"]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "finetune_own_data.py", *arguments, *flags, "--report_to", "none")
    assert not end.value.code
    (record,) = json.loads((tmp_path / "runs/own/predictions/predictions.json").read_text())
    assert record["prompt"] == "the thing number 0"
    assert np.array(Image.open(tmp_path / "runs/own/predictions" / record["mask"])).shape == (40, 60)
