"""The picture of a run: what it takes from a log, and that it is one."""

import numpy as np
from PIL import Image

from self1e.training.curves import draw_curves, series

LOSSES = {"loss": 3.5, "ce": 1.0, "mask_bce": 1.0, "mask_dice": 1.0, "lr_llm": 1e-4, "lr_vision_and_head": 2e-4}
HISTORY = [
    {"step": 1, **LOSSES},
    {"step": 2, **{name: value / 2 for name, value in LOSSES.items()}},
    {"step": 2, "eval_ReasonSeg|val_giou": 0.5, "eval_ReasonSeg|val_ciou": 0.4},
    {"step": 2, "train_runtime": 3.0},
]


def test_series_hold_the_steps_at_which_a_figure_was_logged():
    assert series(HISTORY, ["loss", "eval_ReasonSeg|val_giou", "absent"]) == {
        "loss": ([1, 2], [3.5, 1.75]),
        "eval_ReasonSeg|val_giou": ([2], [0.5]),
    }


def test_a_run_with_validation_has_a_panel_more(tmp_path):
    sizes = {}
    for name, history in (("all", HISTORY), ("no_eval", HISTORY[:2])):
        draw_curves(history, tmp_path / f"{name}.png")
        picture = Image.open(tmp_path / f"{name}.png")
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1
        sizes[name] = picture.size
    assert sizes["all"][0] == 3 / 2 * sizes["no_eval"][0] and sizes["all"][1] == sizes["no_eval"][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.png", "no_eval.png"]
