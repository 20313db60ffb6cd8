"""Evaluations on two processes that are asked to stop, and continued to the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, make_trained, read_json, stop_at_work
from segmentation_trees import GREF, REASON, make_dataset
from torch.distributed import run
from vqa_trees import write_vqav2

from self1e.files import read_records, to_jsonl

PHOTOS = 80  # enough that an evaluation is met at work


def segmentation(tmp_path: Path) -> tuple[list, Path, dict]:
    data = make_dataset(tmp_path / "dataset", reasoning=PHOTOS)
    command = ["eval_all.sh", "--dataset_dir", data, "--val_dataset", f"{GREF}||{REASON}"]
    return command, tmp_path / "runs/e/eval/ReasonSeg_val.jsonl", {"predicted_pixels": 123456}


def vqa(tmp_path: Path) -> tuple[list, Path, dict]:
    write_vqav2(tmp_path / "data", PHOTOS)
    command = ["eval_vqas.sh", "--data_dir", tmp_path / "data", "--datasets", "vqa-vqav2-val", "--device", "cpu"]
    return [*command, "--batch_size", "1"], tmp_path / "runs/e/eval_vqa/vqa-vqav2-val.jsonl", {"answer": "kept"}


PASSES_ON = "signals_to_handle" in Path(run.__file__).read_text(encoding="utf-8")
ASKED = signal.SIGUSR1 if PASSES_ON else signal.SIGTERM  # torch 2.8 passes the latter on alone


@pytest.mark.parametrize("program, ask", [(segmentation, signal.SIGTERM), (vqa, ASKED)])
def test_an_evaluation_that_is_asked_to_stop_says_so_and_continues(program, ask, tmp_path):
    version = make_trained(tmp_path / "trained", image_size=56)
    (script, *flags), complete, known = program(tmp_path)
    command = ["bash", ROOT / script, "--version", version, "--exp_name", "e", "--log_base_dir", tmp_path / "runs"]
    command = [*map(str, [*command, *flags, "--num_processes", "2", "--workers", "0"])]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    own, mark = complete.with_name(f"{complete.stem}.rank1.jsonl"), tmp_path / "runs/e/requeue"

    printed = stop_at_work(command, own, ask, environment)
    assert 'Traceback (most recent call last):\n  File "self1e' not in printed, printed
    assert mark.is_file() and not complete.exists(), printed
    answered = [record | known for record in read_records(own)]
    own.write_text(to_jsonl(answered))

    done = subprocess.run(command, text=True, timeout=600, env=environment, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    records = list(read_records(complete))
    assert len(records) == PHOTOS and not own.exists() and not mark.exists()
    assert [record for record in records if known.items() <= record.items()] == answered  # none was made again
    assert read_json(complete.with_name("summary.json"))
