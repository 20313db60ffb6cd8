"""The files in examples/, run as users run them, on a tiny model."""

import json
import os
import subprocess
import sys

import numpy as np
from helpers import ROOT, make_base, make_trained, noise
from PIL import Image

from self1e.apps.convert import convert

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def test_own_data_to_masks(tmp_path):
    for name in ("train_hf_ivl_seq.py", "eval_all.sh", "scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    base = make_base(tmp_path / "base", image_size=56)
    convert(str(make_trained(tmp_path / "trained", base)), tmp_path / "published", "published")
    mask, lines = np.zeros((40, 60), np.uint8), ["image,mask,prompt"]
    mask[10:30, 20:40] = 255
    for folder in ("images", "masks", "bin"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    for number in range(5):
        noise(60, 40, number).save(tmp_path / f"mine/images/{number}.jpg")
        Image.fromarray(np.roll(mask, 5 * number, 1)).save(tmp_path / f"mine/masks/{number}.png")
        lines.append(f"{number}.jpg,{number}.png,the thing number {number}")
    (tmp_path / "mine/all.csv").write_text("\n".join(lines) + "\n")
    program = tmp_path / "mine/bin/self1e"  # what installing the package puts beside python
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m self1e "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    flags = "--precision fp32 --batch_size 2 --workers 0 --lora_r 4 --epochs 1 --report_to none".split()
    done = subprocess.run(
        ["bash", ROOT / "examples/own_data.sh", *flags],
        cwd=tmp_path, env=ENVIRONMENT | {"PATH": path, "VERSION": str(base), "WEIGHTS": str(tmp_path / "published")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine/all_train.csv: 4 photos" in done.stdout and "4 samples, 2 steps of 2 x 1 x 1" in done.stdout
    assert done.stdout.count("| custom mine/all_val.csv |   1 |") == 2
    assert len(list((tmp_path / "runs/mine/masks").glob("*_the_red_star.png"))) == 5


def test_the_notebook(version, tmp_path):
    """It holds its outputs, and its cells run one after another in one process; a kernel would do no more."""
    path = ROOT / "examples/self1e.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]) and path.stat().st_size < 300_000
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in cells))
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=ENVIRONMENT | {"SELF1E_VERSION": version},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Segmentation(") == 1 and done.stdout.count("Reply(") == 2
    output = tmp_path / "notebook_output"
    assert len(json.loads((output / "coco.json").read_text())["categories"]) == 3
    assert (output / "similarity.png").is_file()
