"""The curves of a training run: a line per logged step in `log.jsonl`, drawn at the end in `curves.png`."""

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import Accelerator
from tqdm import tqdm

from self1e.data.splits import get_splits
from self1e.distributed import is_main
from self1e.files import read_records, to_jsonl, write_text
from self1e.model.config import LOSS_WEIGHTS


class Record:
    """What a run says while it trains: its lines on the terminal, `log.jsonl`, and TensorBoard or W&B."""

    def __init__(self, args: Namespace, accelerator: Accelerator, per_epoch: int, step: int, flags: dict[str, Any]):
        """Begin behind the lines that the log has up to `step`. per_epoch: steps of an epoch.

        lines: of the log, on the first rank.
        """
        self.args, self.accelerator, self.per_epoch = args, accelerator, per_epoch
        self.lines: list[dict] = []
        self.path = args.run_dir / "log.jsonl"
        if not is_main():
            return
        self.lines = [line for line in read_records(self.path) if line["step"] <= step]
        write_text(self.path, to_jsonl(self.lines))
        wandb, own = args.report_to == "wandb", {"name": args.exp_name, "dir": str(args.run_dir)}
        project = os.environ.get("WANDB_PROJECT", "self1e") if wandb else "tensorboard"  # the folder's name
        accelerator.init_trackers(project, flags if wandb else None, {"wandb": own})

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write figures of a step; those of a validation begin with `eval_`."""
        if not is_main():
            return
        line = {"step": step, "epoch": self.args.start_epoch + step / self.per_epoch} | figures
        self.lines.append(line)
        tqdm.write(log_line(line))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_jsonl([line]))
        tags = {f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": x for name, x in line.items()}
        self.accelerator.log(tags, step=step)

    def best(self) -> int | None:
        """The step of the best validation so far on the split of `--keep_best`; None on other ranks."""
        keep = self.args.keep_best
        headline = f"eval_{keep}_{get_splits([keep])[keep].headline[0]}" if keep else None
        rated = [line for line in self.lines if headline in line]
        return max(rated, key=lambda line: line[headline])["step"] if rated else None

    def close(self) -> None:
        """Draw `curves.png`. For the first rank."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.lines:
            draw_curves(self.lines, self.args.run_dir / "curves.png")


def log_line(figures: Mapping[str, Any]) -> str:
    """Figures for the terminal; TensorBoard and `log.jsonl` hold every digit."""
    return "  ".join(f"{name} {x if isinstance(x, int) else format(x, '.4g')}" for name, x in figures.items())


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a log to a PNG: one panel each for losses, learning rates and, where there are some, validation figures."""
    from matplotlib.figure import Figure  # half a second that no other command should wait for

    table = pd.DataFrame(log).set_index("step")
    panels = {"loss": table.filter(["loss", *LOSS_WEIGHTS])}
    panels |= {"learning rate": table.filter(regex="^lr_"), "validation": table.filter(regex="^eval_")}
    panels = {title: lines.dropna(how="all") for title, lines in panels.items() if not lines.empty}
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        style = ["-", "--", ":"] * len(lines.columns)  # dashes and dots show what they cover
        lines.plot(ax=axes, title=title, xlabel="optimizer step", logy=title == "loss", style=style, grid=True)
    figure.savefig(path, dpi=120)
