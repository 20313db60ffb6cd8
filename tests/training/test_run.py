"""Training end to end on tiny models and drawn scenes: in this process, and as two under the deepspeed launcher."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.training import run as program
from self1e.training import trainer as trainer_module
from self1e.training.trainer import Self1ETrainer, checkpoints_in

LAUNCHER = Path(sys.executable).with_name("deepspeed")
BOUND = ["--batch_size", "2", "--grad_accumulation_steps", "2", "--lora_r", "4", "--use_llm_lora", "--optimize_vision"]
BOUND += ["--use_vision_lora", "--precision", "fp32", "--print_freq", "1", "--warmup_steps", "2", "--workers", "0"]
COMMON = "refer_seg/images/mscoco/images/train2014"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = make_shapes_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=2, size=64)
    for split in ("refcoco+", "refcocog", "grefcoco"):  # not selected below; final evaluation is to skip them
        shutil.rmtree(root / "dataset" / "refer_seg" / split)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def damaged(shapes, tmp_path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / "damaged"))


def command(version: Path, shapes: Path, runs: Path, name: str, *flags: str) -> list[str]:
    paths = {"version": version, "dataset_dir": shapes / "dataset", "data_dir": shapes / "data", "log_base_dir": runs}
    sets = ["--refer_seg_data", "refclef||refcoco", "--sem_seg_data", "ade20k||cocostuff"]
    return [*(f"--{key}={value}" for key, value in paths.items()), *BOUND, *sets, "--exp_name", name, *flags]


def train(*args: str, code: int = 0) -> None:
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    assert program.main(command(*args)) == code


def history(folder: Path) -> list[dict]:
    """The log of the last checkpoint, training lines only."""
    state = json.loads((checkpoints_in(folder / "checkpoints")[-1] / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def curves(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def reference(tiny_version, shapes, runs):
    """An uninterrupted run of four steps through the final evaluation; its folder and what it printed."""
    flags = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--save_published_layout"]
    script = [sys.executable, str(ROOT / "train_hf_ivl_seq.py")]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*script, *command(tiny_version, shapes, runs, "reference", *flags)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "reference", done.stdout + done.stderr


def test_a_run_logs_every_curve(reference):
    logged = curves(reference[0])
    for name in ("loss", "ce", "mask_bce", "mask_dice", "grad_norm", "samples_per_second"):
        values = logged[f"train/{name}"]
        assert len(values) == 4 and all(np.isfinite(values)) and min(values) > 0
    total = (
        np.array(logged["train/ce"])
        + 2 * np.array(logged["train/mask_bce"])
        + 0.5 * np.array(logged["train/mask_dice"])
    )
    np.testing.assert_allclose(logged["train/loss"], total, rtol=1e-4)  # weights 1, 2 and 0.5
    # after each step: two steps of warm-up to 1e-4, then linearly to 0 at the fourth
    for group in ("llm", "vision_and_head"):
        np.testing.assert_allclose(logged[f"train/lr_{group}"], [5e-5, 1e-4, 5e-5, 0], rtol=1e-6, atol=1e-12)
    assert len(logged["eval/ReasonSeg|val_giou"]) == len(logged["eval/ReasonSeg|val_ciou"]) == 2


def test_a_run_reads_well(reference):
    printed = reference[1]
    for text in (
        "segmentation head",
        "trained      adapters        frozen",
        "steps of 2 photos x 2 micro-batches x 1 ranks",
    ):
        assert text in printed
    assert "step 4  epoch " in printed and "skipped grefcoco|unc|val" in printed and "starting anew" in printed
    assert not [line for line in printed.splitlines() if "warning" in line.lower() or "Traceback" in line]


def test_a_run_leaves_what_it_should(reference):
    folder = reference[0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert {path.name for path in (folder / "validation").iterdir()} == {"step_2", "step_4"}
    evaluated = {path.stem for path in (folder / "eval").glob("*.jsonl")}
    assert evaluated == {"ReasonSeg_val", "ReasonSeg_test", *(f"refcoco_unc_{s}" for s in ("val", "testA", "testB"))}
    figures = json.loads((folder / "eval" / "refcoco_unc_val.json").read_text())
    assert {"giou", "ciou", "n"} <= set(figures)


def test_the_saved_model_loads_by_itself_and_over_its_base(reference, tiny_version):
    saved = reference[0] / "ckpt_model"
    model = Self1EForSegmentation.from_pretrained(saved)
    assert model.trained_head and not any(".lora_" in name for name, _ in model.named_parameters())
    processor = Self1EProcessor.from_pretrained(saved)
    assert processor.seg_token_id == model.config.seg_token_id
    other = Self1EForSegmentation.from_pretrained(tiny_version, weights=f"{saved}_published")
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(ours, theirs), name
    base = Self1EForSegmentation.from_pretrained(tiny_version).state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base[name])}
    assert any("self_attn.q_proj" in name for name in moved) and any("attention.q_proj" in name for name in moved)
    assert "model.language_model.norm.weight" not in moved


@pytest.fixture(scope="module")
def interrupted(reference, tiny_version, shapes, runs):
    """The same run, stopped by Ctrl-C within its third step, then continued."""
    check, calls = Self1ETrainer.check, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        check(self, *args)

    flags = ("--max_steps", "4", "--save_steps", "2", "--no_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Self1ETrainer, "check", stop)
        train(tiny_version, shapes, runs, "interrupted", *flags, code=130)
    assert [path.name for path in checkpoints_in(runs / "interrupted" / "checkpoints")] == ["checkpoint-2"]
    train(tiny_version, shapes, runs, "interrupted", *flags, "--auto_resume")
    return runs / "interrupted"


def test_a_continued_run_repeats_the_uninterrupted_one(reference, interrupted):
    whole, parts = history(reference[0]), history(interrupted)
    for name in ("loss", "ce", "mask_bce", "mask_dice", "grad_norm", "lr_llm"):
        # the same sums in the same order; only threads may round differently
        np.testing.assert_allclose([x[name] for x in parts], [x[name] for x in whole], rtol=1e-5, err_msg=name)
    models = [Self1EForSegmentation.from_pretrained(x / "ckpt_model") for x in (reference[0], interrupted)]
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_continuing_a_finished_run_only_saves(interrupted, tiny_version, shapes, runs):
    shutil.rmtree(interrupted / "ckpt_model")
    train(
        tiny_version,
        shapes,
        runs,
        "interrupted",
        "--max_steps",
        "4",
        "--save_steps",
        "2",
        "--no_eval",
        "--auto_resume",
    )
    assert (interrupted / "ckpt_model" / "config.json").is_file()
    assert [path.name for path in checkpoints_in(interrupted / "checkpoints")] == ["checkpoint-4"]


def first_step(tiny_version, shapes, folder, name, *flags) -> dict:
    train(tiny_version, shapes, folder, name, "--max_steps", "1", "--no_eval", *flags)
    return history(folder / name)[0]


def test_sum_and_mean_differ_by_the_number_of_micro_batches(reference, tiny_version, shapes, runs):
    total = history(reference[0])[0]
    flags = ("--grad_accumulation_reduction", "mean", "--gradient_checkpointing")
    mean = first_step(tiny_version, shapes, runs, "mean", *flags)
    assert mean["loss"] == pytest.approx(total["loss"], rel=1e-5)  # nor does recomputation change it
    assert total["grad_norm"] == pytest.approx(2 * mean["grad_norm"], rel=1e-4)  # fp32 sums in another order


def test_flags_reach_model_and_optimizer(reference, tiny_version, shapes, runs):
    flags = [
        "--mask_features",
        "rfr",
        "--replication",
        "window",
        "--attention_pathway",
        "image",
        "--no-auxiliary_loss",
    ]
    flags += ["--ce_loss_weight", "0.25", "--bce_loss_weight", "3", "--dice_loss_weight", "0", "--precision", "bf16"]
    flags += ["--lr", "1e-3", "--vision_lr", "3e-3", "--beta2", "0.9"]
    line = first_step(tiny_version, shapes, runs, "switched", *flags)
    config = json.loads((runs / "switched" / "ckpt_model" / "config.json").read_text())
    expected = {"mask_features": "rfr", "replication": "window", "attention_pathway": "image", "auxiliary_loss": False}
    expected |= {"ce_loss_weight": 0.25, "bce_loss_weight": 3.0, "dice_loss_weight": 0.0}
    assert {name: config[name] for name in expected} == expected
    assert line["loss"] == pytest.approx(0.25 * line["ce"] + 3 * line["mask_bce"], rel=1e-4)
    assert (line["lr_llm"], line["lr_vision_and_head"]) == pytest.approx((5e-4, 1.5e-3))
    # bf16 keeps 8 bits: the text's loss is that of fp32 to about 1%, and not the same number
    assert (
        line["ce"] == pytest.approx(history(reference[0])[0]["ce"], rel=0.02)
        and line["ce"] != history(reference[0])[0]["ce"]
    )
    checkpoint = checkpoints_in(runs / "switched" / "checkpoints")[-1]
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.9)] * 2 and not any(g["weight_decay"] for g in groups)


def test_epochs_and_their_limits_choose_the_stream(tiny_version, shapes, runs, monkeypatch):
    read = []
    check = Self1ETrainer.check
    monkeypatch.setattr(Self1ETrainer, "check", lambda self, ids, losses: (read.append(ids), check(self, ids, losses)))
    short = ("--epochs", "2", "--steps_per_epoch", "1", "--no_eval")
    train(tiny_version, shapes, runs, "two_epochs", *short, "--workers", "2")
    both, read[:] = list(read), []
    train(tiny_version, shapes, runs, "second_epoch", *short, "--start_epoch", "1")
    assert len(both) == 4 and both[:2] != both[2:] and read == both[2:]


def test_held_out_photos_can_be_dropped(tiny_version, damaged, runs, capsys):
    # the same photo under a training set's name and in an evaluation split
    root = damaged / "dataset" / "refer_seg"
    refs = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    next(ref for ref in refs if ref["split"] == "train")["split"] = "val"
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    sizes = []
    for flags in ((), ("--exclude_val",)):
        train(tiny_version, damaged, runs, "excluded", "--max_steps", "1", "--no_eval", *flags)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("samples on disk"))
        sizes.append({part.rsplit(" ", 1)[0]: int(part.rsplit(" ", 1)[1]) for part in line.split(": ")[1].split(", ")})
    assert sizes[1]["refcoco"] < sizes[0]["refcoco"] and sizes[1]["vqav2"] <= sizes[0]["vqav2"]


def truncate(folder: Path, count: int) -> None:
    for path in sorted(folder.iterdir())[:count]:
        os.truncate(path, 200)


def test_broken_photos_are_replaced_and_counted(tiny_version, damaged, runs, capsys, caplog, monkeypatch):
    monkeypatch.setattr(trainer_module, "BROKEN_AFTER", 100_000)
    truncate(damaged / "dataset" / COMMON, 4)
    flags = ("--dataset", "refer_seg", "--refer_seg_data", "refcoco", "--max_steps", "2", "--no_eval")
    train(tiny_version, damaged, runs, "broken", *flags)
    printed = capsys.readouterr().out
    assert "broken samples were replaced:" in printed and "x refcoco/COCO_train2014_" in printed
    assert any("broken sample refcoco/COCO_train2014_" in message for message in caplog.messages)
    assert history(runs / "broken")[-1]["broken_samples"] >= 1


@pytest.mark.parametrize("count", [4, 8], ids=["half", "all"])
def test_more_than_one_percent_broken_stops_with_the_list(tiny_version, damaged, runs, capsys, monkeypatch, count):
    monkeypatch.setattr(trainer_module, "BROKEN_AFTER", 1)
    truncate(damaged / "dataset" / COMMON, count)
    flags = (
        "--dataset",
        "refer_seg",
        "--refer_seg_data",
        "refcoco",
        "--max_steps",
        "4",
        "--no_eval",
        "--workers",
        "1",
    )
    train(tiny_version, damaged, runs, "stopped", *flags, code=1)
    message = capsys.readouterr().err
    assert "Traceback" not in message and "refcoco/COCO_train2014_" in message and "cannot read" in message
    assert not (runs / "stopped" / "ckpt_model").exists()


def test_a_loss_that_is_not_finite_stops_with_the_samples(tiny_version, shapes, runs, capsys):
    flags = ("--lr", "1e30", "--vision_lr", "1e30", "--warmup_steps", "0", "--max_steps", "4", "--no_eval")
    train(tiny_version, shapes, runs, "nan", *flags, code=1)
    message = capsys.readouterr().err
    assert "the loss is not finite" in message and "ce nan" in message and ".jpg" in message


@pytest.fixture
def small_disk():
    """Files of at most 200 kB, as on a disk that fills up while a checkpoint is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_earlier_checkpoint(interrupted, tiny_version, shapes, tmp_path, small_disk, capsys):
    run = Path(shutil.copytree(interrupted, tmp_path / "full"))
    before = {path.relative_to(run) for path in run.rglob("*") if "tensorboard" not in str(path)}
    small_disk()
    flags = ("--max_steps", "6", "--save_steps", "6", "--no_eval", "--auto_resume", "--report_to", "none")
    train(tiny_version, shapes, tmp_path, "full", *flags, code=1)
    message = capsys.readouterr().err
    assert "checkpoint 6 was not saved" in message and "checkpoint-4 is untouched" in message
    assert {path.relative_to(run) for path in run.rglob("*") if "tensorboard" not in str(path)} == before
    flags = ("--max_steps", "4", "--no_eval", "--auto_resume", "--report_to", "none")
    train(tiny_version, shapes, tmp_path, "full", *flags, code=1)
    assert "ckpt_model: the checkpoint was not saved" in capsys.readouterr().err
    assert {path.relative_to(run) for path in run.rglob("*") if "tensorboard" not in str(path)} == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def write_foreign_config(root: Path) -> Path:
    (root / "llama").mkdir()
    (root / "llama" / "config.json").write_text('{"model_type": "llama"}')
    return root / "llama"


