"""A run that is killed anywhere and continued gives the digits of an uninterrupted one.

SELF1E_KILL_POINTS chooses how many points are tried, SELF1E_KILL_SEED the first one's (`scripts/kill_test.py`).
"""

import os
import signal

import numpy as np
import pytest
from runs import EVENTS, count_events, history, train, train_in_a_child

from self1e import Self1EForSegmentation
from self1e.evaluation.results import Results
from self1e.training.stop import StopRequest
from self1e.training.trainer import Self1ETrainer

POINTS, SEED = int(os.environ.get("SELF1E_KILL_POINTS", 6)), int(os.environ.get("SELF1E_KILL_SEED", 0))
FLAGS = ("--max_steps", "3", "--save_steps", "1", "--no_eval", "--report_to", "none")


@pytest.fixture(scope="module")
def whole(reference, tiny_version, shapes, tmp_path_factory):
    """An uninterrupted run and the number of its events; `reference` has built the index of the data."""
    folder, events = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in EVENTS:
            patch.setattr(owner, name, getattr(owner, name))  # so that it is put back
        count_events(events.append)
        train(tiny_version, shapes, folder, "run", *FLAGS)
    return folder / "run", len(events)


@pytest.mark.parametrize("seed", range(SEED, SEED + POINTS))
def test_a_kill_anywhere_changes_nothing(whole, tiny_version, shapes, tmp_path, seed):
    expected, events = whole
    point = int(np.random.default_rng(seed).integers(events))
    ended = train_in_a_child(tiny_version, shapes, tmp_path, "run", *FLAGS, send=(signal.SIGKILL, point))
    assert ended == -signal.SIGKILL
    left = "--auto_resume" if (tmp_path / "run" / "checkpoints").is_dir() else "--overwrite"
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *FLAGS, left) == 0
    for one, other in zip(history(expected), history(tmp_path / "run"), strict=True):
        assert {name: one[name] for name in ("loss", "grad_norm")} == {
            name: other[name] for name in ("loss", "grad_norm")
        }
    models = [Self1EForSegmentation.from_pretrained(run / "ckpt_model") for run in (expected, tmp_path / "run")]
    weights = [model.state_dict() for model in models]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


REQUESTS = {  # the signal, the method at one of whose calls it comes, the call's number, the step that is saved
    "step": (signal.SIGTERM, (Self1ETrainer, "compute_loss"), 1, 1),
    "validation": (signal.SIGTERM, (Results, "append"), 0, 1),
    "saving": (signal.SIGUSR1, (Self1ETrainer, "_publish"), 0, 3),
}


@pytest.mark.parametrize("during", REQUESTS)
def test_a_request_to_stop_saves(whole, tiny_version, shapes, tmp_path, during):
    """Within the first step, after the first of two photos, or while step 2 is saved."""
    number, at, call, kept = REQUESTS[during]
    flags = ("--max_steps", "4", "--save_steps", "2", "--report_to", "none", "--eval_steps")
    flags += ("1",) if during == "validation" else ("9",)
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *flags, send=(number, call), at=at) == 75
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{kept}"]
    assert not (tmp_path / "run" / "ckpt_model").exists()
    flags = (*FLAGS[2:], "--max_steps", "4", "--auto_resume")
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *flags) == 0
    found, expected = history(tmp_path / "run"), history(whole[0])
    assert [line["loss"] for line in found][:3] == [line["loss"] for line in expected]


def test_signals_are_heard_during_a_run_alone():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.armed = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.cause == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
