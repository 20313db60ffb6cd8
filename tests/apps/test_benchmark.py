"""The benchmark: its script on tiny sizes, and what it counts."""

import json
import runpy

import pytest
import torch
from helpers import ROOT
from PIL import Image

from self1e.apps.measuring import Peak


def test_the_peak_is_what_is_alive_together():
    kept = torch.zeros(100)
    with Peak([kept]) as peak:
        a = kept + 1  # 400 bytes
        b = a.view(10, 10)  # the same storage
        del a, b
        c = torch.ones(200)  # 800
        kept.add_(c[:100])  # nothing new
        d = c * 2  # 800 more
        del c
        assert peak.now == 800 == d.nbytes
    assert peak.most == 1600


def test_the_script_measures_everything(make_tiny, tmp_path, miniature, capsys):
    script = runpy.run_path(str(ROOT / "scripts/benchmark.py"))
    version = make_tiny(vocab_size=4000)
    given = ["--version", version, "--sentences", "1", "4", "--samples", "2", "--repeats", "1", "--matmul", "64"]
    given += ["--dataset_dir", miniature / "dataset", "--data_dir", miniature / "data", "--output", tmp_path]
    assert script["main"](list(map(str, given))) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "benchmark.json").read_text())
    ours, baseline = (result["cases"]["evaluation, 4 sentences"][name] for name in ("ours", "baseline"))
    assert baseline["tflop"] > 1.5 * ours["tflop"] and baseline["memory_gb"] > ours["memory_gb"]
    assert {"training, 3 rows", "generation, 8 tokens"} < result["cases"].keys()
    assert result["loading"]["seconds"] > 0
    assert {"ade20k", "refcoco", "grefcoco", "ReasonSeg", "llava_instruct_150k", "gqa"} < result["data"].keys()
    for name, rates in result["data"].items():
        spent = rates["annotations"] + rates["photo"] + rates["processor"]
        assert rates["samples_per_second"] == pytest.approx(1 / spent)
        assert min(rates.values()) > 0 and name in printed
    with Image.open(tmp_path / "benchmark.png") as plot:
        assert plot.width > 1000 and plot.convert("L").getextrema() == (0, 255)
