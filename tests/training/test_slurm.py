"""The Slurm template with stand-ins for Slurm: what each rank is started with, and when a job is requeued."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

STAND_INS = {
    # two tasks on one node, as srun starts them; the highest exit code is its own
    "srun": """
        echo "srun $1 $2" >> "$CALLS"
        shift 2
        highest=0
        for task in 0 1; do
            SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || { code=$?; [ $code -gt $highest ] && highest=$code; }
        done
        exit $highest""",
    "scontrol": """
        [ "$1" = show ] && echo node7 && exit
        echo "scontrol $*" >> "$CALLS" """,
    "python": """
        echo "rank $RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR: $*" >> "$CALLS"
        [ "$CODE" = 75 ] && mkdir -p runs/self1e_2b && touch runs/self1e_2b/requeue
        exit "$CODE" """,
}


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_the_template_starts_every_rank_and_requeues_what_was_stopped(tmp_path: Path, code: int, requeued: bool):
    """By the mark in the run's folder, of this job and not of an earlier one."""
    (tmp_path / "runs/self1e_2b").mkdir(parents=True)
    (tmp_path / "runs/self1e_2b/requeue").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": tmp_path, "JOB_NODELIST": "node[7-8]", "NTASKS": 2, "CPUS_PER_TASK": 4, "JOB_ID": 31}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "CODE": str(code)}
    script = ["bash", ROOT / "scripts/train_slurm.sh"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "srun --cpus-per-task=4 --kill-on-bad-exit=1"
    for rank, call in enumerate(calls[1:3]):
        assert call.startswith(f"rank {rank} {rank} of 2 at node7: -m self1e train --config configs/self1e_2b.yaml")
        assert call.endswith("--auto_resume --log_base_dir runs --exp_name self1e_2b")
    assert calls[3:] == (["scontrol requeue 31"] if requeued else [])
