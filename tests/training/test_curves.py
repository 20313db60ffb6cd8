"""The curves of a run: its log, its lines on the terminal, and the picture."""

import numpy as np
from PIL import Image

from self1e.training.curves import draw_curves, log_line, read_log

LOSSES = {"loss": 3.5, "ce": 1.0, "mask_bce": 1.0, "lr_llm": 1e-4, "lr_vision_and_head": 2e-4}
LOG = [
    {"step": 1, **LOSSES},
    {"step": 2, **{name: value / 2 for name, value in LOSSES.items()}},
    {"step": 2, "eval_ReasonSeg|val_giou": 0.5, "eval_ReasonSeg|val_ciou": 0.4},
]


def test_a_run_with_validation_has_a_panel_more(tmp_path):
    sizes = {}
    for name, log in (("all", LOG), ("no_eval", LOG[:2]), ("point", LOG[:1])):
        draw_curves(log, tmp_path / f"{name}.png")
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1
        sizes[name] = picture.size
    assert sizes["all"][0] == 3 / 2 * sizes["no_eval"][0] and sizes["all"][1] == sizes["no_eval"][1]


def test_a_line_that_a_killed_run_left_half_is_none(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}] and read_log(tmp_path / "absent") == []


def test_log_lines_fit_a_terminal():
    figures = {"step": 1, "epoch": 0.074, "loss": 9.2455, "ce": 6.0751, "mask_dice": 1.4887, "grad_norm": 3.276}
    figures |= {"lr_llm": 1e-6, "samples_per_second": 8.1, "waiting_for_data": 0.031, "peak_memory": 12.34e9}
    figures |= {"tflops": 412.345, "utilisation": 0.417}
    assert log_line(figures | {"broken_samples": 2}) == (
        "step 1  epoch 0.074  loss 9.2455 (ce 6.0751, mask_dice 1.4887)  grad norm 3.276  lr llm 1.00e-06  "
        "8.1 samples/s  waiting 3%  412 TFLOP/s (42%)  peak 12.3 GB  broken samples 2"
    )
    scores = {"step": 2, "epoch": 1.0, "eval_ReasonSeg|val_giou": 0.5, "eval_ReasonSeg|val_ciou": 0.25}
    assert log_line(scores) == ("step 2  epoch 1.000  validation:  ReasonSeg|val_giou 50.0%  ReasonSeg|val_ciou 25.0%")
