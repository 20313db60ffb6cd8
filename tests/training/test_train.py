"""Training end to end on tiny models and drawn scenes, in this process."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch
from helpers import ROOT, read_json
from PIL import Image
from runs import command, events, history, train

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.convert import convert
from self1e.model.config import LOSS_WEIGHTS, SWITCHES
from self1e.training import loop
from self1e.training import train as program
from self1e.training.checkpoints import checkpoints_in

PHOTOS = "dataset/refer_seg/images/mscoco/images/train2014"
ALONE = ("--dataset", "refer_seg", "--refer_seg_data", "refcoco", "--no_eval")


def test_a_run_logs_every_curve(reference):
    folder, printed = reference
    logged = events(folder)
    terms = {name: np.array(logged[f"train/{name}"]) for name in LOSS_WEIGHTS}
    assert all(len(values) == 4 and np.isfinite(values).all() and (values > 0).all() for values in terms.values())
    total = sum(LOSS_WEIGHTS[name] * values for name, values in terms.items())
    np.testing.assert_allclose(logged["train/loss"], total, rtol=1e-4)
    for name in ("grad_norm", "samples_per_second", "waiting_for_data", "peak_memory_gb", "tflops", "utilisation"):
        assert len(logged[f"train/{name}"]) == 4 and min(logged[f"train/{name}"]) > 0
    # after each step: two steps of warm-up to 1e-4, then linearly to 0 at the fourth
    for group in ("llm", "vision_and_head"):
        np.testing.assert_allclose(logged[f"train/lr_{group}"], [5e-5, 1e-4, 5e-5, 0], rtol=1e-6, atol=1e-12)
    assert len(logged["eval/ReasonSeg|val_giou"]) == len(logged["eval/ReasonSeg|val_ciou"]) == 2
    assert [line["step"] for line in history(folder)] == [1, 2, 3, 4]
    assert (
        "step 4  epoch " in printed
        and "waiting_for_data " in printed
        and "\x1b" not in printed
        and "\r" not in printed
    )


def test_a_run_leaves_what_it_should(reference):
    folder, printed = reference
    assert "steps of 2 x 2 x 1 photos (batch x micro-batches x ranks)\n" in printed and "Traceback" not in printed
    assert f"\nevaluating {folder / 'ckpt_model'} on ReasonSeg|val" in printed and "trained for " in printed
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert {path.name for path in (folder / "validation").iterdir()} == {"step_2", "step_4"}
    evaluated = {path.stem for path in (folder / "eval").glob("*.jsonl")}
    assert evaluated == {"ReasonSeg_val", "ReasonSeg_test", *(f"refcoco_unc_{s}" for s in ("val", "testA", "testB"))}
    assert {"giou", "ciou", "n"} <= read_json(folder / "eval" / "refcoco_unc_val.json").keys()
    assert Image.open(folder / "curves.png").width > 500


def test_the_saved_model_loads_by_itself_and_over_its_base(reference, tiny_version):
    saved = reference[0] / "ckpt_model"
    model = Self1EForSegmentation.from_pretrained(saved)
    assert model.trained_head and not any(".lora_" in name for name, _ in model.named_parameters())
    assert Self1EProcessor.from_pretrained(saved).seg_token_id == model.config.seg_token_id
    other = Self1EForSegmentation.from_pretrained(tiny_version, weights=f"{saved}_published")
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(ours, theirs), name
    base = Self1EForSegmentation.from_pretrained(tiny_version).state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, base[name])}
    assert any("self_attn.q_proj" in name for name in moved) and any("attention.q_proj" in name for name in moved)
    assert "model.language_model.norm.weight" not in moved


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
    switches = {"mask_features": "rfr", "replication": "window", "attention_pathway": "image"}
    flags = [word for name, value in switches.items() for word in (f"--{name}", value)] + ["--no-auxiliary_loss"]
    flags += ["--ce_loss_weight", "0.25", "--bce_loss_weight", "3", "--dice_loss_weight", "0", "--precision", "bf16"]
    flags += ["--lr", "1e-3", "--vision_lr", "3e-3", "--beta2", "0.9"]
    line = first_step(tiny_version, shapes, runs, "switched", *flags)
    config = Self1EForSegmentation.from_pretrained(runs / "switched" / "ckpt_model").config
    assert {name: getattr(config, name) for name in switches} == switches and config.auxiliary_loss is False
    weights = LOSS_WEIGHTS | {"ce": 0.25, "mask_bce": 3, "mask_dice": 0}
    assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in weights), rel=1e-4)
    assert (line["lr_llm"], line["lr_vision_and_head"]) == pytest.approx((5e-4, 1.5e-3))
    # bf16 keeps 8 bits: the text's loss is that of fp32 to about 1%, and not the same number
    fp32 = history(reference[0])[0]["ce"]
    assert line["ce"] == pytest.approx(fp32, rel=0.02) and line["ce"] != fp32
    state = torch.load(checkpoints_in(runs / "switched" / "checkpoints")[-1] / "state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.9)] * 2 and not any(g["weight_decay"] for g in groups)
    first_step(runs / "switched" / "ckpt_model", shapes, runs, "follows")  # what no flag says is the checkpoint's
    follows = Self1EForSegmentation.from_pretrained(runs / "follows" / "ckpt_model").config
    assert all(getattr(follows, name) == getattr(config, name) for name in (*SWITCHES, "loss_weights"))


def test_gradients_are_clipped_before_the_step(tiny_version, shapes, runs, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    line = first_step(tiny_version, shapes, runs, "clipped")
    assert line["grad_norm"] > 1 and norms == [pytest.approx(1, rel=1e-4)]  # the norm is summed in fp32


def test_micro_batches_of_a_step_are_counted_at_an_epochs_end(monkeypatch):
    """Seven of an epoch in steps of three: the last step has one, and the next epoch begins with three."""
    monkeypatch.setattr(loop, "make_loader", lambda stream, plan, **_: plan)
    mixture = SimpleNamespace(micro_batches=lambda epoch, **_: [(epoch, k) for k in range(7)])
    args = SimpleNamespace(grad_accumulation_steps=3, start_epoch=0, workers=0, timeout=0)
    batches = loop.micro_batches(SimpleNamespace(mixture=mixture), args, step=1, per_epoch=3)
    found = list(islice(batches, 5))
    assert [members for _, members, _ in found] == [3, 3, 3, 1, 3]
    assert [batch for batch, _, last in found if last] == [(0, 5), (0, 6)]


def test_epochs_and_their_limits_choose_the_stream(tiny_version, shapes, runs, monkeypatch):
    read: list[list[str]] = []
    monkeypatch.setattr(loop, "note", lambda path, ids: read.append(ids))
    short = ("--epochs", "2", "--steps_per_epoch", "1", "--no_eval")
    train(tiny_version, shapes, runs, "two_epochs", *short, "--workers", "2")
    both, read[:] = list(read), []
    train(tiny_version, shapes, runs, "second_epoch", *short, "--start_epoch", "1")
    assert len(both) == 4 and both[:2] != both[2:] and read == both[2:]


def test_held_out_photos_can_be_dropped(tiny_version, damaged, runs, capsys):
    # the same photo under a training set's name and in an evaluation split
    refs_file = damaged / "dataset/refer_seg/refcoco/refs(unc).p"
    refs = pickle.loads(refs_file.read_bytes())
    next(ref for ref in refs if ref["split"] == "train")["split"] = "val"
    refs_file.write_bytes(pickle.dumps(refs, protocol=2))
    sizes = []
    for flags in ((), ("--exclude_val",)):
        train(tiny_version, damaged, runs, "excluded", "--max_steps", "1", "--no_eval", "--overwrite", *flags)
        sizes.append({name: int(n) for name, n in re.findall(r"(\w+) (\d+)(?:,|\n)", capsys.readouterr().out)})
    assert sizes[1]["refcoco"] < sizes[0]["refcoco"] and sizes[1]["vqav2"] <= sizes[0]["vqav2"]


def truncate(folder: Path, count: int) -> None:
    for path in sorted(folder.iterdir())[:count]:
        os.truncate(path, 200)


def test_broken_photos_are_replaced_and_counted(tiny_version, damaged, runs, capsys, caplog, monkeypatch):
    monkeypatch.setattr(loop, "BROKEN_AFTER", 100_000)
    truncate(damaged / PHOTOS, 4)
    train(tiny_version, damaged, runs, "broken", *ALONE, "--max_steps", "2")
    printed = capsys.readouterr().out
    assert "broken samples replaced:" in printed and "x refcoco/COCO_train2014_" in printed
    assert any("broken sample refcoco/COCO_train2014_" in message for message in caplog.messages)
    assert history(runs / "broken")[-1]["broken_samples"] >= 1


@pytest.mark.parametrize("count", [4, 8], ids=["half", "all"])
def test_more_than_one_percent_broken_stops_with_the_list(tiny_version, damaged, runs, capsys, monkeypatch, count):
    monkeypatch.setattr(loop, "BROKEN_AFTER", 1)
    truncate(damaged / PHOTOS, count)
    train(tiny_version, damaged, runs, "stopped", *ALONE, "--max_steps", "4", "--workers", "1", code=1)
    message = capsys.readouterr().err
    assert "Traceback" not in message and "refcoco/COCO_train2014_" in message and "cannot read" in message
    assert not (runs / "stopped" / "ckpt_model").exists()


def test_a_loss_that_is_not_finite_stops_with_the_samples(tiny_version, shapes, runs, capsys):
    flags = ("--lr", "1e30", "--vision_lr", "1e30", "--warmup_steps", "0", "--max_steps", "4", "--no_eval")
    train(tiny_version, shapes, runs, "nan", *flags, code=1)
    message = capsys.readouterr().err
    assert "the loss is not finite" in message and "ce nan" in message and ".jpg" in message


def test_the_trained_model_is_gone_before_the_evaluation_loads_its_own(tiny_version, shapes, runs, monkeypatch):
    load, weights, alive = program.load_model, [], []

    def watched(*args):
        loaded = load(*args)
        weights.extend(ref(parameter.untyped_storage()) for parameter in loaded.parameters())
        return loaded

    monkeypatch.setattr(program, "load_model", watched)
    monkeypatch.setattr(
        program, "evaluate", lambda *args, **kwargs: alive.append([x for x in weights if x() is not None]) or True
    )
    train(tiny_version, shapes, runs, "freed", "--max_steps", "1", "--save_steps", "1", "--report_to", "none")
    assert len(weights) > 50 and alive == [[]]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens_alone_train_and_continue(tied, tiny_version, make_tiny, shapes, tmp_path):
    version = make_tiny(tie_word_embeddings=True) if tied else tiny_version
    base = Self1EForSegmentation.from_pretrained(version)
    flags = ("--trainable_embeddings", "new", "--freeze_llm", "--no-use_llm_lora", "--max_steps", "2", "--no_eval")
    flags += ("--warmup_steps", "0", "--report_to", "none")
    train(version, shapes, tmp_path, "run", *flags)
    first = Self1EForSegmentation.from_pretrained(tmp_path / "run" / "ckpt_model").state_dict()
    token = base.config.seg_token_id
    for name, before in base.state_dict().items():
        if name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(first[name][:token], before[:token]) and not torch.equal(
                first[name][token], before[token]
            )
        elif "language_model." in name:
            assert torch.equal(first[name], before), name
    assert not torch.equal(first["segmentation_head.f_out.0.weight"], base.segmentation_head.f_out[0].weight)
    convert(str(tmp_path / "run" / "ckpt_model"), tmp_path / "published", "published")

    shutil.rmtree(tmp_path / "run" / "ckpt_model")
    train(version, shapes, tmp_path, "run", *flags, "--auto_resume")  # all steps are done: it loads and saves
    again = Self1EForSegmentation.from_pretrained(tmp_path / "run" / "ckpt_model").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


WRONG = {
    "unknown family": (["--dataset", "sem_seg||pictures"], "--dataset: unknown 'pictures'; known: sem_seg"),
    "short limit for tiles": (["--model_max_length", "40", "--high_res"], "do not fit --model_max_length 40"),
    "late layer": (["--lora_from_layer", "9"], "--lora_from_layer 9"),
    "no checkpoint": (["--resume", "."], "no checkpoint there"),
    "published layout": (["--save_published_layout", "--mask_features", "rfr"], "the full method only"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_message(tiny_version, shapes, runs, capsys, case):
    flags, says = WRONG[case]
    train(tiny_version, shapes, runs, "wrong", "--max_steps", "1", *flags, code=1)
    message = capsys.readouterr().err
    assert says in message and message.strip().startswith("error: ") and len(message.splitlines()) < 40
    assert not (runs / "wrong" / "ckpt_model").exists()


def test_a_data_worker_that_hangs_ends_the_run_and_the_last_samples_are_named(tiny_version, damaged, tmp_path):
    """A named pipe in the place of a photo: whoever opens it waits for a writer that never comes."""
    photo = sorted((damaged / PHOTOS).glob("*.jpg"))[0]
    photo.unlink()
    os.mkfifo(photo)
    flags = [*ALONE, "--max_steps", "500", "--workers", "1", "--timeout", "5", "--report_to", "none"]
    program = [
        sys.executable,
        str(ROOT / "train_hf_ivl_seq.py"),
        *command(tiny_version, damaged, tmp_path, "hangs", *flags),
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "timed out after 5" in done.stderr, done.stderr
    last = (tmp_path / "hangs" / "ranks" / "rank_0.txt").read_text().strip()
    assert f"rank 0, last micro-batch read: {last}" in done.stderr and "refcoco/COCO_train2014_" in last


def test_an_error_in_edited_code_keeps_its_traceback(tiny_version, shapes, tmp_path, monkeypatch):
    def edited(*args, **kwargs):
        raise RuntimeError("a typo")

    monkeypatch.setattr(Self1EForSegmentation, "forward", edited)
    with pytest.raises(RuntimeError, match="a typo") as caught:
        train(tiny_version, shapes, tmp_path, "typo", "--max_steps", "1", "--no_eval", "--report_to", "none")
    assert "last micro-batch read" in caught.value.__notes__[0]


def test_ids_that_are_no_utf_8_are_noted(tmp_path):
    with pytest.raises(RuntimeError) as caught, loop.naming_samples(tmp_path) as notes:
        loop.note(notes, ["ReasonSeg/caf\udce9.jpg"])
        raise RuntimeError
    assert "ReasonSeg/caf" in caught.value.__notes__[0]
