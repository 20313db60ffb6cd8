"""A checkpoint is whole or absent, runs no code, and only its own run continues from it."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import ROOT, Calls
from runs import history, train

from self1e.errors import UserError
from self1e.files import alone_in, read_records
from self1e.training.checkpoints import check_resumable, checkpoints_in, find, prune

FLAGS = ("--max_steps", "2", "--save_steps", "2", "--no_eval", "--report_to", "none")


@pytest.fixture(scope="module")
def trained(tiny_version, shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_version, shapes, folder, "run", *FLAGS)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run with one checkpoint, 2."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_another_run_is_refused_by_name(run, tiny_version, shapes, capsys):
    flags = "--seed 7 --batch_size 3 --grad_accumulation_steps 1 --refer_seg_data refcoco --sample_rates 1,1,1,2"
    flags += " --lora_r 8 --mask_features rfr --start_epoch 1 --epochs 2"
    train(tiny_version, shapes, run.parent, "run", *FLAGS, *flags.split(), "--auto_resume", code=1)
    message = capsys.readouterr().err
    names = "seed batch_size sets sample_rates start_epoch lora_r mask_features".split()
    assert all(f"  {name}: " in message for name in [*names, "accumulation x ranks"])
    assert "--resume_anyway" in message and "Traceback" not in message


def test_a_model_of_another_size_is_refused_by_name(run):
    folder = run / "checkpoints" / "checkpoint-2"
    then = yaml.safe_load((folder / "args.yaml").read_text())
    (deep, wide), vision = then["run"]["layers and width of LLM and ViT"]
    now = then | {"run": then["run"] | {"layers and width of LLM and ViT": [[deep + 1, wide], vision]}}
    with pytest.raises(UserError, match="layers and width of LLM and ViT"):
        check_resumable(folder, now, anyway=False)


def test_another_run_goes_on_when_told_to(run, tiny_version, shapes, capsys):
    flags = ("--max_steps", "3", "--seed", "7", "--no_eval", "--report_to", "none", "--auto_resume", "--resume_anyway")
    train(tiny_version, shapes, run.parent, "run", *flags)
    printed = capsys.readouterr().out
    assert "  seed: 42 then, 7 now" in printed and "continuing from" in printed
    assert [line["step"] for line in history(run)] == [1, 2, 3]


def test_what_is_no_other_run_may_change_and_is_printed(run, tiny_version, shapes, tmp_path, capsys):
    """Paths, how often a run saves, logs and validates, the rates; before, each step was logged."""
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy, copy_function=shutil.copyfile)
    flags = ("--max_steps", "5", "--save_steps", "1", "--save_total_limit", "2", "--print_freq", "5", "--workers", "1")
    flags += ("--val_dataset", "refcoco|unc|val", "--eval_steps", "4", "--report_to", "none", "--auto_resume")
    train(tiny_version, copy, run.parent, "run", *flags, "--lr", "3e-4")
    printed = capsys.readouterr().out
    assert "  lr: 0.0001 then, 0.0003 now" in printed and "  dataset_dir: " in printed
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in history(run)] == [1, 2, 5]
    assert {path.name for path in (run / "validation").iterdir()} == {"step_4", "step_5"}  # the last one always


def test_a_checkpoint_says_what_wrote_it(run):
    settings = yaml.safe_load((run / "checkpoints/checkpoint-2/args.yaml").read_text())
    assert {"commit", "torch"} <= settings["code"].keys() and settings["flags"]["max_steps"] == 2
    assert not [value for value in str(settings["run"]).split("'") if value.startswith("/")]  # no path


def test_only_a_whole_checkpoint_is_continued(run, tiny_version, shapes, capsys):
    (run / "checkpoints/checkpoint-2").rename(run / "checkpoints/partial")
    flags = (*FLAGS, "--resume", str(run / "checkpoints/partial"))
    train(tiny_version, shapes, run.parent, "run", *flags, code=1)
    assert "no checkpoint there" in capsys.readouterr().err


@pytest.mark.parametrize("deepspeed", [False, True])
def test_ranks_may_change_only_without_deepspeed(run, deepspeed):
    """DeepSpeed's own refusal would be a traceback, after minutes of loading."""
    folder = run / "checkpoints" / "checkpoint-2"
    settings = yaml.safe_load((folder / "args.yaml").read_text())
    engine = {"deepspeed": deepspeed, "zero_stage": 2 if deepspeed else 0, "ranks": 1}
    (folder / "args.yaml").write_text(yaml.safe_dump(settings | {"engine": engine}))
    now = settings | {"engine": engine | {"ranks": 2}}  # and half the accumulation: the product is the same
    if deepspeed:
        with pytest.raises(UserError, match="ranks: 1 then, 2 now"):
            check_resumable(folder, now, anyway=True)
    else:
        check_resumable(folder, now, anyway=False)


