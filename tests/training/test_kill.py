"""A run that is killed or asked to stop, and continued, gives the digits of an uninterrupted one."""

import pytest
from runs import history, kill, tell_by_sigusr1, terminate, train_in_a_child

from self1e import Self1EForSegmentation
from self1e.training.checkpoints import checkpoints_in

FLAGS = ("--max_steps", "3", "--save_steps", "1", "--no_eval", "--report_to", "none")
KILLED = {  # what the run is about to do, and how often it did so before
    "in the third step": ("self1e.training.loop:agree", 2),
    "in the second checkpoint": ("self1e.training.checkpoints:sync", 1),
    "in the merge": ("self1e.training.train:save_checkpoint", 0),
}


@pytest.fixture(scope="module")
def whole(tiny_version, shapes, tmp_path_factory):
    """An uninterrupted run, in a process like those of the others, for the threads of torch decide the last digits."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_in_a_child(tiny_version, shapes, folder, "run", *FLAGS) == 0
    return folder / "run"


@pytest.mark.parametrize("point", KILLED)
def test_a_kill_changes_nothing(whole, tiny_version, shapes, tmp_path, point):
    at, call = KILLED[point]
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *FLAGS, at=at, call=call, do=kill) == -9
    left = tmp_path / "run" / "checkpoints"
    assert (left / "partial").is_dir() == (point == "in the second checkpoint") and checkpoints_in(left)
    assert not (tmp_path / "run" / "ckpt_model").exists()
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *FLAGS, "--auto_resume") == 0
    assert [path.name for path in left.iterdir()] == ["checkpoint-3"]
    digits = [[(line["loss"], line["grad_norm"]) for line in history(run)] for run in (whole, tmp_path / "run")]
    assert digits[0] == digits[1] and len(digits[0]) == 3
    models = [Self1EForSegmentation.from_pretrained(run / "ckpt_model") for run in (whole, tmp_path / "run")]
    weights = [model.state_dict() for model in models]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


REQUESTS = {  # the function at one of whose calls the request comes, the call's number, how, the step that is saved
    "step": ("self1e.training.loop:note", 1, terminate, 1),
    "validation": ("self1e.evaluation.results:Results.append", 0, terminate, 1),
    "saving": ("self1e.training.checkpoints:sync", 0, tell_by_sigusr1, 3),
}


@pytest.mark.parametrize("during", REQUESTS)
def test_a_request_to_stop_saves(whole, tiny_version, shapes, tmp_path, during):
    """Within the first step, after the first of two photos of its validation, or while step 2 is saved."""
    at, call, request, saved = REQUESTS[during]
    run, flags = tmp_path / "run", ("--max_steps", "3", "--save_steps", "2", "--report_to", "none", "--eval_steps")
    flags += ("1",) if during == "validation" else ("9",)
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *flags, at=at, call=call, do=request) == 75
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"checkpoint-{saved}"]
    assert (run / "requeue").is_file() and not (run / "ckpt_model").exists()
    assert train_in_a_child(tiny_version, shapes, tmp_path, "run", *FLAGS, "--auto_resume") == 0
    assert not (run / "requeue").exists()
    assert [line["loss"] for line in history(run)] == [line["loss"] for line in history(whole)]
