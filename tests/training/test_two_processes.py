"""Two CPU processes: kills and requests under ZeRO-2, ZeRO-3 with tiles, DDP."""

import json
import os
import signal
from itertools import takewhile

import psutil
import pytest
from custom_trees import table
from helpers import ROOT, noise
from PIL import Image
from runs import (
    LAUNCHER,
    events,
    exit_codes,
    history,
    kill_first,
    launch,
    start_ranks,
    suspend_second,
    tell_second_by_sigusr1,
    terminate,
    train,
    train_by_ranks,
)

from self1e import Self1EForSegmentation
from self1e.training.checkpoints import checkpoints_in

pytestmark = pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")
# Photos of one tile and of two, and many questions that have no mask: ranks need the head unequally often.
FLAGS = ("--max_steps", "6", "--save_steps", "2", "--no_eval", "--gradient_checkpointing", "--high_res")
FLAGS += ("--dataset", "custom||reason_seg||vqa", "--mixture", "exact")
FLAGS += ("--deepspeed", str(ROOT / "configs/zero2.json"))
STEP = "self1e.training.loop:agree"  # is called once in each step


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


def losses(folder) -> list[float]:
    return [line["loss"] for line in history(folder)]


def saved(folder) -> list[str]:
    return [path.name for path in checkpoints_in(folder / "checkpoints")]


def test_kills_stops_and_zero3_give_the_same_run(tiny_version, shapes, runs, flags):
    """ZeRO-2, killed in step 4, continued, its launcher ended by SIGTERM, continued; then ZeRO-3, stopped once."""
    run = (tiny_version, shapes, runs, "killed", *flags)
    folder = runs / "killed"
    # The other rank meets the end of the first one.
    assert train_by_ranks(*run, at=STEP, call=3, do=kill_first) == [-signal.SIGKILL, 1]
    before = losses(folder)
    assert len(before) == 3 and saved(folder) == ["checkpoint-2"]

    stopped = launch(*run, "--auto_resume")
    printed = "".join(takewhile(lambda line: not line.startswith("step 3 "), stopped.stdout))
    trained = psutil.Process(stopped.pid).children(recursive=True)
    os.kill(stopped.pid, signal.SIGTERM)
    psutil.wait_procs(trained, timeout=200)
    printed += stopped.communicate(timeout=60)[0]
    assert "stopped on request" in printed and saved(folder)[-1] in ("checkpoint-3", "checkpoint-4", "checkpoint-5"), (
        printed
    )
    assert (folder / "requeue").is_file() and losses(folder)[:3] == before

    validated = [*(flag for flag in flags if flag != "--no_eval"), "--eval_steps", "6"]
    assert train_by_ranks(tiny_version, shapes, runs, "killed", *validated, "--auto_resume") == [0, 0]
    assert len(list((folder / "tensorboard").iterdir())) == 3  # by the first rank alone: one event file per start
    assert len(events(folder)["eval/ReasonSeg|val_giou"]) == 1
    assert saved(folder) == ["checkpoint-6"]
    assert Self1EForSegmentation.from_pretrained(folder / "ckpt_model").trained_head

    zero3 = json.loads((ROOT / "configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partitions even tiny tensors
    zero3["zero_optimization"] |= dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
    (runs / "zero3.json").write_text(json.dumps(zero3))
    sharded = (tiny_version, shapes, runs, "zero3", *flags, "--deepspeed", str(runs / "zero3.json"))
    assert train_by_ranks(*sharded, at=STEP, call=2, do=tell_second_by_sigusr1) == [75, 75]
    assert saved(runs / "zero3") == ["checkpoint-3"]
    assert train_by_ranks(*sharded, "--auto_resume") == [0, 0]
    # sharded sums run in another order
    assert losses(runs / "zero3") == pytest.approx(losses(folder), rel=1e-3) and len(losses(folder)) == 6
    assert Self1EForSegmentation.from_pretrained(runs / "zero3" / "ckpt_model").trained_head


def test_one_and_two_ranks_of_any_engine_train_the_same(tiny_version, shapes, runs):
    """Half the accumulation on twice the ranks: DDP, continued by one process, and ZeRO-2."""
    flags = ("--grad_accumulation_reduction", "mean", "--lora_dropout", "0", "--no_eval", "--report_to", "none")
    flags += ("--max_steps", "3")
    one, two = ("--grad_accumulation_steps", "4"), ("--grad_accumulation_steps", "2", "--workers", "1")
    train(tiny_version, shapes, runs, "one", *flags, *one)
    ddp = (tiny_version, shapes, runs, "ddp", *flags)
    assert train_by_ranks(*ddp, *two, "--deepspeed", "none", at=STEP, call=1, do=terminate) == [75, 75]
    train(*ddp, *one, "--auto_resume")
    assert train_by_ranks(tiny_version, shapes, runs, "zero2", *flags, *two) == [0, 0]
    for name in ("ddp", "zero2"):
        assert losses(runs / name) == pytest.approx(losses(runs / "one"), rel=1e-5)


def test_tied_embeddings_train_their_added_tokens_under_zero2(make_tiny, shapes, runs):
    flags = ("--trainable_embeddings", "new", "--no_eval", "--report_to", "none", "--max_steps", "2")
    run = (make_tiny(tie_word_embeddings=True), shapes, runs, "tied", *flags)
    assert train_by_ranks(*run, at=STEP, call=0, do=terminate) == [75, 75]
    assert train_by_ranks(*run, "--auto_resume") == [0, 0]
    assert Self1EForSegmentation.from_pretrained(runs / "tied" / "ckpt_model").trained_head


def test_a_rank_that_hangs_ends_the_run(tiny_version, shapes, runs):
    """The other one meets the time-out of a collective; the file of the first says which samples it had."""
    flags = ("--max_steps", "9", "--no_eval", "--report_to", "none", "--timeout", "8", "--deepspeed", "none")
    first, second = start_ranks(tiny_version, shapes, runs, "hangs", *flags, at=STEP, call=2, do=suspend_second)
    assert exit_codes(first) == [1]
    second.kill()
    printed = (runs / "hangs.0.txt").read_text()
    assert "rank 0, last micro-batch read: " in printed, printed
    assert (runs / "hangs/ranks/rank_1.txt").read_text().strip()