REFCOCO = "dataset/refer_seg/refcoco"
WRONG = {
    "absent version": (lambda root: ["--version", str(root / "nowhere")], "there is no folder"),
    "another architecture": (lambda root: ["--version", str(write_foreign_config(root))], "model_type='llama'"),
    "unknown family": (
        lambda root: ["--dataset", "sem_seg||pictures"],
        "--dataset: unknown 'pictures'; known: sem_seg",
    ),
    "unknown set": (lambda root: ["--refer_seg_data", "refcocox"], "--refer_seg_data: unknown 'refcocox'; known:"),
    "unknown split": (lambda root: ["--val_dataset", "refcoco|unc|dev"], "unknown evaluation split"),
    "rates": (lambda root: ["--sample_rates", "1,2"], "holds 2 rates for the 4"),
    "no number as a rate": (lambda root: ["--sample_rates", "1,1,1,x"], "--sample_rates"),
    "short rows": (lambda root: ["--model_max_length", "20"], "cannot hold 1 tiles"),
    "short rows for tiles": (lambda root: ["--model_max_length", "40", "--high_res"], "cannot hold 4 tiles"),
    "long epoch": (lambda root: ["--steps_per_epoch", "500"], "--steps_per_epoch 500: an epoch has"),
    "explanatory": (lambda root: ["--explanatory", "2"], "--explanatory is 2"),
    "late layer": (lambda root: ["--lora_from_layer", "9"], "--lora_from_layer 9"),
    "foreign linear": (lambda root: ["--lora_target_modules", "wq"], "--lora_target_modules: unknown"),
    "no checkpoint": (lambda root: ["--resume", str(root)], "no checkpoint there"),
    "corrupt pickle": (
        lambda root: (root / REFCOCO / "refs(unc).p").write_bytes(b"garbage"),
        "refs(unc).p is no pickle",
    ),
    "malicious pickle": (
        lambda root: (root / REFCOCO / "refs(unc).p").write_bytes(pickle.dumps(Evil())),
        "it asks for posix.mkdir",
    ),
    "foreign JSON": (lambda root: (root / REFCOCO / "instances.json").write_text('{"a": 1}'), "'images' is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_message(tiny_version, damaged, runs, capsys, monkeypatch, case):
    monkeypatch.chdir(damaged)
    spoil, says = WRONG[case]
    flags = spoil(damaged)
    flags = flags if isinstance(flags, list) else []
    train(tiny_version, damaged, runs, "wrong", "--max_steps", "1", *flags, code=1)
    message = capsys.readouterr().err
    assert says in message and message.strip().startswith("error: ") and len(message.splitlines()) < 40
    assert not (damaged / "pwned").exists() and not (runs / "wrong" / "ckpt_model").exists()


def test_weights_of_another_width_are_listed(tiny_version, make_tiny, shapes, runs, capsys):
    train(tiny_version, shapes, runs, "wrong", "--model_weights", str(make_tiny(width=64)), code=1)
    message = capsys.readouterr().err
    assert "nothing was loaded" in message and "checkpoint (192, 64), model (96, 32)" in message
    assert len(message.splitlines()) < 50


def test_absent_data_is_listed_at_once(tiny_version, damaged, runs, capsys):
    shutil.rmtree(damaged / "dataset" / "refer_seg" / "refcoco")
    shutil.rmtree(damaged / "data" / "gqa")
    shutil.rmtree(damaged / "dataset" / "reason_seg" / "ReasonSeg" / "val")
    train(tiny_version, damaged, runs, "wrong", code=1)
    message = capsys.readouterr().err
    for text in (
        "refcoco/refs(unc).p",
        "refcoco/instances.json",
        "gqa/train_balanced.jsonl",
        "ReasonSeg/val",
        "docs/data.md, section Datasets",
    ):
        assert text in message


# ---------------------------------------------------------------------------------------------- two processes
def launch(*args: str) -> subprocess.Popen:
    """Two CPU processes under the deepspeed launcher, in a process group of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [str(LAUNCHER), "--num_accelerators", "2", f"--master_port={port}", str(ROOT / "train_hf_ivl_seq.py")]
    return subprocess.Popen(
        [*program, *command(*args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def steps(printed: str) -> dict[str, str]:
    """Number of each step -> its loss, terms, gradient norm and learning rates, as printed."""
    return dict(re.findall(r"step (\d+)  epoch \S+  (loss .*?)  [\d.]+ samples/s", printed))


def loss(line: str) -> float:
    return float(line.split()[1])


@pytest.mark.skipif(not LAUNCHER.is_file(), reason="deepspeed is not installed beside this python")
def test_two_processes_survive_a_kill_and_zero3_trains_alike(tiny_version, shapes, runs):
    """Batches of one photo: in a step one rank may hold masks, the other text alone."""
    flags = ("--max_steps", "6", "--save_steps", "2", "--no_eval", "--batch_size", "1", "--gradient_checkpointing")
    flags += ("--dataset", "reason_seg||vqa", "--vqa_data", "llava_instruct_150k||vqav2")
    folder = runs / "killed" / "checkpoints"
    killed, printed = launch(tiny_version, shapes, runs, "killed", *flags), ""
    for line in killed.stdout:
        printed += line
        if "3" in steps(printed):
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"], printed

    resumed = launch(tiny_version, shapes, runs, "killed", *flags, "--auto_resume")
    again = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, again
    assert f"continuing from {folder / 'checkpoint-2'}" in again
    assert list(steps(again)) == ["3", "4", "5", "6"] and steps(again)["3"] == steps(printed)["3"]
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-6"]
    assert Self1EForSegmentation.from_pretrained(runs / "killed" / "ckpt_model").trained_head

    sharded = launch(tiny_version, shapes, runs, "zero3", *flags, "--deepspeed", str(ROOT / "configs" / "zero3.json"))
    third = sharded.communicate(timeout=300)[0]
    assert sharded.returncode == 0, third
    assert [loss(line) for line in steps(third).values()] == pytest.approx(
        [loss(steps(printed)[step]) for step in "12"] + [loss(line) for line in steps(again).values()], rel=1e-3
    )  # sharded sums run in another order
    assert Self1EForSegmentation.from_pretrained(runs / "zero3" / "ckpt_model").trained_head
