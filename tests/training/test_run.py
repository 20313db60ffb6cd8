"""Training end to end on tiny models and drawn scenes, in this process."""

import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image
from runs import curves, history, pictures, train

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.splits import load_split
from self1e.evaluation.segmentation.metrics import Unit, read_units
from self1e.evaluation.segmentation.report import unit_drawer
from self1e.training import run as program
from self1e.training import trainer as trainer_module
from self1e.training.checkpoint import checkpoints_in
from self1e.training.trainer import Self1ETrainer

COMMON = "refer_seg/images/mscoco/images/train2014"


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


def test_tensorboard_holds_the_worst_the_median_and_the_best_of_each_validation(reference, shapes):
    found = pictures(reference[0])
    assert found.keys() == {f"ReasonSeg|val/{kind}" for kind in ("worst", "median", "best")}
    split = load_split("ReasonSeg|val", shapes / "dataset")
    for place, step in enumerate((2, 4)):
        units = read_units(reference[0] / f"validation/step_{step}/ReasonSeg_val.jsonl")
        overlap = sorted(unit.iou for unit in units)
        for kind, value in {"worst": overlap[0], "median": overlap[len(units) // 2], "best": overlap[-1]}.items():
            logged, picture = found[f"ReasonSeg|val/{kind}"][place]
            assert logged == step and picture.width == 900
            assert shown(picture, split, units).iou == value


def shown(picture: Image.Image, split, units) -> Unit:
    """The unit that a picture shows."""
    draw = unit_drawer(split, units, width=900)
    drawn = [np.asarray(draw(index)) for index in range(len(units))]
    return next(unit for unit, pixels in zip(units, drawn) if np.array_equal(pixels, np.asarray(picture)))


def test_a_run_reads_well(reference):
    printed = reference[1]
    for text in (
        "segmentation head",
        "trained      adapters        frozen",
        "steps of 2 photos x 2 micro-batches x 1 rank\n",
    ):
        assert text in printed
    assert "step 4  epoch " in printed and "starting anew" in printed
    assert [line for line in printed.splitlines() if "skipped" in line and "grefcoco|unc|val" in line]
    assert not [line for line in printed.splitlines() if "warning" in line.lower() or "Traceback" in line]


def test_a_run_leaves_what_it_should(reference):
    folder = reference[0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert {path.name for path in (folder / "validation").iterdir()} == {"step_2", "step_4"}
    evaluated = {path.stem for path in (folder / "eval").glob("*.jsonl")}
    assert evaluated == {"ReasonSeg_val", "ReasonSeg_test", *(f"refcoco_unc_{s}" for s in ("val", "testA", "testB"))}
    figures = json.loads((folder / "eval" / "refcoco_unc_val.json").read_text())
    assert {"giou", "ciou", "n"} <= set(figures)
    assert Image.open(folder / "curves.png").width > 500


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
    expected |= {"loss_weights": {"ce": 0.25, "mask_bce": 3.0, "mask_dice": 0.0}}
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
    compute_loss = Self1ETrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        read.append(inputs["ids"])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Self1ETrainer, "compute_loss", note)
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
        train(tiny_version, damaged, runs, "excluded", "--max_steps", "1", "--no_eval", "--overwrite", *flags)
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
    assert re.search(r"replaced \d+ broken samples?:", printed) and "x refcoco/COCO_train2014_" in printed
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


def test_the_trained_model_is_gone_before_the_evaluation_loads_its_own(tiny_version, shapes, runs, monkeypatch):
    load, model, weights, alive = program.load_model, [], [], []

    def watched(args, *, training):
        loaded = load(args, training=training)
        model.append(ref(loaded))
        weights.extend(ref(parameter.untyped_storage()) for parameter in loaded.parameters())
        return loaded

    monkeypatch.setattr(program, "load_model", watched)
    monkeypatch.setattr(
        program, "evaluate", lambda *args, **kwargs: alive.append([x for x in (*model, *weights) if x() is not None])
    )
    train(tiny_version, shapes, runs, "freed", "--max_steps", "1", "--save_steps", "1", "--report_to", "none")
    assert len(weights) > 50 and alive == [[]]
