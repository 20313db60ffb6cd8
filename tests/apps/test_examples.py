"""The scripts in examples/, run as users run them, on a tiny model."""

import csv
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, make_base
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return str(path)


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture
def own_data(photo, tmp_path):
    """train.csv with four photos and val.csv with one."""
    folder, mask = tmp_path / "mine", np.zeros((40, 60), np.uint8)
    folder.mkdir()
    mask[10:30, 20:40] = 255
    for name, numbers in {"train": range(4), "val": [4]}.items():
        rows = [["image", "mask", "prompt"]]
        for number in numbers:
            Image.open(photo).rotate(180 * (number % 2)).save(folder / f"{number}.jpg")
            Image.fromarray(np.roll(mask, 5 * number, 1)).save(folder / f"{number}.png")
            rows.append([f"{number}.jpg", f"{number}.png", f"the thing number {number}"])
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def finetune(monkeypatch, tmp_path, data, *flags):
    """Exit code and output folder of the example with a tiny base."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    tiny = "--precision fp32 --batch_size 2 --workers 0 --lora_r 4 --epochs 1".split()
    arguments = ["--version", make_base(tmp_path / "base"), "--data", data / "train.csv", "--output", "runs/own"]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "finetune_own_data.py", *arguments, *flags, *tiny, "--report_to", "none")
    return end.value.code, tmp_path / "runs/own"


def test_finetune_on_own_data(monkeypatch, own_data, tmp_path):
    code, output = finetune(monkeypatch, tmp_path, own_data, "--val", own_data / "val.csv", "--eval_steps", 2)
    assert not code and {path.name for path in output.glob("*.png")} == {
        "curves.png",
        "train_sheet.png",
        "val_sheet.png",
    }
    split = f"custom|{own_data / 'val.csv'}"
    summary = json.loads((output / "eval/summary.json").read_text())
    assert list(summary) == [split] and summary[split]["n"] == 1
    assert len(list((output / "validation/step_2").glob("*_val_csv_*.json"))) == 1
    (mask,) = (output / "predictions").glob("*_the_thing_number_4.png")
    assert np.array(Image.open(mask)).shape == (40, 60)


def test_finetune_stops_at_faulty_data(monkeypatch, own_data, tmp_path, capsys):
    (own_data / "2.png").unlink()
    code, output = finetune(monkeypatch, tmp_path, own_data)
    assert code == 1 and not (output / "ckpt_model").exists()
    assert "line 4: mask: 2.png is" in capsys.readouterr().out


def test_the_notebook(version, tmp_path):
    """Its cells run one after another in one process; a notebook's kernel would do no more."""
    notebook = json.loads((ROOT / "examples/self1e.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    environment = os.environ | {"SELF1E_VERSION": version, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Segmentation(") == 1 and done.stdout.count("Reply(") == 2
    output = tmp_path / "notebook_output"
    assert len(json.loads((output / "coco.json").read_text())["categories"]) == 3
    assert (output / "features.png").is_file()
