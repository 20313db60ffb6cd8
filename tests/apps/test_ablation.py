"""The ablation from one command to its report, at the smallest size; its measures on masks made by hand."""

import re

import pytest
import torch
from helpers import read_json

from self1e.apps.ablation import report, row, run
from self1e.apps.ablation.measure import figures
from self1e.apps.ablation.suites import CLAIMS, MEASURES, SUITES
from self1e.model.head import HEADS, AmplifiedHead, SegmentationHead

FEW = ["--seeds", "1", "--jobs", "2", "--steps", "2", "--warmup_steps", "2", "--train", "12", "--val", "2"]


def test_one_command_trains_measures_reports_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.SUITES, "method", ("rfr", "full"))  # one with the checkpoint's head, one without
    monkeypatch.setattr(
        report, "CLAIMS", [claim for claim in CLAIMS if (claim.better, claim.worse) == ("full", "rfr")]
    )
    command = ["--suite", "method", *FEW, "--output", str(tmp_path)]
    assert run.main([*command, "--budget", "0"]) == 1  # warmed up, no row started
    assert "2 of 2 rows are not trained yet" in capsys.readouterr().err
    assert run.main(command) == 0, capsys.readouterr().err
    found = read_json(tmp_path / "report/ablation.json")
    assert {row: list(seeds) for row, seeds in found["scores"]["method"].items()} == {"rfr": ["0"], "full": ["0"]}
    assert all(set(seeds["0"]) == set(MEASURES) for seeds in found["scores"]["method"].values())
    assert "not decidable (one seed)" in (tmp_path / "report/ablation.md").read_text()
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"bars.png", "curves.png"}

    starts = {"run/ckpt_model": "rfa", "headless": "baseline"}
    assert {name: read_json(tmp_path / "warmup" / name / "config.json")["mask_features"] for name in starts} == starts

    first = (tmp_path / "full_0/units.jsonl").read_bytes()
    (tmp_path / "full_0").rename(tmp_path / "moved")
    stamp = (tmp_path / "rfr_0/units.jsonl").stat().st_mtime_ns
    assert run.main(command) == 0
    assert (tmp_path / "full_0/units.jsonl").read_bytes() == first  # a second run of a row gives the same digits
    assert (tmp_path / "rfr_0/units.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="settings.json"):
        run.main([*command, "--steps", "3"])


def test_the_shared_warm_up_trains_the_masks_of_the_full_method_and_of_the_baseline():
    torch.manual_seed(0)
    shared, full, baseline = row.SharedHead(8, ratio=2), AmplifiedHead(8, ratio=2), SegmentationHead(8, ratio=2)
    full.load_state_dict(shared.state_dict())
    image, seg, low, high = (torch.randn(shape) for shape in ((2, 2, 2, 8), (2, 3, 8), (1, 2, 2, 8), (1, 4, 4, 8)))
    sides = shared.image_side(low, high)
    mask, auxiliary = shared(image, seg, sides * 2)
    assert torch.equal(mask, full(image, seg, sides * 2)[0])
    assert torch.equal(auxiliary[0], full(image, seg, sides * 2)[1][0])
    own = baseline(image, seg, sides * 2)[0]
    assert torch.allclose(auxiliary[1], torch.nn.functional.interpolate(own, (4, 4), mode="bilinear")[1])


def test_every_claim_is_about_rows_of_its_suite():
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= set(SUITES[claim.suite]) and set(claim.measures) <= set(MEASURES)


def unit(**counts) -> dict:
    base = {"id": "0", "image": "a", "text": "b", "no_target": False}
    return (
        base | {"split": "thin", "target_pixels": 0, "predicted_pixels": 0, "boundary_I": 0, "boundary_U": 0} | counts
    )


def test_figures_by_hand():
    found = figures(
        [
            unit(I=1, U=2, boundary_I=1, boundary_U=4),
            unit(I=3, U=3, boundary_I=2, boundary_U=2),
            unit(I=0, U=0, no_target=True),
            unit(I=0, U=5, predicted_pixels=5, no_target=True),
        ]
    )
    assert found == {
        "ciou": pytest.approx(4 / 10),
        "giou": pytest.approx((0.5 + 1 + 1 + 0) / 4),
        "n_acc": 0.5,
        "boundary_iou": pytest.approx((0.25 + 1) / 2),
    }


def test_the_warm_up_alone_has_the_shared_head(tmp_path, monkeypatch):
    monkeypatch.setitem(HEADS, "rfa", AmplifiedHead)
    heads = []
    monkeypatch.setattr(row, "train", lambda flags: heads.append(HEADS["rfa"]) or 1)
    for benchmark in ("benchmark", ""):
        assert row.main([str(tmp_path), benchmark]) == 1
    assert heads == [AmplifiedHead, row.SharedHead]


def test_a_difference_is_paired_by_seed_and_its_table_names_mean_and_deviation():
    worse = {0: 0.1, 1: 0.3, 2: 0.2}
    better = {0: 0.2, 1: 0.5, 3: 0.9}  # seed 3 has no partner, seed 2 neither
    scores = [{seed: dict.fromkeys(MEASURES, value) for seed, value in row.items()} for row in (better, worse)]
    found = report.compare(*scores, "ciou", at_least=False)
    assert found["differences"] == pytest.approx([0.1, 0.2]) and found["mean"] == pytest.approx(0.15)
    assert found["interval"] == pytest.approx((0.15 - 12.706 * 0.05, 0.15 + 12.706 * 0.05))
    text = report.markdown({"method": {"full": scores[1]}}, [{"claim": "a < b", "results": [found]}], [7, 9])
    text = re.sub(" +", " ", text)  # columns are padded so that they line up
    assert "| RFA (full) | 3 | 0.200 ± 0.100 |" in text
    assert "| a < b | cIoU, all | +0.150 (-0.485 to +0.785) | not decidable at this scale |" in text
    assert "2 rows; a row took 8 s in the median and 9 s at most." in text


def test_verdicts_follow_from_the_interval():
    low, high = report.interval([0.1, 0.2, 0.3])
    assert (low, high) == pytest.approx((0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5))
    assert report.interval([0.1]) is None
    assert report.verdict((0.01, 0.2), False) == report.verdict((0.01, 0.2), True) == "holds"
    assert report.verdict((-0.2, -0.01), True) == "does not hold"
    assert report.verdict((-0.1, 0.1), False) == "not decidable at this scale"
    assert report.verdict((-0.1, 0.1), True) == "not contradicted"


def test_a_failing_row_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(run.Settings, "lr", -1.0)
    monkeypatch.setattr(run, "prepare", lambda output, settings: None)
    with pytest.raises(ValueError, match="training ended with code"):
        run.main([*FEW, "--jobs", "1", "--suite", "auxiliary", "--output", str(tmp_path)])
    assert not list(tmp_path.glob("full_0"))
