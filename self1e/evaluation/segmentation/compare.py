"""One row of figures per run, from what its evaluations wrote, without model or data: `self1e score`.

    self1e score runs/NAME                        # all splits and benchmarks that it was evaluated on
    self1e score runs/SEED_* --latex              # and mean and deviation of those that differ in the seed alone

Figures of splits are recomputed from the JSONL of their sentences; those of benchmarks are read (`eval_vqas.sh
--score_only` recomputes them).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
import yaml

from self1e.data.splits import get_splits
from self1e.errors import UserError
from self1e.evaluation.results import file_stem, markdown_table
from self1e.evaluation.segmentation.metrics import read_units, score
from self1e.evaluation.segmentation.report import read_figures, row_title
from self1e.evaluation.vqa.run import VQA_BENCHMARKS
from self1e.files import read_json

# What runs of one recipe may differ in.
FREE = "seed exp_name log_base_dir run_dir command config resume auto_resume overwrite local_rank".split()
FREE += "weights base code torch transformers".split()
Row = dict[str, tuple[float, ...]]  # column -> its figures, in percent or points


def read_run(run: Path) -> Row:
    """The headline figures of a run. Raises UserError for none, naming the folders, or where two models made them."""
    row: Row = {}
    if len({each["weights"] for each in (settings_in(run / "eval"), settings_in(run / "eval_vqa")) if each}) > 1:
        raise UserError(f"{run}: eval and eval_vqa are of different weights; evaluate one anew with --overwrite_eval")
    for split, figures in read_figures(run / "eval").items():
        entry, again = get_splits([split])[split], score(read_units(run / "eval" / f"{file_stem(split)}.jsonl"))
        row[row_title(figures)] = tuple(100 * again[name] for name in entry.headline)
    for benchmark in VQA_BENCHMARKS:
        path = run / "eval_vqa" / f"{benchmark}.scores.json"
        summary = read_json(path, dict)["summary"] if path.is_file() else {}
        if summary:
            row[benchmark] = (next(iter(summary.values())),)
    if not row:
        raise UserError(f"{run} holds no results: neither of splits in {run}/eval nor of benchmarks in {run}/eval_vqa")
    return row


def recipe(run: Path) -> str:
    """How a run was trained and evaluated, but for its seed and its name; where no checkpoint says it, the run."""
    paths = run.glob("checkpoints/checkpoint-*/args.yaml")
    if (latest := max(paths, key=lambda path: path.stat().st_mtime, default=None)) is None:
        return str(run)
    saved = yaml.load(latest.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    settings = saved["flags"] | saved["run"] | settings_in(run / "eval")
    return str(sorted((name, str(value)) for name, value in settings.items() if name not in FREE))


def settings_in(folder: Path) -> dict:
    """What decided the results in a folder; {} without any."""
    path = folder / "settings.json"
    return read_json(path, dict) if path.is_file() else {}


def cell(rows: Sequence[Row], column: str) -> str:
    """The figures of a column, of several rows with mean and deviation; `-` unless all rows have them."""
    if not all(column in row for row in rows):
        return "-"
    values = zip(*(row[column] for row in rows))
    return " / ".join(f"{mean(x):.1f}" + (f" ± {stdev(x):.1f}" if len(x) > 1 else "") for x in values)


def score_table(rows: Mapping[Path, Row]) -> list[list[str]]:
    """Header and rows: one per run, and one for each group of runs that differ in the seed alone."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    groups: dict[str, list[Row]] = {}
    for run, row in rows.items():
        groups.setdefault(recipe(run), []).append(row)
    lines = [(run.resolve().name, [row]) for run, row in rows.items()]
    lines += [(f"mean of {len(group)} runs", group) for group in groups.values() if len(group) > 1]
    return [["run", *columns], *([name, *(cell(group, column) for column in columns)] for name, group in lines)]


def latex(table: list[list[str]]) -> str:
    """A table for the package booktabs."""
    frame, columns = pd.DataFrame(table[1:], columns=table[0]), "l" + "r" * (len(table[0]) - 1)
    return frame.to_latex(index=False, escape=True, column_format=columns).replace("±", r"$\pm$")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e score", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    args = parser.parse_args(argv)
    table = score_table({run: read_run(run) for run in args.runs})
    print(latex(table) if args.latex else markdown_table(table[0], table[1:]), end="")
    return 0
