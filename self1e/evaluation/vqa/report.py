"""The summary of a VQA evaluation: models side by side."""

from collections.abc import Sequence
from itertools import chain

from self1e.evaluation.tables import markdown_table


def summary_table(labels: Sequence[str], results: dict[str, list[dict | None]]) -> str:
    """Markdown: a row for each figure, a column for each model, and last minus first where there are several."""
    header = ["benchmark", "figure", *labels]
    if len(labels) > 1:
        header.append("last - first")
    rows, notes = [], []
    for name, per_model in results.items():
        figures = list(dict.fromkeys(chain.from_iterable(result["summary"] for result in per_model if result)))
        for figure in figures or ["-"]:
            values = [result["summary"].get(figure) if result else None for result in per_model]
            row = [name, figure] + [_cell(result, value) for result, value in zip(per_model, values)]
            if len(labels) > 1:
                first, last = values[0], values[-1]
                row.append("" if first is None or last is None else f"{last - first:+.2f}")
            rows.append(row)
        notes += [
            f"- {name}, {result['model']}: {note}\n" for result in per_model if result for note in result["notes"]
        ]
    text = markdown_table(header, rows, text_columns=2) + "\nPercent, unless the figure names points.\n"
    return text + ("\n" + "".join(notes) if notes else "")


def _cell(result: dict | None, value: float | None) -> str:
    if result is None:
        return "failed"
    return "server" if value is None else f"{value:.2f}"
