"""The curves of a training run, beside its `ckpt_model`: numbers in `curves.json`, a picture in `curves.png`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from self1e.files import read_json, replacing, write_json
from self1e.training.healthy import HealthyCurves

TERMS = {"loss": "total", "ce": "cross-entropy", "mask_bce": "mask BCE", "mask_dice": "mask Dice"}
SCORES = ("giou", "ciou")
Log = Sequence[Mapping[str, Any]]  # a Trainer's `state.log_history`: lines with a step and some figures


def series(history: Log, names: Iterable[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (steps, values) of every figure of `names` that a Trainer's log holds."""
    lines = {name: [line for line in history if name in line] for name in names}
    return {name: ([x["step"] for x in found], [x[name] for x in found]) for name, found in lines.items() if found}


def with_validation(history: Log, folder: Path) -> list[Mapping[str, Any]]:
    """A Trainer's log with the validations that lie in `folder` (`step_N/summary.json`) in place of its own.

    A checkpoint is written before the validation of its step, so the log of a continued run lacks that one.
    """
    trained = [line for line in history if not any(name.startswith("eval_") for name in line)]
    last = max((line["step"] for line in trained), default=0)
    files = {int(path.parent.name.removeprefix("step_")): path for path in folder.glob("step_*/summary.json")}
    validated = []
    for step in sorted(step for step in files if step <= last):
        splits = read_json(files[step], dict)
        scores = {f"eval_{split}_{key}": figures[key] for split, figures in splits.items() for key in SCORES}
        validated.append({"step": step, **scores})
    return [*trained, *validated]


def write_curves(
    history: Log, run_dir: Path, *, recipe: Mapping[str, Any], seed: int, healthy: HealthyCurves | None
) -> None:
    """Write `curves.json` and `curves.png` of a finished run to its folder.

    history: the Trainer's log. recipe: see `healthy.recipe_of`. healthy: runs to lay beside in the picture.
    """
    history = with_validation(history, run_dir / "validation")
    found = series(history, [*TERMS, *_scores(history)])
    curves = {name: {"steps": steps, "values": values} for name, (steps, values) in found.items()}
    write_json(run_dir / "curves.json", {"recipe": recipe, "seed": seed, "curves": curves}, indent=None)
    draw_curves(history, run_dir / "curves.png", healthy)


def _logged(history: Log) -> list[str]:
    return list(dict.fromkeys(name for line in history for name in line))


def _scores(history: Log) -> list[str]:
    return [name for name in _logged(history) if name.startswith("eval_") and name.endswith(SCORES)]


def draw_curves(history: Log, path: Path, healthy: HealthyCurves | None = None) -> None:
    """Draw a Trainer's log to a PNG, with the band of healthy runs behind each figure that they have.

    One panel each for the losses, the learning rates and, where the run validated, gIoU and cIoU of its splits.
    """
    from matplotlib.figure import Figure  # half a second that no other command should wait for
    from matplotlib.ticker import LogFormatter, MaxNLocator

    class PlainFormatter(LogFormatter):
        """The library's choice of ticks, as 0.6 and not as 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    rates = [name for name in _logged(history) if name.startswith("lr_")]
    panels = {"loss": TERMS, "learning rate": rates, "validation": _scores(history)}
    drawn = {title: found for title, names in panels.items() if (found := series(history, names))}
    figure = Figure(figsize=(5 * len(drawn), 3.6), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items()):
        banded = False
        for (name, (steps, values)), style in zip(found.items(), cycle(["-", "--"])):  # dashes show what they cover
            label = TERMS.get(name, name.removeprefix("lr_").removeprefix("eval_").replace("_", " "))
            label = label.replace(" giou", " gIoU").replace(" ciou", " cIoU")
            (line,) = axes.plot(steps, values, style, label=label, marker="." if len(steps) < 30 else None)
            band = healthy.band(name) if healthy else None
            if band:
                axes.fill_between(
                    band.steps, band.lowest, band.highest, color=line.get_color(), alpha=0.2, linewidth=0
                )
                banded = True
        if healthy and banded:
            axes.fill_between([], [], [], color="grey", alpha=0.3, label=f"{len(healthy.seeds)} healthy runs")
        if title == "loss" and all(value > 0 for _, values in found.values() for value in values):
            axes.set_yscale("log")  # terms differ tenfold, and so do the first and the last loss
            axes.yaxis.set_major_formatter("{x:g}")  # 0.1 and not a power of ten
            axes.yaxis.set_minor_formatter(PlainFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
