"""One row of figures per run, from what its evaluations wrote, without model or data: `self1e score`.

    self1e score runs/NAME                        # all splits and benchmarks that it was evaluated on
    self1e score runs/SEED_* --latex              # and mean and deviation of those that differ in the seed alone
    self1e score runs/A runs/B --compare          # B minus A on each split, with the interval of the difference

Figures of splits are recomputed from the JSONL of their sentences; those of benchmarks are read (`eval_vqas.sh
--score_only` recomputes them). The interval is a paired percentile bootstrap: sentences are drawn with replacement,
and both runs are scored on the same draw.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import yaml

from self1e.data.splits import SPLITS, get_splits
from self1e.errors import UserError
from self1e.evaluation.segmentation.metrics import RESAMPLES, TAILS, Unit, ciou_of_draws, read_units, score
from self1e.evaluation.segmentation.report import read_figures, units_path
from self1e.evaluation.tables import markdown_table
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.files import read_json

PART = " (part)"  # of a split whose data is not the whole benchmark
# Flags in which runs of one recipe may differ, besides the seed.
PLACES = "seed exp_name log_base_dir run_dir command config resume auto_resume overwrite local_rank".split()
Row = dict[str, tuple[float, ...]]  # column -> its figures, in percent or points


def read_run(run: Path) -> Row:
    """The headline figures of a run. Raises UserError naming the folders looked at when it has none."""
    row: Row = {}
    for split, figures in read_figures(run / "eval").items():
        entry, again = get_splits([split])[split], score(read_units(units_path(run / "eval", split)))
        part = "" if figures["data"] in ("-", "complete") else PART
        row[split.replace("|", " ") + part] = tuple(100 * again[name] for name in entry.headline)
    for benchmark in VQA_BENCHMARKS:
        path = run / "eval_vqa" / f"{benchmark}.scores.json"
        summary = read_json(path, dict)["summary"] if path.is_file() else {}
        if summary:
            row[benchmark] = (next(iter(summary.values())),)
    if not row:
        raise UserError(f"{run} holds no results: neither of splits in {run}/eval nor of benchmarks in {run}/eval_vqa")
    return row


def recipe(run: Path) -> dict[str, str] | None:
    """The flags that a run was trained with, but its seed and its name; None where it holds no `args.yaml`."""
    paths = [*run.glob("ckpt_model/args.yaml"), *run.glob("checkpoints/checkpoint-*/args.yaml")]
    if not paths:
        return None
    latest = max(paths, key=lambda path: path.stat().st_mtime)
    flags = yaml.load(latest.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["flags"]
    return {name: value for name, value in flags.items() if name not in PLACES}


def cell(rows: Sequence[Row], column: str) -> str:
    """The figures of a column, of several rows with mean and deviation; `-` unless all rows have them."""
    if not all(column in row for row in rows):
        return "-"
    values = list(zip(*(row[column] for row in rows)))
    deviations = [f" ± {stdev(each):.1f}" if len(rows) > 1 else "" for each in values]
    return " / ".join(f"{mean(each):.1f}{deviation}" for each, deviation in zip(values, deviations))


def score_table(rows: Mapping[Path, Row]) -> list[list[str]]:
    """Header and rows: one per run, and one for each group of runs that differ in the seed alone."""
    known = [name.replace("|", " ") for name in SPLITS] + list(VQA_BENCHMARKS)
    found = dict.fromkeys(column for row in rows.values() for column in row)
    whole = {column: column.removesuffix(PART) for column in found}
    columns = sorted(found, key=lambda column: known.index(whole[column]) if whole[column] in known else len(known))
    table = [["run", *columns]]
    table += [[run.name, *(cell([row], column) for column in columns)] for run, row in rows.items()]
    recipes = {run: recipe(run) for run in rows}
    groups = [[other for other in rows if recipes[other] == recipes[run]] for run in rows if recipes[run] is not None]
    for group in (group for number, group in enumerate(groups) if len(group) > 1 and group not in groups[:number]):
        together = [rows[run] for run in group]
        table.append([f"mean of {len(group)} seeds", *(cell(together, column) for column in columns)])
    return table


def latex(table: list[list[str]]) -> str:
    """A table for the package booktabs."""
    escaped = [[text.replace("_", r"\_").replace("±", r"$\pm$") for text in row] for row in table]
    header, *rows = (" & ".join(row) + r" \\" for row in escaped)
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}", r"\toprule", header, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def compare(first: Sequence[Unit], second: Sequence[Unit]) -> tuple[int, list[float], list[float]]:
    """The number of sentences that two evaluations share, both cIoU in percent, and the interval of B minus A."""
    others = {unit.id: unit for unit in second}
    pairs = [(unit, others[unit.id]) for unit in first if unit.id in others]
    if not pairs:
        raise UserError("the two evaluations share no sentence: they are of different data")
    draws = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sides = [*zip(*pairs)]
    a, b = (100 * ciou_of_draws(side, draws) for side in sides)
    return len(pairs), [100 * score(side)["ciou"] for side in sides], np.quantile(b - a, TAILS).tolist()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="self1e score", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    parser.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    parser.add_argument("--compare", action="store_true", help="compare two runs sentence by sentence")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.compare and len(args.runs) != 2:
        parser.error(f"--compare takes two runs, not {len(args.runs)}")
    if not args.compare:
        table = score_table({run: read_run(run) for run in args.runs})
    else:
        held = [read_figures(run / "eval") for run in args.runs]
        table = [["split", "sentences", "cIoU A", "cIoU B", "B - A", "95% interval"]]
        for split in (split for split in held[0] if split in held[1]):
            n, (a, b), (low, high) = compare(*(read_units(units_path(run / "eval", split)) for run in args.runs))
            figures = [f"{a:.1f}", f"{b:.1f}", f"{b - a:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            table.append([split.replace("|", " "), str(n), *figures])
        if len(table) == 1:
            raise UserError(f"{args.runs[0]}/eval and {args.runs[1]}/eval share no split")
    print(latex(table) if args.latex else markdown_table(table[0], table[1:]), end="")
    if any(PART in column for column in table[0]):
        print("\n(part): not the whole benchmark, so that published figures do not compare")
    return 0
