"""What is wrong with flags, data or weights is one message before training starts."""

import shutil

import pytest
from runs import train

WRONG = {  # flags, and what the message names
    "absent version": ("--version /nowhere/at/all", "/nowhere/at/all"),
    "unknown family": ("--dataset sem_seg||pictures", "'pictures'"),
    "unknown set": ("--refer_seg_data refcocox", "'refcocox'"),
    "unknown split": ("--val_dataset refcoco|unc|dev", "refcoco|unc|dev"),
    "rates": ("--sample_rates 1,2", "--sample_rates"),
    "short conversations": ("--model_max_length 40 --high_res", "--model_max_length 40"),
    "long epoch": ("--steps_per_epoch 500", "--steps_per_epoch 500"),
    "late layer": ("--lora_from_layer 9", "--lora_from_layer 9"),
    "foreign linear": ("--lora_target_modules wq", "--lora_target_modules"),
    "no checkpoint": ("--resume /nowhere", "--resume /nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_message(tiny_version, shapes, runs, capsys, case):
    flags, names = WRONG[case]
    train(tiny_version, shapes, runs, "wrong", "--max_steps", "1", *flags.split(), code=1)
    message = capsys.readouterr().err
    assert names in message and message.strip().startswith("error: ") and "Traceback" not in message
    assert not (runs / "wrong" / "ckpt_model").exists()


def test_weights_of_another_width_are_listed(tiny_version, make_tiny, shapes, runs, capsys):
    train(tiny_version, shapes, runs, "wrong", "--model_weights", str(make_tiny(width=64)), code=1)
    message = capsys.readouterr().err
    assert "checkpoint (192, 64), model (96, 32)" in message and "Traceback" not in message


def test_absent_data_is_listed_at_once(tiny_version, damaged, runs, capsys):
    shutil.rmtree(damaged / "dataset" / "refer_seg" / "refcoco")
    shutil.rmtree(damaged / "data" / "gqa")
    shutil.rmtree(damaged / "dataset" / "reason_seg" / "ReasonSeg" / "val")
    train(tiny_version, damaged, runs, "wrong", code=1)
    message = capsys.readouterr().err
    assert all(name in message for name in ("refcoco/refs(unc).p", "gqa/train_balanced.jsonl", "ReasonSeg/val"))
