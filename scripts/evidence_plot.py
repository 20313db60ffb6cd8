"""Draw the published program's learning curve and ours, and state the figures that docs/evidence.md quotes.

Command:  python scripts/evidence_plot.py            # needs matplotlib: pip install 'self1e[plots]'
Cost:     seconds on a CPU.
Expected: docs/evidence/learning.png, and Markdown tables on the terminal.

docs/evidence/learning.csv holds a row per optimizer step: the loss of each run, and on every hundredth step cIoU and
gIoU of held-out scenes. `ours_eager` and `ours_nudged` are two more runs of ours from step 400 on: the same arithmetic
in another order, and a disturbance of the size of rounding.
"""

import csv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "evidence"
RUNS = {
    "published": "published program",
    "ours": "ours",
    "ours_eager": "ours, eager attention",
    "ours_nudged": "ours, nudged",
}
THRESHOLDS = (1e-6, 1e-4, 1e-2)


def read(path: Path = FOLDER / "learning.csv") -> dict[str, dict[int, float]]:
    """Each column but `step` as {step: value}, empty cells left out."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "step"]
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in names}


def differences(columns: dict[str, dict[int, float]], run: str, other: str) -> dict[int, float]:
    """Relative difference of two runs' losses at every step that both have."""
    mine, theirs = columns[f"{run}_loss"], columns[f"{other}_loss"]
    return {step: abs(mine[step] / theirs[step] - 1) for step in sorted(mine.keys() & theirs.keys())}


def tables(columns: dict[str, dict[int, float]]) -> str:
    """Markdown: where the losses part, and the scores of held-out scenes."""
    lines = [
        "| runs | largest difference before step 490 | " + " | ".join(f"first above {t:g}" for t in THRESHOLDS) + " |"
    ]
    lines.append("|---|---|" + "---|" * len(THRESHOLDS))
    for run, other in (("ours", "published"), ("ours_eager", "ours"), ("ours_nudged", "ours")):
        found = differences(columns, run, other)
        largest = max(value for step, value in found.items() if step < 490)
        firsts = [next((str(step) for step, value in found.items() if value > limit), "never") for limit in THRESHOLDS]
        lines.append(
            f"| {RUNS[run]} and {RUNS[other]} | {largest:.1e} | " + " | ".join(f"step {x}" for x in firsts) + " |"
        )
    lines += [
        "",
        "| step | " + " | ".join(f"cIoU, {label}" for label in RUNS.values()) + " |",
        "|---|" + "---|" * len(RUNS),
    ]
    for step in sorted(columns["published_ciou"]):
        cells = [columns[f"{run}_ciou"].get(step) for run in RUNS]
        lines.append(f"| {step} | " + " | ".join("" if x is None else f"{x:.4f}" for x in cells) + " |")
    return "\n".join(lines)


def draw(columns: dict[str, dict[int, float]], path: Path) -> None:
    """Losses, their relative difference, and cIoU, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, parting, scores = figure.subplots(1, 3)
    for run, label in RUNS.items():
        style = {"label": label, "linewidth": 1, "alpha": 0.8}
        losses.plot(*zip(*columns[f"{run}_loss"].items()), **style)
        scores.plot(*zip(*columns[f"{run}_ciou"].items()), marker="o", markersize=3, **style)
    for run, other in (("ours", "published"), ("ours_eager", "ours"), ("ours_nudged", "ours")):
        points = [(step, value) for step, value in differences(columns, run, other).items() if value]
        parting.plot(*zip(*points), linewidth=1, label=f"{RUNS[run]} and {RUNS[other]}")
    losses.set(title="loss", xlabel="step", yscale="log")
    parting.set(title="relative difference of two losses", xlabel="step", yscale="log")
    scores.set(title="cIoU of held-out scenes", xlabel="step")
    for axes in (losses, parting, scores):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    columns = read()
    draw(columns, FOLDER / "learning.png")
    print(tables(columns))


if __name__ == "__main__":
    main()
