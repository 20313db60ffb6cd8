"""Ablations: configurations times seeds, trained by the ordinary program, and compared.

Command: python scripts/ablate.py plan configs/ablation_*.yaml -- --version V > commands.txt
         bash -c "$(sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt)"         # in a job of a Slurm array
         python scripts/ablate.py run configs/ablation_*.yaml --base configs/quickstart.yaml -- --version V ...
         python scripts/ablate.py report runs/ablation_*
Cost:    that of the trainings; the report takes seconds.
Result:  report.md, report.csv and report.png beside the runs: mean and deviation over seeds per row and figure,
         and the 95% interval of the difference to the full method, paired by seed (Student's t).

A row is one YAML file laid over --base; the row `full` has none. Flags behind `--` go to every training.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

ROOT = Path(__file__).resolve().parents[1]
FULL = "full"
FIGURES = ("giou", "ciou", "boundary_iou")


def run_name(row: str, seed: int) -> str:
    return f"ablation_{row}_seed{seed}"


def commands(configs: list[Path], base: Path, seeds: int, launcher: str, flags: list[str]) -> dict[str, list[str]]:
    """The training command of each run, by its name."""
    rows = {FULL: [base]} | {path.stem.removeprefix("ablation_"): [base, path] for path in configs}
    program = [*shlex.split(launcher), str(ROOT / "train_hf_ivl_seq.py")]
    return {
        run_name(row, seed): [
            *program, "--config", *map(str, files), "--seed", str(seed), "--exp_name", run_name(row, seed), *flags,
        ]
        for row, files in rows.items()
        for seed in range(seeds)
    }  # fmt: skip


def run(planned: dict[str, list[str]]) -> int:
    """Train what is planned, one run after the other; a run that was stopped continues, a finished one is left."""
    failed = [name for name, command in planned.items() if subprocess.run([*command, "--auto_resume"]).returncode]
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return 1 if failed else 0


def read_runs(folders: list[Path]) -> pd.DataFrame:
    """One line per run, split and figure: row, seed, split, figure, value (0..1)."""
    found = []
    for folder in folders:
        row, _, seed = folder.name.removeprefix("ablation_").rpartition("_seed")
        if not seed.isdecimal() or not row:
            sys.exit(f"{folder} is no run of this script, whose name ends with _seedN")
        for path in sorted((folder / "eval").glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if "split" in result:
                values = [(figure, result[figure]) for figure in FIGURES if result.get(figure) is not None]
                found += [(row, int(seed), result["split"], figure, value) for figure, value in values]
    return pd.DataFrame(found, columns=["row", "seed", "split", "figure", "value"])


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """Per split, figure and row: mean and deviation over seeds, and the difference to the full method."""
    lines = []
    for (split, figure), part in results.groupby(["split", "figure"]):
        table = part.pivot(index="seed", columns="row", values="value")
        for row in table.columns:
            line = {"split": split, "figure": figure, "row": row, "seeds": table[row].count()}
            line |= {"mean": table[row].mean(), "deviation": table[row].std()}
            pairs = table[[row, FULL]].dropna() if FULL in table and row != FULL else table.iloc[:0]
            if len(pairs) > 1:
                test = ttest_rel(pairs[FULL], pairs[row])
                low, high = test.confidence_interval(0.95)
                line |= {"full - row": (pairs[FULL] - pairs[row]).mean(), "low": low, "high": high}
            lines.append(line)
    return pd.DataFrame(lines)


def markdown(summary: pd.DataFrame) -> str:
    sys.path.insert(0, str(ROOT))
    from self1e.evaluation.results import markdown_table  # takes seconds, which a plan does not need

    header, rows = "split, figure, row, seeds, mean, deviation, full - row (95% interval)".split(", "), []
    for line in summary.to_dict("records"):
        known = pd.notna(line.get("low"))
        gap = f"{line['full - row']:+.3f} ({line['low']:+.3f} to {line['high']:+.3f})" if known else ""
        deviation = f"{line['deviation']:.3f}" if pd.notna(line["deviation"]) else ""
        names = [line["split"].replace("|", " "), line["figure"], line["row"]]
        rows.append([*names, str(line["seeds"]), f"{line['mean']:.3f}", deviation, gap])
    return markdown_table(header, rows, text_columns=3)


def draw(summary: pd.DataFrame, path: Path) -> None:
    """A panel per figure: bars of the mean over seeds, a group per split, with one standard deviation."""
    panels = list(summary.groupby("figure"))
    figure = Figure(figsize=(6, 3.5 * len(panels)), layout="constrained")
    for axes, (name, part) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        means = part.pivot(index="split", columns="row", values="mean")
        errors = part.pivot(index="split", columns="row", values="deviation").fillna(0)
        means.plot.bar(ax=axes, yerr=errors, rot=0, capsize=2, title=name, xlabel="")
    figure.savefig(path, dpi=100)


def report(folders: list[Path]) -> int:
    results = read_runs(folders)
    if results.empty:
        print(f"no figures in eval/ of {', '.join(map(str, folders))}", file=sys.stderr)
        return 1
    output, summary = folders[0].parent, summarize(results)
    results.to_csv(output / "report.csv", index=False)
    (output / "report.md").write_text(markdown(summary), encoding="utf-8")
    draw(summary, output / "report.png")
    print(markdown(summary) + f"written: {output / 'report.md'}, report.csv, report.png")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "run", "report"))
    parser.add_argument("paths", nargs="+", type=Path, help="YAML files of rows, or for report the folders of runs")
    parser.add_argument("--base", type=Path, default=ROOT / "configs/self1e_2b.yaml", help="what all rows start from")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row")
    parser.add_argument("--launcher", default=sys.executable, help='such as "deepspeed", or "torchrun --standalone"')
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    if args.action == "report":
        return report(args.paths)
    planned = commands(args.paths, args.base, args.seeds, args.launcher, flags)
    if args.action == "run":
        return run(planned)
    print("\n".join(shlex.join(command) for command in planned.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
