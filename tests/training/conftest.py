"""Fixtures of the training tests: scenes to train on, and a run that several tests look at."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from runs import command

from self1e.synthetic.shapes_dataset import make_shapes_dataset


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # a continued run sets it for good


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    root = make_shapes_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=2, size=64)
    for split in ("refcoco+", "refcocog", "grefcoco"):  # not selected below; final evaluation is to skip them
        shutil.rmtree(root / "dataset" / "refer_seg" / split)
    return root


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def damaged(shapes, tmp_path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def reference(tiny_version, shapes, runs):
    """An uninterrupted run of four steps through the final evaluation; its folder and what it printed."""
    flags = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--save_published_layout"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_hf_ivl_seq.py"), *command(tiny_version, shapes, runs, "reference", *flags)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "reference", done.stdout + done.stderr
