"""Two CPU processes under the deepspeed launcher: kills, ZeRO-3, requests to stop, ranks that hang."""

import json
import os
import re
import signal

import psutil
import pytest
from custom_trees import table
from helpers import ROOT, noise
from PIL import Image
from runs import LAUNCHER, launch, loss, pictures, steps

from self1e import Self1EForSegmentation
from self1e.training.checkpoint import checkpoints_in

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")
FLAGS = ("--max_steps", "6", "--save_steps", "2", "--no_eval", "--batch_size", "1", "--gradient_checkpointing")
FLAGS += ("--dataset", "reason_seg||vqa", "--vqa_data", "llava_instruct_150k||vqav2")  # a rank may hold text alone


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


def names(folder) -> list[str]:
    return [path.name for path in checkpoints_in(folder / "checkpoints")]


def losses(*printed: str) -> list[float]:
    return [loss(line) for step, line in sorted({k: v for text in printed for k, v in steps(text).items()}.items())]


def partitioned(path):
    """A configuration of ZeRO-3 that partitions even tiny tensors."""
    config = json.loads((ROOT / "configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(config))
    return path


def test_kills_stops_and_zero3_give_the_same_run(tiny_version, shapes, runs):
    """Killed after step 3, continued, its launcher ended by SIGTERM after step 4, continued to the end."""
    folder = runs / "killed"
    killed = launch(tiny_version, shapes, runs, "killed", *FLAGS)
    first = until(killed, "3")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert names(folder) == ["checkpoint-2"], first

    stopped = launch(tiny_version, shapes, runs, "killed", *FLAGS, "--auto_resume")
    second, trained = until(stopped, "3"), ranks(stopped)
    os.kill(stopped.pid, signal.SIGTERM)
    psutil.wait_procs(trained, timeout=60)
    second += stopped.communicate(timeout=60)[0]
    assert "stopped by" in second and "continue with --auto_resume" in second, second
    assert f"continuing from {folder / 'checkpoints' / 'checkpoint-2'}" in second
    assert names(folder)[-1] in ("checkpoint-3", "checkpoint-4", "checkpoint-5")

    validated = [*(flag for flag in FLAGS if flag != "--no_eval"), "--eval_steps", "6"]
    third = finish(launch(tiny_version, shapes, runs, "killed", *validated, "--auto_resume"))
    drawn = pictures(folder)  # by the first rank alone: one event file per start
    assert len(list((folder / "tensorboard").iterdir())) == 3
    assert [[step for step, _ in drawn[f"ReasonSeg|val/{kind}"]] for kind in ("worst", "median", "best")] == [[6]] * 3
    assert steps(second)["3"] == steps(first)["3"] and names(folder) == ["checkpoint-6"]
    assert Self1EForSegmentation.from_pretrained(folder / "ckpt_model").trained_head

    config = partitioned(runs / "zero3.json")
    sharded = launch(tiny_version, shapes, runs, "zero3", *FLAGS, "--deepspeed", str(config))
    fourth = until(sharded, "2")
    ranks(sharded)[1].send_signal(signal.SIGUSR1)
    fourth += finish(sharded, code=75)
    assert "stopped by SIGUSR1" in fourth
    fifth = finish(launch(tiny_version, shapes, runs, "zero3", *FLAGS, "--deepspeed", str(config), "--auto_resume"))
    # sharded sums run in another order
    assert losses(fourth, fifth) == pytest.approx(losses(first, second, third), rel=1e-3)
    assert Self1EForSegmentation.from_pretrained(runs / "zero3" / "ckpt_model").trained_head


def test_zero3_trains_photos_of_any_tile_grids(tiny_version, shapes, runs, tmp_path):
    """Two photos per rank and micro-batch, now of one grid and now of two: ranks need the head unequally often."""
    rows = []
    for number, (width, height) in enumerate([(60, 60), (60, 60), (120, 60), (60, 120)]):
        noise(width, height, seed=number).save(tmp_path / f"{number}.png")
        half = Image.new("L", (width, height))
        half.paste(1, (0, 0, width, height // 2))
        half.save(tmp_path / f"{number}_mask.png")
        rows.append((f"{number}.png", f"{number}_mask.png", f"thing {number}"))
    source = table(tmp_path, rows)
    flags = ("--dataset", "custom", "--custom_data", str(source), "--high_res", "--max_steps", "3", "--no_eval")
    config = partitioned(runs / "zero3_high_res.json")
    printed = [
        finish(launch(tiny_version, shapes, runs, f"high_res_{name}", *flags, "--epochs", "9", *more))
        for name, more in (("zero2", ()), ("zero3", ("--deepspeed", str(config))))
    ]
    # sharded sums run in another order
    assert losses(printed[1]) == pytest.approx(losses(printed[0]), rel=1e-3)


def test_a_rank_that_hangs_is_named(tiny_version, shapes, runs):
    flags = ("--timeout", "8", "--max_steps", "500", "--save_steps", "500")
    process = launch(tiny_version, shapes, runs, "hangs", *FLAGS, *flags)
    until(process, "60")  # some seconds, so that the rank has said what it does
    ranks(process)[1].suspend()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "nothing has moved for 8 seconds (--timeout)" in printed
    assert re.search(r"rank 1 (computes|reads) .*/.* and has given no sign of life", printed), printed


@pytest.mark.parametrize(("launcher", "tracebacks"), [("self1e launch", 0), ("deepspeed", 1), ("torchrun", 1)])
def test_ctrl_c_is_one_message(tiny_version, shapes, runs, launcher, tracebacks):
    """A terminal sends it to every process; each launcher passes it on once more, and the others add a traceback."""
    flags = ("--max_steps", "500", "--save_steps", "1")
    process = launch(tiny_version, shapes, runs, launcher, *FLAGS, *flags, launcher=launcher)
    until(process, "2")
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130 or tracebacks and process.returncode != 0
    assert printed.count("interrupted; continue from") == 1 and "with --auto_resume" in printed, printed
    assert printed.count("Traceback") == tracebacks, printed
    if tracebacks:
        assert not re.search("self1e/|train_hf_ivl_seq.py", printed.split("Traceback")[1]), printed
