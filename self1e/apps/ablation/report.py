"""Tables, verdicts and pictures from the units of the finished rows."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from self1e.apps.ablation.measure import figures
from self1e.apps.ablation.suites import CLAIMS, MEASURES, SUITES, label
from self1e.evaluation.tables import markdown_table
from self1e.files import write_json, write_text

# Student's t at 97.5%, by degrees of freedom: half the width of a 95% interval of a mean, in standard errors.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Scores = dict[int, dict[str, float | None]]  # seed: {measure: figure}


def read_scores(folder: Path) -> dict[str, float | None]:
    """Every measure of a finished row."""
    units = [json.loads(line) for line in (folder / "units.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {}
    for name, measure in MEASURES.items():
        chosen = [unit for unit in units if not measure.splits or unit["split"] in measure.splits]
        found[name] = figures(chosen)[measure.figure]
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of paired differences; None for a single pair."""
    if len(values) < 2:
        return None
    degrees = min(len(values) - 1, len(T_975))
    half = T_975[degrees - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def verdict(span: tuple[float, float] | None, at_least: bool) -> str:
    """What a 95% interval of `better - worse` says of a claim."""
    if span is None:
        return "not decidable (one seed)"
    if span[1] < 0:
        return "does not hold"
    if span[0] > 0:
        return "holds"
    return "not contradicted" if at_least else "not decidable at this scale"


def compare(better: Scores, worse: Scores, measure: str, at_least: bool) -> dict[str, Any]:
    """The paired difference of two rows over the seeds that both have."""
    pairs = [(better[seed][measure], worse[seed][measure]) for seed in sorted(better.keys() & worse.keys())]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    span = interval(differences)
    return {
        "measure": measure,
        "differences": differences,
        "mean": statistics.mean(differences) if differences else None,
        "interval": span,
        "verdict": verdict(span, at_least) if differences else "no common seed",
    }


def write_report(output: Path, suites: Sequence[str], seeds: int) -> str:
    """Write OUTPUT/report (ablation.md, ablation.json, bars.png, curves.png) and return the Markdown."""
    report = output / "report"
    scores: dict[str, dict[str, Scores]] = {}
    curves: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    seconds: dict[Path, int] = {}  # the full method is a row of every suite
    for suite in suites:
        scores[suite], curves[suite] = {}, {}
        for row in SUITES[suite]:
            folders = {seed: output / f"{row}_{seed}" for seed in range(seeds)}
            done = {seed: folder for seed, folder in folders.items() if folder.is_dir()}
            scores[suite][row] = {seed: read_scores(folder) for seed, folder in done.items()}
            curves[suite][row] = [json.loads((folder / "curve.json").read_text()) for folder in done.values()]
            seconds |= {path: json.loads((path / "row.json").read_text())["seconds"] for path in done.values()}
    claims = [
        {
            "suite": claim.suite,
            "claim": claim.text,
            "results": [
                compare(scores[claim.suite][claim.better], scores[claim.suite][claim.worse], name, claim.at_least)
                for name in claim.measures
            ],
        }
        for claim in CLAIMS
        if claim.suite in suites
    ]
    settings, took = json.loads((output / "settings.json").read_text()), list(seconds.values())
    content = {"settings": settings, "seconds_per_row": took, "scores": scores, "claims": claims}
    text = markdown(scores, claims, took)
    write_json(report / "ablation.json", content)
    write_text(report / "ablation.md", text)
    draw_bars(scores, report / "bars.png")
    draw_curves(curves, report / "curves.png")
    return text


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def known(scores: Scores, measure: str) -> list[float]:
    return [value for value in (entry[measure] for entry in scores.values()) if value is not None]


def markdown(scores: dict[str, dict[str, Scores]], claims: Sequence[dict[str, Any]], seconds: Sequence[int]) -> str:
    parts = []
    for suite, rows in scores.items():
        table = []
        for row, found in rows.items():
            figures = [known(found, name) for name in MEASURES]
            cells = [f"{statistics.mean(x):.3f} ± {spread(x):.3f}" if x else "" for x in figures]
            table.append([label(suite, row), str(len(found)), *cells])
        header = ["row", "seeds", *(measure.label for measure in MEASURES.values())]
        parts.append(f"### {suite}\n\n{markdown_table(header, table)}")
    table = []
    for claim in claims:
        for result in claim["results"]:
            span = result["interval"]
            mean = "" if result["mean"] is None else f"{result['mean']:+.3f}"
            mean += f" ({span[0]:+.3f} to {span[1]:+.3f})" if span else ""
            table.append([claim["claim"], MEASURES[result["measure"]].label, mean, result["verdict"]])
    header = ["claim", "measure", "difference (95% interval), paired by seed", "verdict"]
    parts.append(f"### Claims of the paper\n\n{markdown_table(header, table, text_columns=4)}")
    if seconds:
        longest, middle = max(seconds), statistics.median(seconds)
        parts.append(f"{len(seconds)} rows; a row took {middle:.0f} s in the median and {longest} s at most.\n")
    return "\n".join(parts)


def draw_bars(scores: dict[str, dict[str, Scores]], path: Path) -> None:
    """One panel per suite: the mean of four measures per row, error bars of one standard deviation over seeds."""
    from matplotlib.figure import Figure

    shown = ("ciou", "fine", "reasoning", "several")
    figure = Figure(figsize=(4 * len(scores), 4), layout="constrained")
    for axes, (suite, rows) in zip(figure.subplots(1, len(scores), sharey=True, squeeze=False)[0], scores.items()):
        width = 0.8 / len(rows)
        for i, (row, found) in enumerate(rows.items()):
            values = [known(found, name) for name in shown]
            heights = [statistics.mean(x) if x else 0.0 for x in values]
            places = [x + (i - (len(rows) - 1) / 2) * width for x in range(len(shown))]
            axes.bar(places, heights, width, yerr=[spread(x) for x in values], capsize=2, label=label(suite, row))
        axes.set_xticks(
            range(len(shown)),
            [MEASURES[name].label.replace(", ", "\n").replace(" + ", "\n") for name in shown],
            fontsize=7,
        )
        axes.set_title(suite)
        axes.legend(fontsize=7)
    _save(figure, path)


def draw_curves(curves: dict[str, dict[str, list[list[dict[str, Any]]]]], path: Path) -> None:
    """One panel per suite: the Dice loss over steps, mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    for axes, (suite, rows) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for row, found in rows.items():
            if not found:
                continue
            steps = [entry["step"] for entry in found[0]]
            dice = [[entry["mask_dice"] for entry in curve] for curve in found]
            columns = list(zip(*dice))
            (line,) = axes.plot(steps, [statistics.mean(x) for x in columns], label=label(suite, row))
            axes.fill_between(
                steps, [min(x) for x in columns], [max(x) for x in columns], alpha=0.2, color=line.get_color()
            )
        axes.set_title(suite)
        axes.set_xlabel("step")
        axes.set_ylabel("Dice loss (masks + auxiliary)")
        if any(rows.values()):
            axes.legend(fontsize=7)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
