"""A checkpoint is whole or refused, and only its own run continues from it."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, read_json
from numpy.testing import runstring
from runs import history, train

from self1e.files import digest
from self1e.training import checkpoint as module
from self1e.training.checkpoint import (
    check_resumable,
    check_unused,
    checkpoints_in,
    choose,
    faults,
    prune,
    remember_best,
)

FLAGS = ("--max_steps", "4", "--save_steps", "2", "--no_eval", "--report_to", "none")


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    """A copy of a run with one whole checkpoint, 4."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "flipped": (flip, "other bytes"),
    "cut": (cut, "bytes instead of"),
    "zeroed": (zero, "other bytes"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "rng_state.pth", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_told(run, kind, name):
    spoil, says = DAMAGE[kind]
    folder = run / "checkpoints" / "checkpoint-4"
    assert faults(folder) == []
    spoil(folder / name)
    (problem,) = faults(folder)
    assert problem.startswith(name) and says in problem


@pytest.mark.parametrize("kind", ["cut", "zeroed", "missing"])
def test_a_checkpoint_without_a_sound_manifest_is_told(run, kind):
    DAMAGE[kind][0](run / "checkpoints" / "checkpoint-4" / "manifest.json")
    (problem,) = faults(run / "checkpoints" / "checkpoint-4")
    assert problem.startswith("manifest.json")


FORGED = {
    "{}": "manifest.json does not name settings.json",
    '{"settings.json": 5}': "settings.json has no size and sum",
    '{"settings.json": {"bytes": "7", "sha256": 1}}': "settings.json has no size and sum",
}


@pytest.mark.parametrize("text", FORGED)
def test_a_manifest_that_says_nothing_is_told(run, text):
    (run / "checkpoints/checkpoint-4/manifest.json").write_text(text)
    (problem,) = faults(run / "checkpoints/checkpoint-4")
    assert problem.startswith(FORGED[text])


def test_an_older_whole_checkpoint_is_taken(run, tmp_path):
    folder = run / "checkpoints"
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    zero(folder / "checkpoint-6" / "rng_state.pth")
    said: list[str] = []
    assert choose(checkpoints_in(folder), said.append) == folder / "checkpoint-4"
    assert "checkpoint-6: rng_state.pth holds other bytes" in said[0]
    cut(folder / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(ValueError, match="no checkpoint is whole.*--overwrite"):
        choose(checkpoints_in(folder), said.append)


OTHER = {
    "seed": ["--seed", "7"],
    "batch_size": ["--batch_size", "3"],
    "lr": ["--lr", "3e-4"],
    "samples": ["--refer_seg_data", "refcoco"],
    "lora_r": ["--lora_r", "8"],
    "mask_features": ["--mask_features", "rfr"],
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_by_name(run, tiny_version, shapes, capsys, name):
    train(tiny_version, shapes, run.parent, "run", *FLAGS, *OTHER[name], "--auto_resume", code=1)
    message = capsys.readouterr().err
    assert "has other settings" in message and f"  {name}: " in message and "Traceback" not in message
    if name in ("lora_r", "mask_features"):
        train(
            tiny_version, shapes, run.parent, "run", *FLAGS, *OTHER[name], "--auto_resume", "--resume_anyway", code=1
        )
        assert f"  {name}: " in capsys.readouterr().err


def test_other_data_of_the_same_size_is_refused_and_a_copy_is_taken(run, tiny_version, shapes, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy, copy_function=shutil.copyfile)
    flags = ("--no_eval", "--report_to", "none", "--auto_resume", "--max_steps")
    train(tiny_version, copy, run.parent, "run", *flags, "5")
    assert "continuing from" in capsys.readouterr().out
    refs = copy / "dataset/refer_seg/refcoco/refs(unc).p"
    records = pickle.loads(refs.read_bytes())
    records[0]["sentences"][0]["sent"] = "another sentence"
    refs.write_bytes(pickle.dumps(records, protocol=2))
    train(tiny_version, copy, run.parent, "run", *flags, "6", code=1)
    (line,) = capsys.readouterr().err.splitlines()[2:]
    assert re.fullmatch(r"  data: \{'refcoco': '\w{16}'\} then, \{'refcoco': '\w{16}'\} now", line), line
    train(tiny_version, copy, run.parent, "run", *flags, "6", "--resume_anyway")


@pytest.mark.parametrize(("name", "now"), [("ranks", 2), ("zero_stage", 3)])
@pytest.mark.parametrize("anyway", [False, True])
def test_another_number_of_ranks_is_refused_before_anything_loads(run, name, now, anyway):
    """DeepSpeed's own refusal would be a traceback, after minutes of loading."""
    folder = run / "checkpoints" / "checkpoint-4"
    settings = read_json(folder / "settings.json")
    with pytest.raises(ValueError) as refusal:
        check_resumable(folder, settings | {name: now}, max_steps=None, anyway=anyway)
    assert str(refusal.value) == (
        f"{folder} has other settings; give the same ones, another --exp_name:\n"
        f"  {name}: {settings[name]!r} then, {now} now"
    )


def test_a_switch_that_a_checkpoint_does_not_know_was_off(run):
    folder = run / "checkpoints" / "checkpoint-4"
    settings = read_json(folder / "settings.json")
    assert settings["freeze_llm"] is False
    (folder / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "freeze_llm"}))
    check_resumable(folder, settings, max_steps=None, anyway=False)
    with pytest.raises(ValueError, match="freeze_llm: None then, True now"):
        check_resumable(folder, settings | {"freeze_llm": True}, max_steps=None, anyway=True)


def test_what_may_change_is_taken(run, tiny_version, shapes, capsys):
    """Before, it was saved every two steps, and every step was logged and validated."""
    flags = ("--max_steps", "7", "--save_steps", "1", "--save_total_limit", "2", "--print_freq", "7", "--workers", "1")
    flags += ("--val_dataset", "refcoco|unc|val", "--eval_steps", "6", "--report_to", "none", "--auto_resume")
    train(tiny_version, shapes, run.parent, "run", *flags)
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-6", "checkpoint-7"]
    assert [line["step"] for line in history(run)] == [1, 2, 3, 4, 7]
    assert {path.name for path in (run / "validation").iterdir()} == {"step_6", "step_7"}  # the last one always
    train(tiny_version, shapes, run.parent, "run", "--max_steps", "3", "--no_eval", "--auto_resume", code=1)
    assert "checkpoint-7 is beyond --max_steps 3" in capsys.readouterr().err


def test_another_run_goes_on_when_told_to(run, tiny_version, shapes, capsys):
    flags = ("--max_steps", "5", "--seed", "7", "--no_eval", "--report_to", "none", "--auto_resume", "--resume_anyway")
    train(tiny_version, shapes, run.parent, "run", *flags)
    assert "continuing from" in capsys.readouterr().out


def test_an_earlier_run_is_not_trained_over(run, tiny_version, shapes, capsys):
    train(tiny_version, shapes, run.parent, "run", *FLAGS, code=1)
    message = capsys.readouterr().err
    assert "--auto_resume" in message and "--overwrite" in message
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-4"]
    train(tiny_version, shapes, run.parent, "run", "--max_steps", "1", "--no_eval", "--overwrite")
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["checkpoint-1"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_strangers_checkpoint_runs_no_code(run, tiny_version, shapes, capsys, monkeypatch):
    """Even one whose manifest fits."""
    monkeypatch.chdir(run)
    folder = run / "checkpoints" / "checkpoint-4"
    torch.save({"state": Evil()}, folder / "optimizer.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["optimizer.pt"] = digest(folder / "optimizer.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    train(tiny_version, shapes, run.parent, "run", *FLAGS, "--auto_resume", code=1)
    message = capsys.readouterr().err
    assert "would run code" in message and "optimizer.pt asks for posix.mkdir" in message
    assert not (run / "pwned").exists()
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    assert module.code_in(folder) and not (run / "pwned").exists()


class EvilText:
    """By way of a package that checkpoints may name: numpy has a function that runs any text."""

    def __reduce__(self):
        return runstring, ("open('pwned', 'w')", {})


def test_what_a_scan_could_miss_is_refused_too(run, monkeypatch):
    monkeypatch.chdir(run)
    folder = run / "checkpoints" / "checkpoint-4"
    assert module.code_in(folder) == []
    torch.save({"state": EvilText()}, folder / "scheduler.pt")
    assert module.code_in(folder) == ["scheduler.pt asks for numpy.testing._private.utils.runstring"]
    (run / "elsewhere").mkdir()
    (folder / "scheduler.pt").rename(run / "elsewhere/scheduler.pt")
    (folder / "global_step4").symlink_to(run / "elsewhere")
    assert module.code_in(folder) == ["global_step4 is a link"]
    (folder / "global_step4").unlink()
    (folder / "latest").write_text("../../elsewhere")
    assert module.code_in(folder) == ["latest names no folder of the checkpoint"]
    module.load_tensors_only(deepspeed=False)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(run / "elsewhere/scheduler.pt", weights_only=False)  # as DeepSpeed does
    assert not (run / "pwned").exists()


def test_results_and_models_are_not_trained_over(tmp_path):
    (tmp_path / "eval").mkdir()
    check_unused(tmp_path, overwrite=False)
    for name in "eval/summary.json", "ckpt_model/config.json":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="replace it with --overwrite") as refusal:
            check_unused(tmp_path, overwrite=False)
        assert "--auto_resume" not in str(refusal.value)  # there is no checkpoint
        assert (tmp_path / name).exists()
    check_unused(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_auto_resume_does_not_replace_a_finished_model(run, tiny_version, shapes, capsys):
    shutil.rmtree(run / "checkpoints")
    train(tiny_version, shapes, run.parent, "run", *FLAGS, "--auto_resume", code=1)
    assert "holds an earlier run (ckpt_model)" in capsys.readouterr().err


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert remember_best(tmp_path, 1, 0.4) and remember_best(tmp_path, 2, 0.6) and not remember_best(tmp_path, 3, 0.5)
    prune(tmp_path, 1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_a_best_step_whose_checkpoint_was_never_written_is_taken_again(tmp_path):
    """The run was killed between the note and the checkpoint, and validates the step once more."""
    (tmp_path / "checkpoint-1").mkdir()
    assert remember_best(tmp_path, 1, 0.4) and remember_best(tmp_path, 2, 0.6)
    assert remember_best(tmp_path, 2, 0.6)
    (tmp_path / "checkpoint-2").mkdir()
    assert not remember_best(tmp_path, 3, 0.6)


HOLDER = """
import sys, time
from pathlib import Path
from self1e.training.checkpoint import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_training_is_kept_out_of_the_folder(tiny_version, shapes, tmp_path, monkeypatch, capsys):
    """Before the first checkpoint nothing else would tell the two apart, and each would remove the other's files."""
    monkeypatch.setattr(module, "ENDING", 0.1)
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        (run / "tensorboard").mkdir()
        for flags in (FLAGS, (*FLAGS, "--overwrite"), (*FLAGS, "--auto_resume")):
            train(tiny_version, shapes, tmp_path, "run", *flags, code=1)
            assert f"{run}: another training is at work in this folder" in capsys.readouterr().err
        assert (run / "tensorboard").is_dir()
        first.kill()
    with module.alone_in(run):  # the lock of a killed process is free
        pass
    assert [path.name for path in run.iterdir()] == ["tensorboard"]

    def without_locks(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(module.FileLock, "acquire", without_locks)
    with module.alone_in(run):
        assert f"{run}: this file system has no locks" in capsys.readouterr().out


def test_a_run_keeps_what_it_is_told(tiny_version, shapes, tmp_path):
    flags = ("--max_steps", "3", "--save_steps", "1", "--eval_steps", "2", "--report_to", "none")
    flags += ("--save_total_limit", "2", "--val_dataset", "refcoco|unc|val", "--keep_best", "refcoco|unc|val")
    train(tiny_version, shapes, tmp_path, "run", *flags)
    names = [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    assert names == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"] == 2
