"""`self1e score`: figures from JSONL, and the comparison of two evaluations."""

import json

import numpy as np
import pytest

from self1e.cli import main as self1e
from self1e.evaluation.journal import to_jsonl
from self1e.evaluation.segmentation.compare import compare_units, paired_bootstrap
from self1e.evaluation.segmentation.metrics import Unit, score


def unit(id, I, predicted=10, target=10, **more):
    numbers = {"I": I, "U": predicted + target - I, "target_pixels": target, "predicted_pixels": predicted}
    return Unit(id=id, image="a.jpg", text=f"What is {id}?", **numbers, **more)


@pytest.fixture
def files(tmp_path):
    def write(*evaluations):
        paths = [tmp_path / f"{name}.jsonl" for name in "ab"[: len(evaluations)]]
        for path, units in zip(paths, evaluations):
            path.write_text(to_jsonl(each.record() for each in units), encoding="utf-8")
        return paths

    return write


def test_figures_are_recomputed(files, capsys):
    units = [unit("x", 3), unit("y", 10)]
    (path,) = files(units)
    assert self1e(["score", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(path), **score(units)}


def test_differences_come_worst_first_with_figures_and_interval(files, tmp_path, capsys):
    a = [unit("same", 5), unit("better", 2), unit("worse", 9), unit("worst", 10), unit("only a", 1)]
    b = [unit("worst", 0), unit("same", 5), unit("worse", 8), unit("better", 8)]
    first, second = files(a, b)
    assert self1e(["score", "--compare", str(first), str(second), "--json", str(tmp_path / "c.json")]) == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert [entry["id"] for entry in record["differing"]] == ["worst", "worse", "better"]
    assert printed.index("worst") < printed.index("worse ") < printed.index("better") and "same" not in printed
    assert (record["n"], record["only_a"], record["only_b"]) == (4, 1, 0) and "1 that only A holds" in printed
    common = [score(a[:4]), score(b)]
    for name in ("giou", "ciou"):
        assert [record[name][side] for side in "ab"] == [figures[name] for figures in common]
        low, high = record[name]["interval"]
        assert low <= record[name]["difference"] <= high
        assert f"{100 * record[name]['difference']:+.2f}" in printed
    assert self1e(["score", "--compare", str(first), str(second), "--most", "1"]) == 0
    assert "The other 2" in capsys.readouterr().out


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(0)
    hits = generator.integers(0, 10, size=100)
    pairs = [(unit(str(n), int(I)), unit(str(n), int(I) + 1)) for n, I in enumerate(hits)]  # B is a little better
    low, high = paired_bootstrap(pairs)["giou"]
    assert 0 < low < high < 0.2  # what is hard for both does not blur it
    assert paired_bootstrap(pairs) == paired_bootstrap(pairs)
    nothing = unit("n", 0, 0, 0)
    assert paired_bootstrap([(nothing, nothing)])["ciou"] == [0, 0]


def test_other_splits_and_other_data_are_refused(files, capsys):
    for other in ([unit("z", 1)], [unit("x", 1, target=11)], []):
        first, second = files([unit("x", 1)], other)
        assert self1e(["score", "--compare", str(first), str(second)]) == 1
        assert "different" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another sentence"):
        compare_units([unit("x", 1)], [unit("x", 1, target=11)])


@pytest.mark.parametrize("flags", [["--compare"], ["--json", "x"], ["--compare", "b", "--pictures", "f"]])
def test_flags_that_do_not_fit_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        self1e(["score", "a.jsonl", *flags])
    assert stop.value.code == 2 and "--" in capsys.readouterr().err
