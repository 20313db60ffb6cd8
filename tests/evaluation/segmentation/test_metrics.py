"""Scores against cases worked out by hand, and against the published evaluation's figures."""

import numpy as np
import pytest
import torch
from helpers import GOLDEN, read_json

from self1e.evaluation.segmentation.metrics import Unit, bootstrap, count_pixels, read_units, score
from self1e.files import to_jsonl


def unit(I, predicted, target, **marks):
    return Unit(id="u", image="a.jpg", text="What?", I=I, U=predicted + target - I, target_pixels=target,
                predicted_pixels=predicted, **marks)  # fmt: skip


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_ignored_pixels_count_nowhere(kind):
    prediction = kind([[[True, True, False], [True, False, True]], [[False, False, False]] * 2])
    target = kind([[[1, 0, 1], [255, 255, 1]], [[0, 255, 0], [0, 0, 0]]])
    assert count_pixels(prediction, target) == {
        "I": [2, 0],
        "U": [4, 0],
        "target_pixels": [3, 0],
        "predicted_pixels": [3, 0],
    }


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 2, 3\)"):
        count_pixels(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 3), np.uint8))


def test_lisa_protocol():
    figures = score([unit(6, 8, 8), unit(7, 7, 10), unit(0, 5, 0), unit(0, 0, 0)])  # IoU 0.6, 0.7, 0, 1
    assert figures["protocol"] == "lisa"
    assert figures["n"] == 4
    assert figures["giou"] == pytest.approx((0.6 + 0.7 + 0 + 1) / 4)
    assert figures["ciou"] == 13 / 25
    assert [figures[f"pr@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [3 / 4, 3 / 4, 2 / 4, 1 / 4, 1 / 4]


def test_sums_are_exact_beyond_float_precision():
    big = 2**53
    assert score([unit(big, big, big), unit(1, 1, 1)])["ciou"] == 1.0
    assert score([unit(big, big, big), unit(0, 1, 0), unit(0, 1, 0)])["ciou"] == big / (big + 2)


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


def test_rela_without_one_of_the_two_kinds():
    only_targets = score([unit(1, 1, 1, no_target=False)])["rela"]
    assert (only_targets["n_acc"], only_targets["t_acc"]) == (None, 1.0)
    only_none = score([unit(0, 0, 0, no_target=True)])["rela"]
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
    for name, spread in (("giou", ious.std() / np.sqrt(len(ious))), ("ciou", None)):
        low, high = interval[name]
        assert low < figures[name] < high
        if spread:  # a mean of 200 is close to normal: 2 x 1.96 standard errors, up to the noise of 2000 draws
            assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    same = bootstrap([unit(1, 2, 2)] * 5)
    assert same["giou"] == pytest.approx([1 / 3, 1 / 3]) and same["ciou"] == pytest.approx([1 / 3, 1 / 3])
    assert bootstrap([unit(0, 0, 0)])["ciou"] == [1.0, 1.0]


def test_no_units_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        score([])


def test_units_round_trip(tmp_path):
    units = [unit(3, 4, 5, no_target=False), unit(0, 2, 0, no_target=True, mask={"size": [1, 2], "counts": "02"})]
    path = tmp_path / "grefcoco_unc_val.jsonl"
    path.write_text(to_jsonl(each.record() for each in units), encoding="utf-8")
    assert read_units(path) == units
    assert "is_sentence" not in path.read_text(encoding="utf-8")
    assert units[1].decode(1, 2).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="no mask"):
        units[0].decode(1, 2)


@pytest.mark.parametrize("line", ['{"id": "x"}', "[]", "{", '{"id": "u", "image": "a", "text": "t", "I": -1, "U": 1}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(to_jsonl([unit(1, 1, 1).record()]) + f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        read_units(path)


def test_published_scores_follow_from_their_counts():
    for split, golden in read_json(GOLDEN / "segmentation_counts.json").items():
        units = [unit(I, predicted=U, target=I) for I, U in zip(golden["I"], golden["U"], strict=True)]  # union: U
        figures = score(units)
        assert figures["n"] == golden["n"], split
        # the published meters add 1e-10 to the union and average in float
        assert figures["giou"] == pytest.approx(golden["giou"], abs=1e-9), split
        assert figures["ciou"] == pytest.approx(golden["ciou"], abs=1e-9), split
