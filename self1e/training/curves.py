"""The curves of a training run: a line per logged step in `log.jsonl`, drawn at the end in `curves.png`."""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from tqdm import tqdm

from self1e.data.samples import EvalImage
from self1e.distributed import is_main
from self1e.evaluation.segmentation.metrics import Unit
from self1e.evaluation.segmentation.report import examples
from self1e.files import replacing, to_jsonl, write_text

# Figures of a log line that are no losses.
OTHER = (
    "step epoch grad_norm samples_per_second waiting_for_data tflops utilisation peak_memory broken_samples"
).split()


class Record:
    """What a run says while it trains: its lines on the terminal, `log.jsonl`, and TensorBoard or W&B."""

    def __init__(self, args: Namespace, accelerator: Accelerator, per_epoch: int):  # steps of an epoch
        self.args, self.accelerator, self.per_epoch = args, accelerator, per_epoch
        self.path = args.run_dir / "log.jsonl"

    def open(self, earlier: Path, step: int, flags: dict[str, Any]) -> None:
        """Begin behind the lines that the log `earlier` has up to `step`. For the first rank."""
        write_text(self.path, to_jsonl(line for line in read_log(earlier) if line["step"] <= step))
        if self.args.report_to == "wandb":
            own = {"name": self.args.exp_name, "dir": str(self.args.run_dir)}
            project = os.environ.get("WANDB_PROJECT", "self1e")
            self.accelerator.init_trackers(project, config=flags, init_kwargs={"wandb": own})
        elif self.args.report_to == "tensorboard":
            self.accelerator.init_trackers("tensorboard")  # the folder's name

    def log(self, figures: dict[str, float]) -> None:
        """Write figures of a step, which they hold as `step`; those of a validation begin with `eval_`."""
        if not is_main():
            return
        step = int(figures["step"])
        figures = {"step": step, "epoch": self.args.start_epoch + step / self.per_epoch} | figures
        tqdm.write(log_line(figures))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_jsonl([figures]))
        tags = {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": x for name, x in figures.items()}
        self.accelerator.log({tag: x for tag, x in tags.items() if tag != "train/step"}, step=step)

    def show(self, step: int, split: str, images: Sequence[EvalImage], units: Sequence[Unit]) -> None:
        """Add pictures of a validated split to TensorBoard: `<split>/worst`, `/median` and `/best`, by IoU."""
        if self.args.report_to == "tensorboard":
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for title, picture in examples(images, units).items():
                writer.add_image(f"{split}/{title}", np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Draw `curves.png`. For the first rank."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if log := read_log(self.path):
            draw_curves(log, self.args.run_dir / "curves.png")


def log_line(figures: Mapping[str, Any]) -> str:
    """One line for the terminal; TensorBoard and `log.jsonl` hold every digit."""
    start = f"step {figures['step']}  epoch {figures['epoch']:.3f}  "
    scores = {name.removeprefix("eval_"): value for name, value in figures.items() if name.startswith("eval_")}
    if scores:
        splits = dict.fromkeys(name.rpartition("_")[0] for name in scores)
        shown = [f"{x} gIoU {scores[f'{x}_giou']:.1%}, cIoU {scores[f'{x}_ciou']:.1%}" for x in splits]
        return f"{start}validation:  " + "  ".join(shown).replace("|", " ")
    losses = [f"{name.removeprefix('mask_')} {figures[name]:.4f}" for name in losses_of(figures) if name != "loss"]
    rates = [f"{name[3:]} {value:.2e}" for name, value in figures.items() if name.startswith("lr_")]
    parts = [f"loss {figures['loss']:.4f} ({', '.join(losses)})"]
    parts += [f"grad norm {figures['grad_norm']:.3f}"] if "grad_norm" in figures else []  # absent after fp16 overflow
    parts += [f"lr {', '.join(rates)}", speed(figures)]
    parts += [f"broken samples {figures['broken_samples']}"] if figures["broken_samples"] else []
    return start + "  ".join(parts)


def speed(figures: Mapping[str, float]) -> str:
    """What `loop.figures_of` found, for the terminal."""
    return (
        "{samples_per_second:.1f} samples/s  waiting {waiting_for_data:.0%}  {tflops:.3g} TFLOP/s ({utilisation:.0%})"
        "  peak {gigabytes:.1f} GB"
    ).format(**figures, gigabytes=figures["peak_memory"] / 1e9)


def losses_of(names: Iterable[str]) -> list[str]:
    """The loss and its terms among the names of figures: all that is neither a rate, a validation nor of `OTHER`."""
    return [name for name in names if name not in OTHER and not name.startswith(("lr_", "eval_"))]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line that a killed run left half is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a log to a PNG: one panel each for losses, learning rates and, where there are some, validation figures."""
    from matplotlib.figure import Figure  # half a second that no other command should wait for

    table = pd.DataFrame(log).set_index("step")
    panels = {"loss": table[losses_of(map(str, table))]}
    for title, start in {"learning rate": "lr_", "validation": "eval_"}.items():
        panels[title] = lines = table.filter(regex=f"^{start}")
        lines.columns = lines.columns.str.removeprefix(start)
    panels = {title: lines.dropna(how="all") for title, lines in panels.items() if not lines.empty}
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        style = ["-", "--"] * len(lines.columns)  # dashes show what they cover
        lines.plot(ax=axes, title=title, xlabel="optimizer step", logy=title == "loss", style=style, grid=True)
        axes.legend(fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
