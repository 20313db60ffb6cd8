"""`self1e score`: one row per run, mean and deviation over seeds."""

import json
from pathlib import Path

from self1e.cli import main as self1e
from self1e.evaluation.segmentation.metrics import Unit, score
from self1e.files import to_jsonl, write_json, write_text


def unit(id, I, predicted=10, target=10, **more):
    numbers = {"I": I, "U": predicted + target - I, "target_pixels": target, "predicted_pixels": predicted}
    return Unit(id=id, image="a.jpg", text=f"What is {id}?", **numbers, **more)


def write_run(folder: Path, shift: int, **settings) -> Path:
    """A run with two splits, of which one is partial, and two benchmarks, of which one has a local score."""
    units = [unit(str(n), n + shift, is_sentence=False) for n in range(8)]
    for split, stem, data in (
        ("ReasonSeg|val", "ReasonSeg_val", "partly"),
        ("refcoco|unc|val", "refcoco_unc_val", "-"),
    ):
        write_json(folder / f"eval/{stem}.json", {"split": split, "data": data, "n": 0})
        (folder / f"eval/{stem}.jsonl").write_text(to_jsonl(map(vars, units)))
    for name, summary in (("pope", {"f1": 80.0 + shift, "accuracy": 0}), ("mmbench-test-en", {})):
        write_json(folder / f"eval_vqa/{name}.scores.json", {"benchmark": name, "summary": summary})
    if settings:
        write_text(
            folder / "checkpoints/checkpoint-9/args.yaml", json.dumps({"flags": settings, "run": {}})
        )  # JSON is YAML
    return folder


def rows(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]


def test_one_row_per_run_with_figures_from_the_sentences(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "one", 0))
    assert self1e(["score", "."]) == 0
    header, _, row = rows(capsys.readouterr().out)
    assert header == ["run", "ReasonSeg val (partly)", "refcoco unc val", "pope"]
    figures = score([unit(str(n), n) for n in range(8)])
    giou, ciou = (f"{100 * figures[name]:.1f}" for name in ("giou", "ciou"))
    assert row == ["one", f"{giou} / {ciou}", ciou, "80.0"]
    assert self1e(["score", str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none'}/eval_vqa" in capsys.readouterr().err


def test_figures_of_two_models_are_no_row(tmp_path, capsys):
    run = write_run(tmp_path / "one", 0)
    for folder in ("eval", "eval_vqa"):
        write_json(run / folder / "settings.json", {"weights": folder})
    assert self1e(["score", str(run)]) == 1 and "different weights" in capsys.readouterr().err


def test_mean_and_deviation_over_runs_that_differ_in_the_seed_alone(tmp_path, capsys):
    runs = [write_run(tmp_path / f"s{seed}", seed, seed=seed, exp_name=f"s{seed}", lr="1e-4") for seed in (0, 1, 2)]
    runs += [write_run(tmp_path / "other", 0, seed=0, lr="2e-4"), write_run(tmp_path / "unknown", 0)]
    assert self1e(["score", *map(str, runs)]) == 0
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table[2:]] == ["s0", "s1", "s2", "other", "unknown", "mean of 3 runs"]
    assert table[-1][-1] == "81.0 ± 1.0"
    assert self1e(["score", *map(str, runs), "--latex"]) == 0
    assert r"81.0 $\pm$ 1.0 \\" in capsys.readouterr().out
