"""Evaluations on two processes: interrupted, asked to stop, ended because one of them hangs, continued to the end."""

import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, make_trained, read_json
from segmentation_trees import GREF, REASON, make_dataset
from terminal import CTRL_C, Terminal
from vqa_trees import write_vqav2

PHOTOS = 300  # enough that an evaluation is met at work
HANGS = 12  # seconds; two processes on a busy machine may need several for one photo


def segmentation(tmp_path: Path, version: Path) -> tuple[list, Path]:
    data = make_dataset(tmp_path / "dataset", reasoning=PHOTOS)
    command = ["eval_all.sh", "--dataset_dir", data, "--val_dataset", f"{GREF}||{REASON}"]
    return command, tmp_path / "runs/e/eval/ReasonSeg_val.jsonl"


def vqa(tmp_path: Path, version: Path) -> tuple[list, Path]:
    write_vqav2(tmp_path / "data", PHOTOS)
    command = ["eval_vqas.sh", "--data_dir", tmp_path / "data", "--datasets", "vqa-vqav2-val", "--device", "cpu"]
    return [*command, "--batch_size", "1"], tmp_path / "runs/e/eval_vqa/vqa-vqav2-val.jsonl"


PROGRAMS = {  # what it says when it is stopped, where a rank is, and the signal that asks it to stop
    segmentation: (
        rf"done: {re.escape(GREF)}; the same command continues",
        r"ReasonSeg\|val \d+\.jpg",
        signal.SIGTERM,
    ),
    vqa: (
        r"[1-9]\d* of 300 questions of .*The same command continues from there",
        r"question \d+ \(\d\.jpg\)",
        signal.SIGUSR1,
    ),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_interrupted_hanging_and_continued(program, tmp_path):
    kept, at, request = PROGRAMS[program]
    version = make_trained(tmp_path / "trained", image_size=56)
    (script, *flags), journal = program(tmp_path, version)
    command = ["bash", ROOT / script, "--version", version, "--exp_name", "e", "--log_base_dir", tmp_path / "runs"]
    command += [*flags, "--num_processes", "2", "--workers", "0"]

    def start(timeout: int = 600) -> Terminal:
        limited = [*command, "--timeout", str(timeout)]
        return Terminal(limited, environment={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, folder=tmp_path)

    def written() -> int | None:
        """When the second rank has last written results; None when there are none of it."""
        own = journal.with_name(f"{journal.stem}.rank1.jsonl")
        return own.stat().st_mtime_ns if own.is_file() else None

    def at_work(terminal: Terminal) -> Terminal:
        """Wait until the second rank has written results."""
        before, end = written(), time.monotonic() + 400
        while written() in (before, None):
            assert time.monotonic() < end and terminal.process.poll() is None, terminal.finish(timeout=9)
            time.sleep(0.01)
        return terminal

    terminal = at_work(start())
    terminal.type(CTRL_C)
    code, printed = terminal.finish()
    assert code == 130 and "Traceback" not in printed, printed
    assert len(re.findall("^interrupted", printed, re.MULTILINE)) == 1, printed
    assert re.search(kept, printed), printed

    terminal = at_work(start())
    terminal.process.send_signal(request)  # to the launcher alone
    code, printed = terminal.finish()
    assert code == 75 and "Traceback" not in printed, printed
    assert len(re.findall(f"^stopped by {request.name}", printed, re.MULTILINE)) == 1, printed
    assert re.search(kept, printed), printed

    terminal = at_work(start(timeout=HANGS))
    ranks = psutil.Process(terminal.process.pid).children()
    second = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    state = tmp_path / f"runs/e/.ranks/{journal.parent.name}/rank_1.json"
    while not (state.is_file() and re.search(at, state.read_text())):  # it has said what it does
        assert second.is_running() and not journal.exists()
        time.sleep(0.01)
    second.suspend()
    terminal.read_until("closing signal", timeout=400)  # the launcher has seen that the first rank ended
    second.kill()  # or it waits for this one
    code, printed = terminal.finish()
    assert code == 1 and "Traceback" not in printed, printed
    assert f"nothing has moved for {HANGS} seconds (--timeout)" in printed
    assert re.search(rf"rank 1 (reads|computes) {at}, and has given no sign of life", printed), printed
    assert not journal.exists() and written()

    code, printed = start().finish()
    assert code == 0, printed
    assert sum(1 for _ in journal.open()) == PHOTOS and not written()
    assert read_json(journal.with_name("summary.json"))
    assert not (tmp_path / f"runs/e/.ranks/{journal.parent.name}").exists()
