"""Scores against cases worked out by hand, and against the published evaluation's figures."""

import numpy as np
import pytest
from helpers import GOLDEN, read_json

from self1e.errors import UserError
from self1e.evaluation.segmentation.metrics import Unit, bootstrap, boundary, count_pixels, read_units, score
from self1e.files import to_jsonl


def unit(I, predicted, target, **marks):
    return Unit(id="u", image="a.jpg", text="What?", I=I, U=predicted + target - I, target_pixels=target,
                predicted_pixels=predicted, **marks)  # fmt: skip


def test_ignored_pixels_count_nowhere():
    prediction = np.array([[True, True, False], [True, False, True]])
    target = np.array([[1, 0, 1], [255, 255, 1]])
    counts = {"I": 2, "U": 4, "target_pixels": 3, "predicted_pixels": 3}
    assert counts.items() <= count_pixels(prediction, target).items()
    assert set(count_pixels(prediction & False, target & 0).values()) == {0}
    with pytest.raises(AssertionError, match=r"\(2, 3\).*\(3, 2\)"):
        count_pixels(prediction, target.T)


def test_boundary_is_a_band_along_the_contour_and_the_edge_of_the_photo():
    mask = np.zeros((100, 100), bool)
    mask[20:80, 30:] = True
    expected = mask.copy()
    expected[23:77, 33:97] = False  # 2% of the diagonal are 3 pixels
    assert np.array_equal(boundary(mask), expected)
    counts = count_pixels(mask, np.roll(mask, 3, axis=0).astype(np.uint8))
    assert 0 < counts["boundary_I"] / counts["boundary_U"] < counts["I"] / counts["U"]
    figures = score([unit(1, 1, 2, boundary_I=1, boundary_U=4), unit(0, 3, 0, boundary_I=0, boundary_U=3)])
    assert figures["boundary_iou"] == 0.25  # over sentences with a target


def test_lisa_protocol():
    figures = score([unit(6, 8, 8), unit(7, 7, 10), unit(0, 5, 0), unit(0, 0, 0)])  # IoU 0.6, 0.7, 0, 1
    assert figures["protocol"] == "lisa"
    assert figures["n"] == 4
    assert figures["giou"] == pytest.approx((0.6 + 0.7 + 0 + 1) / 4)
    assert figures["ciou"] == 13 / 25
    assert [figures[f"pr@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [3 / 4, 3 / 4, 2 / 4, 1 / 4, 1 / 4]
    big = 2**53  # beyond the precision of floats
    assert score([unit(big, big, big), unit(0, 1, 0), unit(0, 1, 0)])["ciou"] == big / (big + 2)
    with pytest.raises(UserError, match="empty"):
        score([])


def test_rela_protocol():
    units = [
        unit(8, 9, 9, no_target=False),  # IoU 0.8
        unit(0, 0, 10, no_target=False),  # target taken for none
        unit(0, 0, 0, no_target=True),  # none, found
        unit(0, 6, 0, no_target=True),  # none, missed: its area joins the union
        unit(0, 4, 0, no_target=True),
    ]
    figures = score(units)
    assert figures["protocol"] == "rela"
    rela = figures["rela"]
    assert (rela["n_target"], rela["n_no_target"]) == (2, 3)
    assert rela["giou"] == pytest.approx((0.8 + 0 + 1 + 0 + 0) / 5)
    assert rela["ciou"] == 8 / (10 + 10 + 6 + 4)
    assert [rela[f"pr@{t}"] for t in (0.7, 0.8, 0.9)] == [0.5, 0.5, 0.0]
    assert (rela["n_acc"], rela["t_acc"]) == (1 / 3, 1 / 2)
    only_targets, only_none = (score([each])["rela"] for each in (units[0], units[2]))
    assert (only_targets["n_acc"], only_targets["t_acc"]) == (None, 1.0)
    assert (only_none["n_acc"], only_none["t_acc"], only_none["pr@0.7"], only_none["giou"]) == (1.0, None, None, 1.0)


def test_reasonseg_short_and_long_queries_apart():
    units = [unit(1, 1, 2, is_sentence=False), unit(3, 4, 3, is_sentence=True), unit(1, 4, 1, is_sentence=True)]
    figures = score(units)
    assert figures["protocol"] == "reasonseg"
    assert (figures["short"]["n"], figures["short"]["giou"]) == (1, 0.5)
    assert (figures["long"]["n"], figures["long"]["giou"], figures["long"]["ciou"]) == (2, 0.5, 4 / 8)
    assert score(units[1:])["short"]["ciou"] is None  # no short query at all


def test_bootstrap_interval():
    units = [unit(int(I), 100, 100) for I in np.random.default_rng(1).integers(0, 101, size=200)]
    interval, figures = bootstrap(units), score(units)
    assert interval == bootstrap(units)  # seeded
    ious = np.array([u.iou for u in units])
    low, high = interval["giou"]
    assert low < figures["giou"] < high and interval["ciou"][0] < figures["ciou"] < interval["ciou"][1]
    # a mean of 200 is close to normal: 2 x 1.96 standard errors, up to the noise of 2000 draws
    assert high - low == pytest.approx(2 * 1.96 * ious.std() / np.sqrt(len(ious)), rel=0.1)
    assert bootstrap([unit(0, 0, 0)])["ciou"] == [1.0, 1.0]


def test_units_round_trip(tmp_path):
    units = [unit(3, 4, 5, no_target=False), unit(0, 2, 0, no_target=True, mask={"size": [1, 2], "counts": "02"})]
    path = tmp_path / "a.jsonl"
    path.write_text(to_jsonl(map(vars, units)), encoding="utf-8")
    assert read_units(path) == units


def test_published_scores_follow_from_their_counts():
    for split, golden in read_json(GOLDEN / "segmentation_counts.json").items():
        units = [unit(I, predicted=U, target=I) for I, U in zip(golden["I"], golden["U"], strict=True)]  # union: U
        figures = score(units)
        assert figures["n"] == golden["n"], split
        # the published meters add 1e-10 to the union and average in float
        assert figures["giou"] == pytest.approx(golden["giou"], abs=1e-9), split
        assert figures["ciou"] == pytest.approx(golden["ciou"], abs=1e-9), split
