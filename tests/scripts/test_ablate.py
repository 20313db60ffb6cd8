"""Ablations: the commands that are planned, and the report from folders of finished runs."""

import json
import shlex
import subprocess
import sys

import pandas as pd
from helpers import ROOT

from self1e.training.args import parse

SCRIPT = ROOT / "scripts" / "ablate.py"


def ablate(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_a_plan_has_a_command_per_row_and_seed():
    configs = sorted((ROOT / "configs").glob("ablation_*.yaml"))
    done = ablate("plan", *configs, "--seeds", 2, "--launcher", "deepspeed", "--", "--version", "V", "--lr", "3e-4")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * (len(configs) + 1)
    parsed = [parse(line[2:]) for line in lines]
    assert len({(args.exp_name, args.seed) for args in parsed}) == len(lines)
    assert {args.lr for args in parsed} == {3e-4} and all(args.use_llm_lora for args in parsed)
    assert {args.mask_features for args in parsed} >= {"baseline", "rfr"}


def test_a_report_pairs_rows_by_seed(tmp_path):
    values = {"full": [0.80, 0.82, 0.81], "rfr": [0.75, 0.76, 0.76]}
    for row, figures in values.items():
        for seed, value in enumerate(figures):
            folder = tmp_path / f"ablation_{row}_seed{seed}" / "eval"
            folder.mkdir(parents=True)
            content = {"split": "refcoco|unc|val", "giou": value - 0.1, "ciou": value, "n": 9}
            (folder / "refcoco_unc_val.json").write_text(json.dumps(content))
            (folder / "summary.json").write_text("{}")
    done = ablate("report", *sorted(tmp_path.iterdir()))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "| ciou " in line and "| rfr " in line)
    assert "0.757" in line and "+0.053 (+0.039 to +0.068)" in line  # by hand: mean 0.0533, t(2) 4.303, error 0.0033
    assert len(pd.read_csv(tmp_path / "report.csv")) == 12 and (tmp_path / "report.png").stat().st_size > 1000


def test_a_report_of_nothing_fails(tmp_path):
    for folder, cause in (tmp_path / "full_seed0", "no figures"), (tmp_path, "_seedN"):
        done = ablate("report", folder)
        assert done.returncode == 1 and str(folder) in done.stderr and cause in done.stderr
        assert "Traceback" not in done.stderr
