"""What is wrong with flags, data or weights is one message before training starts."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
from runs import train


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
        "is no pickle of plain values",
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
