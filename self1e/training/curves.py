"""The picture of a training run that stands beside its `ckpt_model`: losses, learning rates, validation."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from self1e.files import replacing

TERMS = {"loss": "total", "ce": "cross-entropy", "mask_bce": "mask BCE", "mask_dice": "mask Dice"}


def series(history: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (steps, values) of every figure of `names` that a Trainer's log holds."""
    lines = {name: [line for line in history if name in line] for name in names}
    return {name: ([x["step"] for x in found], [x[name] for x in found]) for name, found in lines.items() if found}


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a Trainer's log (`state.log_history`) to a PNG.

    One panel each for the losses, the learning rates and, where the run validated, gIoU and cIoU of its splits.
    """
    from matplotlib.figure import Figure  # half a second that no other command should wait for

    logged = dict.fromkeys(name for line in history for name in line)
    scores = [name for name in logged if name.startswith("eval_") and name.endswith(("_giou", "_ciou"))]
    rates = [name for name in logged if name.startswith("lr_")]
    panels = {"loss": TERMS, "learning rate": rates, "validation": scores}
    drawn = {title: found for title, names in panels.items() if (found := series(history, names))}
    figure = Figure(figsize=(5 * len(drawn), 3.6), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()):
        for name, (steps, values) in found.items():
            label = TERMS.get(name, name.removeprefix("lr_").removeprefix("eval_").replace("_", " "))
            axes.plot(steps, values, label=label, marker="." if len(steps) < 30 else None)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
