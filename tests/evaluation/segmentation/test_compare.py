"""`self1e score`: figures from JSONL, and the comparison of two evaluations."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from segmentation_trees import REASON, make_dataset

from self1e.cli import main as self1e
from self1e.data.splits import SPLITS, load_split
from self1e.evaluation.segmentation.compare import compare_units, paired_bootstrap
from self1e.evaluation.segmentation.metrics import Unit, score
from self1e.evaluation.segmentation.run import make_units
from self1e.files import to_jsonl


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


def test_figures_are_recomputed(files, tmp_path, capsys):
    units = [unit("x", 3), unit("y", 10)]
    first, second = map(str, files(units, [replace(each, is_sentence=False) for each in units]))
    assert self1e(["score", first, second, "--json", str(tmp_path / "all.json")]) == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    assert record[first] == score(units) and record[second]["protocol"] == "reasonseg"
    giou, ciou = (f"{100 * record[first][name]:.1f}" for name in ("giou", "ciou"))
    assert f"| {first} | 2 | {giou} | {ciou} |" in " ".join(printed.split())
    assert printed.count("95% interval") == 2 and str(tmp_path / "all.json") in printed.splitlines()[-1]


def test_differences_come_worst_first_with_figures_and_interval(files, tmp_path, capsys):
    a = [unit("same", 5), unit("better", 2), unit("worse", 9), unit("worst", 10), unit("only a", 1)]
    b = [unit("worst", 0), unit("same", 5), unit("worse", 8), unit("better", 8)]
    first, second = files(a, b)
    assert self1e(["score", "--compare", str(first), str(second), "--json", str(tmp_path / "c.json")]) == 0
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert [entry["id"] for entry in record["differing"]] == ["worst", "worse", "better"]
    assert printed.index("worst") < printed.index("worse ") < printed.index("better") and "same" not in printed
    assert (
        all(f"{name.upper()}: {record[name]}\n" in printed for name in ("a", "b"))
        and str(tmp_path / "c.json") in printed
    )
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
    others = {"different splits": [unit("z", 1)], "different data": [unit("x", 1, target=11)], "b.jsonl holds no": []}
    for message, other in others.items():
        first, second = files([unit("x", 1)], other)
        assert self1e(["score", "--compare", str(first), str(second)]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="another sentence"):
        compare_units([unit("x", 1)], [unit("x", 1, target=11)])


@pytest.mark.parametrize("flags", [["--compare"], ["--split", "x"], ["--compare", "b", "--pictures", "f"]])
def test_flags_that_do_not_fit_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        self1e(["score", "a.jsonl", *flags])
    assert stop.value.code == 2 and "--" in capsys.readouterr().err


@pytest.fixture
def predicted(files, tmp_path):
    """ReasonSeg val and two evaluations of it: A finds both targets, B finds a third of the first and nothing else."""
    split = load_split(REASON, make_dataset(tmp_path / "dataset"))
    evaluations = []
    for found in ((1, 1), (1 / 3, 0)):
        units = []
        for photo, share in zip(split, found):
            targets = photo.load()[1]
            masks = (targets == 1) & (np.arange(targets.shape[1]) < 4 + 27 * share)[:, None]  # target rows 4 to 30
            units += make_units(photo, SPLITS[REASON], masks, targets)
        evaluations.append(units)
    first, second = files(*evaluations)
    first.with_suffix(".json").write_text(json.dumps({"split": REASON}))
    return [str(first), str(second), "--dataset_dir", str(tmp_path / "dataset")]


def test_pictures_show_what_b_lost_most_on_first(predicted, tmp_path, capsys):
    assert self1e(["score", "--compare", *predicted, "--pictures", str(tmp_path / "drawn")]) == 0
    overview = tmp_path / "drawn/overview.png"
    assert capsys.readouterr().out.endswith(f"pictures, those that B lost most on first: {overview}\n")
    drawn = sorted(path.name for path in (tmp_path / "drawn").glob("*.jpg"))
    assert drawn == ["0001_change-1.00_1.jpg", "0002_change-0.67_0.jpg"]
    with Image.open(tmp_path / "drawn" / drawn[0]) as picture, Image.open(overview) as sheet:
        assert sheet.width > picture.width  # both units beside each other
        quarters = np.split(np.asarray(picture.convert("RGB"), np.int16)[:, : picture.width // 4 * 4], 4, axis=1)
    orange = [float(np.mean(q[..., 0] - q[..., 2] > 60)) for q in quarters]  # photo, ground truth, A, B
    assert orange[2] > 0.15 and max(orange[:2] + orange[3:]) < 0.05


def test_a_missing_photo_is_named_and_the_comparison_is_kept(predicted, tmp_path, capsys):
    photos = tmp_path / "dataset/reason_seg/ReasonSeg/val"
    (photos / "0.jpg").write_bytes(b"no photo")
    flags = ["--pictures", str(tmp_path / "drawn"), "--json", str(tmp_path / "c.json")]
    assert self1e(["score", "--compare", *predicted, *flags]) == 1
    printed = capsys.readouterr()
    assert "B - A" in printed.out and len(json.loads((tmp_path / "c.json").read_text())["differing"]) == 2
    assert "0.jpg: cannot read" in printed.err and printed.err.count("error") == 1
    assert (tmp_path / "drawn/0001_change-1.00_1.jpg").is_file()  # the other one
    (photos / "0.jpg").unlink()
    assert self1e(["score", "--compare", *predicted, *flags]) == 1
    assert "is not in ReasonSeg|val" in capsys.readouterr().err
    shutil.rmtree(photos)
    assert self1e(["score", "--compare", *predicted, *flags]) == 1
    assert "missing data" in capsys.readouterr().err
