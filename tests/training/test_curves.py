"""The curves of a run: its log, its lines on the terminal, and the picture."""

import numpy as np
from PIL import Image

from self1e.files import read_records
from self1e.training.curves import draw_curves, log_line

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
    assert list(read_records(tmp_path / "log.jsonl")) == [{"step": 1}]


def test_log_lines_fit_a_terminal():
    figures = {"step": 12345, "epoch": 0.07407, "loss": 9.24551, "lr_llm": 1e-6, "eval_ReasonSeg|val_giou": 0.5}
    line = "step 12345  epoch 0.07407  loss 9.246  lr_llm 1e-06  eval_ReasonSeg|val_giou 0.5"
    assert log_line(figures) == line
