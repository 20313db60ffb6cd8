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

import yaml

from self1e.data.splits import file_stem, get_splits
from self1e.errors import UserError
from self1e.evaluation.results import markdown_table
from self1e.evaluation.segmentation.metrics import read_units, score
from self1e.evaluation.segmentation.report import read_figures, row_title
from self1e.evaluation.vqa.run import VQA_BENCHMARKS
from self1e.files import read_json

# Flags in which runs of one recipe may differ, besides the seed.
PLACES = "seed exp_name log_base_dir run_dir command config resume auto_resume overwrite local_rank".split()
Row = dict[str, tuple[float, ...]]  # column -> its figures, in percent or points


def read_run(run: Path) -> Row:
    """The headline figures of a run. Raises UserError naming the folders looked at when it has none."""
    row: Row = {}
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
    """The flags that a run was trained with, but its seed and its name; where no checkpoint says them, the run."""
    paths = run.glob("checkpoints/checkpoint-*/args.yaml")
    if (latest := max(paths, key=lambda path: path.stat().st_mtime, default=None)) is None:
        return str(run)
    flags = yaml.load(latest.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["flags"]
    return str(sorted((name, str(value)) for name, value in flags.items() if name not in PLACES))


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
    lines = [(run.name, [row]) for run, row in rows.items()]
    lines += [(f"mean of {len(group)} seeds", group) for group in groups.values() if len(group) > 1]
    return [["run", *columns], *([name, *(cell(group, column) for column in columns)] for name, group in lines)]


def latex(table: list[list[str]]) -> str:
    """A table for the package booktabs."""
    escaped = [[text.replace("_", r"\_").replace("±", r"$\pm$") for text in row] for row in table]
    header, *rows = (" & ".join(row) + r" \\" for row in escaped)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}", r"\toprule", header, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e score", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    args = parser.parse_args(argv)
    table = score_table({run: read_run(run) for run in args.runs})
    print(latex(table) if args.latex else markdown_table(table[0], table[1:]), end="")
    return 0
