"""The summary of a VQA evaluation: all figures in `summary.md`, the headlines on the terminal."""

from collections.abc import Mapping
from pathlib import Path

from self1e.evaluation.tables import markdown_table
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.files import read_json, write_json, write_text


def write_summary(folder: Path, model: dict, faults: Mapping[str, str]) -> None:
    """`summary.md` and `summary.json` of all benchmarks that the folder holds; prints the headlines."""
    paths = {name: folder / f"{name}.scores.json" for name in VQA_BENCHMARKS}
    results = {name: read_json(path, dict) for name, path in paths.items() if path.is_file()}
    figures = {name: {scores["model"]: scores["summary"]} for name, scores in results.items()}
    write_json(folder / "summary.json", {"models": [model], "figures": figures, "failures": dict(faults)})
    write_text(folder / "summary.md", summary_table(model["label"], results))
    print(f"{summary_table(model['label'], results, headlines=True)}\nall figures are in {folder / 'summary.md'}")


def summary_table(label: str, results: Mapping[str, dict], *, headlines: bool = False) -> str:
    """Markdown: a line for each figure. headlines: the first figure of each benchmark only, and no notes."""
    lines, notes = [], []
    for name, scores in results.items():
        figures = [(figure, f"{value:.2f}") for figure, value in scores["summary"].items()] or [("-", "server")]
        lines += [[name, *figure] for figure in (figures[:1] if headlines else figures)]
        notes += [f"- {name}, {scores['model']}: {note}\n" for note in scores["notes"]]
    text = markdown_table(["benchmark", "figure", label], lines, text_columns=2)
    text += "\nPercent, unless the figure names points.\n"
    return text + ("\n" + "".join(notes) if notes and not headlines else "")