def test_a_strangers_checkpoint_runs_no_code(run, tiny_version, shapes, monkeypatch):
    monkeypatch.chdir(run)
    torch.save({"weights": Calls(os.mkdir, "pwned")}, run / "checkpoints/checkpoint-2/state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        train(tiny_version, shapes, run.parent, "run", *FLAGS, "--max_steps", "3", "--auto_resume")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(run / "checkpoints/checkpoint-2/state.pt", weights_only=False)  # as DeepSpeed does
    assert not (run / "pwned").exists()


def test_an_earlier_run_is_replaced_only_when_asked_and_when_all_else_is_right(run, tiny_version, shapes, capsys):
    def refused(*flags: str) -> str:
        train(tiny_version, shapes, run.parent, "run", *FLAGS, *flags, code=1)
        assert checkpoints_in(run / "checkpoints") and (run / "ckpt_model/config.json").is_file()
        return capsys.readouterr().err

    assert "--auto_resume" in (message := refused()) and "--overwrite" in message
    assert "--lora_from_layer" in refused("--overwrite", "--lora_from_layer", "9")
    other = shutil.copytree(run, run.parent / "other") / "checkpoints/checkpoint-2"
    shutil.copytree(other, later := run / "checkpoints/checkpoint-9")
    assert all("an earlier run" in refused("--resume", str(one)) for one in (other, run / "checkpoints/checkpoint-2"))
    both = SimpleNamespace(run_dir=run, resume=other, auto_resume=True)  # as a job that was put back into the queue
    assert find(both) == later
    shutil.rmtree(later)
    assert "is part of" in refused("--overwrite", "--version", str(run / "ckpt_model"))
    assert "is part of" in refused("--overwrite", "--model_weights", str(run / "ckpt_model"))
    train(tiny_version, shapes, run.parent, "run", "--max_steps", "1", "--no_eval", "--overwrite")
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-1"]
    assert [line["step"] for line in history(run)] == [1]


def test_a_run_that_only_validated_is_started_anew(tmp_path):
    """As one that a cluster ended before its first checkpoint, and put back into the queue."""
    (tmp_path / "validation/step_1").mkdir(parents=True)
    flags = dict.fromkeys(("resume", "overwrite", "version", "model_weights"))
    assert find(SimpleNamespace(run_dir=tmp_path, auto_resume=True, **flags)) is None


def test_a_finished_run_is_not_merged_again(run, tiny_version, shapes):
    """Its weights would be others by their id, and what was evaluated would be lost."""
    before = (run / "ckpt_model/config.json").read_text()
    train(tiny_version, shapes, run.parent, "run", *FLAGS, "--auto_resume")
    assert (run / "ckpt_model/config.json").read_text() == before
    train(tiny_version, shapes, run.parent, "run", *FLAGS, "--max_steps", "3", "--auto_resume")
    assert (run / "ckpt_model/config.json").read_text() != before


def test_a_full_disk_leaves_the_earlier_checkpoint(run, tiny_version, shapes):
    """Files of at most 200 kB, as on a disk that fills up while a checkpoint is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path.relative_to(run) for path in (run / "checkpoints/checkpoint-2").rglob("*")}
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            flags = ("--max_steps", "3", "--no_eval", "--auto_resume", "--report_to", "none")
            train(tiny_version, shapes, run.parent, "run", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-2"]
    assert {path.relative_to(run) for path in (run / "checkpoints/checkpoint-2").rglob("*")} == before


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, 1, 2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_a_run_keeps_its_best_checkpoint(tiny_version, shapes, tmp_path):
    flags = ("--max_steps", "3", "--save_steps", "3", "--eval_steps", "2", "--report_to", "none")
    flags += ("--val_dataset", "refcoco|unc|val", "--keep_best", "refcoco|unc|val")
    (own := tmp_path / "run/checkpoints/mine.txt").parent.mkdir(parents=True)
    own.touch()
    train(tiny_version, shapes, tmp_path, "run", *flags)
    assert own.is_file()  # no flag said --overwrite
    names = [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    log, figure = list(read_records(tmp_path / "run" / "log.jsonl")), "eval_refcoco|unc|val_ciou"
    best = max((line for line in log if figure in line), key=lambda line: line[figure])["step"]
    assert names == [f"checkpoint-{step}" for step in sorted({best, 3})]


HOLDER = """
import sys, time
from pathlib import Path
from self1e.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_training_is_kept_out_of_the_folder(tmp_path):
    """Before the first checkpoint nothing else would tell the two apart, and each would remove the other's files."""
    run = tmp_path / "run"
    holder = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(holder, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is at work"), alone_in(run, patience=0.1):
            pass
        first.kill()
    with alone_in(run):  # the lock of a killed process is free
        pass
