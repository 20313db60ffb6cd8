"""The benchmark runs from end to end on a CPU, with a tiny model."""

import json
import math
import subprocess
import sys

from helpers import ROOT


def test_the_tiny_benchmark_writes_every_part(tmp_path):
    command = [sys.executable, ROOT / "scripts/benchmark.py", "--gpu", "--tiny", "--output", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert all(figures["logits"] < 1e-4 for name, figures in result["parity"].items() if name.startswith("float32"))
    assert result["train"].keys() >= {"none", "selective", "full"}
    seconds = [result[part][name]["seconds"] for part in ("evaluation", "chat") for name in result[part]]
    assert len(seconds) == 5 and all(math.isfinite(value) and value > 0 for value in seconds)
