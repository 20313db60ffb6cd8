"""Programs as they are started: what they print is theirs, and no library speaks in between."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, free_port, make_base
from PIL import Image

BAR = re.compile(r"\s*\d+%\|.*\|\s*[\d.]+/[\d.]+ \[.*")
LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--quiet", "--num_accelerators=1"]
OURS = re.compile(
    r"trained for |parameters, thousands|LLM |lm_head |ViT |projector |segmentation head |total |samples on disk: |"
    r"an epoch: |"
    r"starting anew|step \d|saved |warning: the run has |never reaches its peak|--grad_accumulation_steps|$"
)


def run(command, cwd: Path) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "line",
    [
        "segment --version {version} --image a.png --prompt it --output out",
        "convert {version} hf --layout hf --drop_head",
        "make-tiny tiny --layout hf",
    ],
)
def test_a_program_that_succeeds_has_no_errors_to_tell(line, version, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    done = run([sys.executable, "-m", "self1e", *line.format(version=version).split()], tmp_path)
    assert done.stderr == "" and 1 <= done.stdout.count("\n") <= 2


@pytest.mark.parametrize("launcher", [[sys.executable], LAUNCHER], ids=["python", "deepspeed"])
def test_a_run_prints_its_own_lines_and_bars_alone(launcher, tmp_path):
    """With more workers than cores, of which torch warns."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "mask.png")
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "prompt"), ("a.png", "mask.png", "it")])
    flags = f"--version {make_base(tmp_path / 'base')} --exp_name e --dataset custom --custom_data mine.csv --no_eval"
    flags += " --max_steps 1 --batch_size 1 --grad_accumulation_steps 1 --precision fp32 --use_llm_lora"
    flags += f" --workers {(os.cpu_count() or 1) + 1}"
    port = [f"--master_port={free_port()}"] if launcher == LAUNCHER else []
    done = run([*launcher, *port, str(ROOT / "train_hf_ivl_seq.py"), *flags.split()], tmp_path)
    lines = re.split(r"[\r\n]+", done.stdout + "\n" + done.stderr)
    assert [line for line in lines if line.strip() and not OURS.match(line) and not BAR.fullmatch(line)] == []
    assert "an epoch: 1 samples, 1 steps of 1 x 1 x 1 photos (batch x micro-batches x ranks)" in lines
