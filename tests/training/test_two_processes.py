"""Two CPU processes under deepspeed and torchrun: kills and requests under ZeRO-2, ZeRO-3 with tiles, DDP."""

import json
import os
import signal

import psutil
import pytest
from custom_trees import table
from helpers import ROOT, noise
from PIL import Image
from runs import LAUNCHER, events, finish, history, launch, steps, train

from self1e import Self1EForSegmentation
from self1e.training.checkpoints import checkpoints_in, step_of

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")
# Photos of one tile and of two, and many questions that have no mask: ranks need the head unequally often.
FLAGS = ("--max_steps", "6", "--save_steps", "2", "--no_eval", "--gradient_checkpointing", "--high_res")
FLAGS += ("--dataset", "custom||reason_seg||vqa", "--mixture", "exact")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    """`FLAGS` and own data: photos of one tile and of two."""
    folder, lines = tmp_path_factory.mktemp("photos"), []
    for number, (width, height) in enumerate([(60, 60), (60, 60), (120, 60), (60, 120)]):
        noise(width, height, seed=number).save(folder / f"{number}.png")
        half = Image.new("L", (width, height))
        half.paste(1, (0, 0, width, height // 2))
        half.save(folder / f"{number}_mask.png")
        lines.append((f"{number}.png", f"{number}_mask.png", f"thing {number}"))
    return *FLAGS, "--custom_data", str(table(folder, lines))


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


def losses(folder) -> list[float]:
    return [line["loss"] for line in history(folder)]


def test_kills_stops_and_zero3_give_the_same_run(tiny_version, shapes, runs, flags):
    """ZeRO-2, killed after step 3, continued, its launcher ended by SIGTERM, continued; then ZeRO-3, stopped once."""
    folder = runs / "killed"
    killed = launch(tiny_version, shapes, runs, "killed", *flags)
    first = until(killed, "3")
    os.killpg(killed.pid, signal.SIGKILL)
    first += killed.communicate(timeout=60)[0]
    left = checkpoints_in(folder / "checkpoints")[-1]

    stopped = launch(tiny_version, shapes, runs, "killed", *flags, "--auto_resume", "--max_steps", "6")
    second, trained = until(stopped, str(step_of(left) + 1)), ranks(stopped)
    os.kill(stopped.pid, signal.SIGTERM)
    psutil.wait_procs(trained, timeout=200)
    second += stopped.communicate(timeout=60)[0]
    assert "stopped by" in second and f"continuing from {left}" in second, second
    assert step_of(left) < step_of(checkpoints_in(folder / "checkpoints")[-1]) < 6 and (folder / "requeue").is_file()

    validated = [*(flag for flag in flags if flag != "--no_eval"), "--eval_steps", "6"]
    finish(launch(tiny_version, shapes, runs, "killed", *validated, "--auto_resume"))
    pictures = events(folder)[1]  # by the first rank alone: one event file per start
    assert len(list((folder / "tensorboard").iterdir())) == 3
    assert [[step for step, _ in pictures[f"ReasonSeg|val/{kind}"]] for kind in ("worst", "best")] == [[6]] * 2
    again = steps(first).keys() & steps(second).keys()  # none only where the kill came right after a checkpoint
    assert {step: steps(second)[step] for step in again} == {step: steps(first)[step] for step in again}
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["checkpoint-6"]
    assert Self1EForSegmentation.from_pretrained(folder / "ckpt_model").trained_head

    zero3 = json.loads((ROOT / "configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partitions even tiny tensors
    (runs / "zero3.json").write_text(json.dumps(zero3))
    zero3_flags = (*flags, "--deepspeed", str(runs / "zero3.json"))
    sharded = launch(tiny_version, shapes, runs, "zero3", *zero3_flags)
    until(sharded, "2")
    ranks(sharded)[1].send_signal(signal.SIGUSR1)
    finish(sharded, code=75)
    finish(launch(tiny_version, shapes, runs, "zero3", *zero3_flags, "--auto_resume"))
    # sharded sums run in another order
    assert losses(runs / "zero3") == pytest.approx(losses(folder), rel=1e-3) and len(losses(folder)) == 6
    assert Self1EForSegmentation.from_pretrained(runs / "zero3" / "ckpt_model").trained_head


def test_one_and_two_ranks_of_any_engine_train_the_same(tiny_version, shapes, runs):
    """Half the accumulation on twice the ranks: DDP, DDP continued by one process, and ZeRO-2."""
    flags = ("--grad_accumulation_reduction", "mean", "--lora_dropout", "0", "--no_eval", "--report_to", "none")
    one, two = ("--grad_accumulation_steps", "4"), ("--grad_accumulation_steps", "2", "--workers", "1")
    train(tiny_version, shapes, runs, "one", *flags, *one, "--max_steps", "4")
    ddp = (*flags, "--deepspeed", "none", *two)
    finish(launch(tiny_version, shapes, runs, "ddp", *ddp, "--max_steps", "2", launcher="torchrun"))
    train(tiny_version, shapes, runs, "ddp", *flags, *one, "--max_steps", "4", "--auto_resume")
    finish(launch(tiny_version, shapes, runs, "zero2", *flags, *two, "--max_steps", "4", launcher="torchrun"))
    for name in ("ddp", "zero2"):
        # the schedule of a run of two steps ends earlier, after its second step
        together = slice(0, 2) if name == "ddp" else slice(0, 4)
        assert losses(runs / name)[together] == pytest.approx(losses(runs / "one")[together], rel=1e-5)
    assert len(losses(runs / "ddp")) == 4


def test_tied_embeddings_train_their_added_tokens_under_zero2(make_tiny, shapes, runs):
    version = make_tiny(tie_word_embeddings=True)
    flags = ("--trainable_embeddings", "new", "--no_eval", "--report_to", "none", "--save_steps", "1")
    finish(launch(version, shapes, runs, "tied", *flags, "--max_steps", "1"))
    finish(launch(version, shapes, runs, "tied", *flags, "--max_steps", "2", "--auto_resume"))
    assert Self1EForSegmentation.from_pretrained(runs / "tied" / "ckpt_model").trained_head


def test_a_rank_that_hangs_ends_the_run(tiny_version, shapes, runs):
    """The other one meets the time-out of a collective; the file of the first says which samples it had."""
    flags = ("--max_steps", "500", "--no_eval", "--report_to", "none", "--timeout", "8", "--deepspeed", "none")
    process = launch(tiny_version, shapes, runs, "hangs", *flags)
    until(process, "2")
    ranks(process)[1].suspend()
    printed = process.communicate(timeout=200)[0]
    assert process.returncode != 0 and "rank 0, last micro-batch read: " in printed, printed
    assert (runs / "hangs/ranks/rank_1.txt").read_text().strip()
