"""The summary of a VQA evaluation: models side by side, all figures in `summary.md`, the headlines on the terminal."""

from collections.abc import Mapping, Sequence
from itertools import chain

from self1e.evaluation.tables import markdown_table

Results = Mapping[str, Sequence[dict | None]]  # benchmark -> what `<benchmark>.scores.json` of each model holds


def summary_table(labels: Sequence[str], results: Results, *, headlines: bool = False) -> str:
    """Markdown: a line for each figure, a column for each model, and last minus first where there are several.

    headlines: the first figure of each benchmark only, and no notes.
    """
    header = ["benchmark", "figure", *labels, *(["last - first"] if len(labels) > 1 else [])]
    lines, notes = [], []
    for name, per_model in results.items():
        found = [result for result in per_model if result]
        figures = list(dict.fromkeys(chain.from_iterable(result["summary"] for result in found))) or ["-"]
        for figure in figures[:1] if headlines else figures:
            values = [result["summary"].get(figure) if result else None for result in per_model]
            line = [name, figure, *(_cell(result, value) for result, value in zip(per_model, values))]
            if len(labels) > 1:
                first, last = values[0], values[-1]
                line.append("" if first is None or last is None else f"{last - first:+.2f}")
            lines.append(line)
        notes += [f"- {name}, {result['model']}: {note}\n" for result in found for note in result["notes"]]
    text = markdown_table(header, lines, text_columns=2) + "\nPercent, unless the figure names points.\n"
    return text + ("\n" + "".join(notes) if notes and not headlines else "")


def _cell(result: dict | None, value: float | None) -> str:
    if result is None:
        return "-"
    return "server" if value is None else f"{value:.2f}"
