"""Two CPU processes under the deepspeed launcher: kills, ZeRO-3, requests to stop, ranks that hang."""

import json
import os
import re
import signal
import time

import psutil
import pytest
from custom_trees import table
from helpers import ROOT, noise
from PIL import Image
from runs import LAUNCHER, launch, loss, pictures, steps

from self1e import Self1EForSegmentation
from self1e.training.checkpoint import checkpoints_in, step_of

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")
# Photos of one tile and of two, and many questions that have no mask: ranks need the head unequally often.
FLAGS = ("--max_steps", "10", "--save_steps", "2", "--no_eval", "--gradient_checkpointing", "--high_res")
FLAGS += ("--dataset", "custom||reason_seg||vqa", "--mixture", "exact")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    """`FLAGS` and own data: photos of one tile and of two."""
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for number, (width, height) in enumerate([(60, 60), (60, 60), (120, 60), (60, 120)]):
        noise(width, height, seed=number).save(folder / f"{number}.png")
        half = Image.new("L", (width, height))
        half.paste(1, (0, 0, width, height // 2))
        half.save(folder / f"{number}_mask.png")
        rows.append((f"{number}.png", f"{number}_mask.png", f"thing {number}"))
    return *FLAGS, "--custom_data", str(table(folder, rows))


def until(process, step: str) -> str:
    """What is printed up to the line of a step."""
    printed = ""
    for line in process.stdout:
        printed += line
        if step in steps(printed):
            return printed
    raise AssertionError(printed)


def ranks(process) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks."""
    found = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "--local_rank" in str(child.cmdline())
    ]
    return sorted(found, key=lambda child: next(flag for flag in child.cmdline() if "--local_rank" in flag))


def finish(process, code: int = 0) -> str:
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    return printed


def losses(*printed: str) -> list[float]:
    return [loss(line) for step, line in sorted({k: v for text in printed for k, v in steps(text).items()}.items())]


def partitioned(path):
    """A configuration of ZeRO-3 that partitions even tiny tensors."""
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(config))
    return path


def test_kills_stops_and_zero3_give_the_same_run(tiny_version, shapes, runs, flags):
    """Killed after step 3 or soon after, continued, its launcher ended by SIGTERM, continued to the end."""
    folder = runs / "killed"
    killed = launch(tiny_version, shapes, runs, "killed", *flags)
    first = until(killed, "3")
    os.killpg(killed.pid, signal.SIGKILL)
    first += killed.communicate(timeout=60)[0]
    left = checkpoints_in(folder / "checkpoints")[-1]

    stopped = launch(tiny_version, shapes, runs, "killed", *flags, "--auto_resume")
    second, trained = until(stopped, str(step_of(left) + 1)), ranks(stopped)
    os.kill(stopped.pid, signal.SIGTERM)
    psutil.wait_procs(trained, timeout=200)
    second += stopped.communicate(timeout=60)[0]
    assert "stopped by" in second and "continue with --auto_resume" in second, second
    assert f"continuing from {left}" in second
    assert step_of(left) < step_of(checkpoints_in(folder / "checkpoints")[-1]) < 10

    validated = [*(flag for flag in flags if flag != "--no_eval"), "--eval_steps", "10"]
    third = finish(launch(tiny_version, shapes, runs, "killed", *validated, "--auto_resume"))
    drawn = pictures(folder)  # by the first rank alone: one event file per start
    assert len(list((folder / "tensorboard").iterdir())) == 3
    assert [[step for step, _ in drawn[f"ReasonSeg|val/{kind}"]] for kind in ("worst", "median", "best")] == [[10]] * 3
    again = steps(first).keys() & steps(second).keys()  # none only where the kill came right after a checkpoint
    assert {step: steps(second)[step] for step in again} == {step: steps(first)[step] for step in again}
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["checkpoint-10"]
    assert Self1EForSegmentation.from_pretrained(folder / "ckpt_model").trained_head

    config = partitioned(runs / "zero3.json")
    sharded = launch(tiny_version, shapes, runs, "zero3", *flags, "--deepspeed", str(config))
    fourth = until(sharded, "2")
    ranks(sharded)[1].send_signal(signal.SIGUSR1)
    fourth += finish(sharded, code=75)
    assert "stopped by SIGUSR1" in fourth
    fifth = finish(launch(tiny_version, shapes, runs, "zero3", *flags, "--deepspeed", str(config), "--auto_resume"))
    # sharded sums run in another order
    assert losses(fourth, fifth) == pytest.approx(losses(first, second, third), rel=1e-3)
    assert len(losses(fourth, fifth)) == 10
    assert Self1EForSegmentation.from_pretrained(runs / "zero3" / "ckpt_model").trained_head


def test_a_rank_that_hangs_is_named(tiny_version, shapes, runs, flags):
    process = launch(tiny_version, shapes, runs, "hangs", *flags, "--timeout", "12", "--max_steps", "500")
    until(process, "2")
    second = ranks(process)[1]
    state = runs / "hangs" / ".ranks" / "rank_1.json"
    while not (state.is_file() and re.search("(computes|reads) .*/", state.read_text())):  # it has said what it does
        assert second.is_running()
        time.sleep(0.01)
    second.suspend()
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert "nothing has moved for 12 seconds (--timeout)" in printed
    assert re.search(r"rank 1 (computes|reads) .*/.* and has given no sign of life", printed), printed


@pytest.mark.parametrize(("launcher", "tracebacks"), [("deepspeed", 1), ("torchrun", 1)])
def test_ctrl_c_is_one_message(tiny_version, shapes, runs, flags, launcher, tracebacks):
    """A terminal sends it to every process; each launcher passes it on once more, and the others add a traceback."""
    more = ("--max_steps", "500", "--save_steps", "1")
    process = launch(tiny_version, shapes, runs, launcher, *flags, *more, launcher=launcher)
    until(process, "2")
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 130 or tracebacks and process.returncode != 0
    assert printed.count("interrupted; continue from") == 1 and "with --auto_resume" in printed, printed
    assert printed.count("Traceback") == tracebacks, printed
    if tracebacks:
        assert not re.search("self1e/|train_hf_ivl_seq.py", printed.split("Traceback")[1]), printed
