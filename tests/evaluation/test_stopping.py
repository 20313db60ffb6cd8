"""Evaluations on two processes that are asked to stop, and continued to the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, make_trained, read_json
from segmentation_trees import GREF, REASON, make_dataset
from torch.distributed import run
from vqa_trees import write_vqav2

PHOTOS = 80  # enough that an evaluation is met at work


def segmentation(tmp_path: Path) -> tuple[list, Path]:
    data = make_dataset(tmp_path / "dataset", reasoning=PHOTOS)
    command = ["eval_all.sh", "--dataset_dir", data, "--val_dataset", f"{GREF}||{REASON}"]
    return command, tmp_path / "runs/e/eval/ReasonSeg_val.jsonl"


def vqa(tmp_path: Path) -> tuple[list, Path]:
    write_vqav2(tmp_path / "data", PHOTOS)
    command = ["eval_vqas.sh", "--data_dir", tmp_path / "data", "--datasets", "vqa-vqav2-val", "--device", "cpu"]
    return [*command, "--batch_size", "1"], tmp_path / "runs/e/eval_vqa/vqa-vqav2-val.jsonl"


PASSES_ON = "signals_to_handle" in Path(run.__file__).read_text(encoding="utf-8")
ASKED = signal.SIGUSR1 if PASSES_ON else signal.SIGTERM  # torch 2.8 passes the latter on alone


@pytest.mark.parametrize("program, ask", [(segmentation, signal.SIGTERM), (vqa, ASKED)])
def test_an_evaluation_that_is_asked_to_stop_says_so_and_continues(program, ask, tmp_path):
    version = make_trained(tmp_path / "trained", image_size=56)
    (script, *flags), complete = program(tmp_path)
    command = ["bash", ROOT / script, "--version", version, "--exp_name", "e", "--log_base_dir", tmp_path / "runs"]
    command = [*map(str, [*command, *flags, "--num_processes", "2", "--workers", "0"])]
    options = {"env": os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE}
    own, mark = complete.with_name(f"{complete.stem}.rank1.jsonl"), tmp_path / "runs/e/requeue"

    running = subprocess.Popen(command, text=True, **options)
    while not (own.is_file() and own.stat().st_size):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(ask)  # to the launcher alone
    printed = running.communicate(timeout=300)[1]
    assert running.returncode != 0 and 'Traceback (most recent call last):\n  File "self1e' not in printed, printed
    assert mark.is_file() and not complete.exists(), printed
    answered = own.stat().st_size

    done = subprocess.run(command, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    assert sum(1 for _ in complete.open()) == PHOTOS and not own.exists() and not mark.exists() and answered
    assert read_json(complete.with_name("summary.json"))
