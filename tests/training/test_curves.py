"""The curves of a run: what they take from its log and its validations, and that the picture is one."""

import io
import json

import numpy as np
from helpers import read_json
from matplotlib.figure import Figure
from PIL import Image

from self1e.training.curves import draw_curves, series, write_curves
from self1e.training.healthy import HealthyCurves

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


def test_the_validations_of_a_continued_run_are_all_there(tmp_path):
    """The log of a checkpoint lacks the validation of its step, and a step after the end belongs to an earlier try."""
    for step, value in {1: 0.1, 2: 0.2, 3: 0.3}.items():
        folder = tmp_path / f"validation/step_{step}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"ReasonSeg|val": {"giou": value, "ciou": value / 2, "n": 5}}))
    write_curves(HISTORY, tmp_path, recipe={"lr": 1e-4}, seed=3, healthy=None)
    written = read_json(tmp_path / "curves.json")
    assert (written["recipe"], written["seed"]) == ({"lr": 1e-4}, 3)
    assert written["curves"]["mask_bce"] == {"steps": [1, 2], "values": [1.0, 0.5]}
    assert written["curves"]["eval_ReasonSeg|val_ciou"] == {"steps": [1, 2], "values": [0.05, 0.1]}
    assert "lr_llm" not in written["curves"] and Image.open(tmp_path / "curves.png").format == "PNG"


def test_healthy_runs_lie_behind_the_figures_that_they_have(tmp_path):
    pictures = {}
    for name in ("none", "loss", "eval_refcoco|unc|val_giou"):  # the run has the loss alone
        band = {"steps": [1, 2], "values": [[3.5, 1.75], [2.5, 1.25]]}
        (tmp_path / "healthy.json").write_text(json.dumps({"recipe": {}, "seeds": [0, 1], "curves": {name: band}}))
        draw_curves(HISTORY, tmp_path / "curves.png", HealthyCurves(tmp_path / "healthy.json"))
        pictures[name] = (tmp_path / "curves.png").read_bytes()
    draw_curves(HISTORY, tmp_path / "curves.png")
    assert pictures["none"] == pictures["eval_refcoco|unc|val_giou"] == (tmp_path / "curves.png").read_bytes()
    pixels = (
        np.asarray(Image.open(tmp_path / "curves.png"), int),
        np.asarray(Image.open(io.BytesIO(pictures["loss"])), int),
    )
    assert np.abs(pixels[0] - pixels[1])[:, :600].any(2).mean() > 0.02


def test_ticks_are_plain_numbers_and_whole_steps(monkeypatch, tmp_path):
    labels, save = {"x": [], "y": []}, Figure.savefig

    def savefig(figure, *args, **options):
        save(figure, *args, **options)
        for axes in figure.axes:
            labels["x"] += [label.get_text() for label in axes.get_xticklabels()]
            labels["y"] += [label.get_text() for label in axes.get_yticklabels(which="both")]

    monkeypatch.setattr(Figure, "savefig", savefig)
    draw_curves([{"step": step, "loss": 3.3 / step} for step in (1, 2, 3, 8)], tmp_path / "curves.png")
    draw_curves([{"step": 7, "loss": 1.0}], tmp_path / "point.png")
    assert "7" in labels["x"] and all(label.isdigit() for label in labels["x"] if label)
    assert {"0.6", "2"} <= {*labels["y"]} and not [label for label in labels["y"] if "e" in label]
