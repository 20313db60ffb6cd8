"""Mask losses against the formulas, pixel by pixel."""

import math

import pytest
import torch

from self1e.model.losses import MASK_LOSSES, SHORT_SIDE, bce, dice, mask_losses, shrink_target


def example(seed: int, masks: int, h: int, w: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(masks, h, w, generator=generator) * 3
    return logits, (torch.rand(masks, h, w, generator=generator) > 0.6).to(torch.uint8)


def bce_by_hand(logits, target) -> float:
    terms = []
    for x, t in zip(logits.flatten().tolist(), target.flatten().tolist()):
        p = 1 / (1 + math.exp(-x))
        terms.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
    return sum(terms) / len(terms)


def dice_by_hand(logits, target) -> float:
    p, t = logits.sigmoid().double().flatten(), target.double().flatten()
    return float(1 - (2 * (p * t).sum() / 1000 + 1e-6) / (p.sum() / 1000 + t.sum() / 1000 + 1e-6))


@pytest.mark.parametrize("soft", [False, True])
def test_formulas(soft):
    logits, target = example(0, 3, 5, 7)
    target = target.float() * (0.3 if soft else 1)
    for m in range(3):
        assert bce(logits, target)[m].item() == pytest.approx(bce_by_hand(logits[m], target[m]), rel=1e-5)
        assert dice(logits, target)[m].item() == pytest.approx(dice_by_hand(logits[m], target[m]), rel=1e-5)


def test_extremes():
    target = torch.zeros(2, 40, 40)
    target[0, :20] = 1
    sure = (target * 2 - 1) * 50
    assert dice(sure, target).tolist() == pytest.approx([0, 0], abs=1e-5)  # an empty mask, found empty, costs nothing
    assert bce(sure, target).max() < 1e-6
    assert dice(-sure, target).tolist() == pytest.approx([1, 1], abs=1e-3)
    assert torch.isfinite(bce(sure * 1e4, 1 - target)).all()


SHRUNK = {(128, 500): (128, 500), (50, 60): (50, 60), (256, 300): (128, 150), (333, 200): (213, 128)}


@pytest.mark.parametrize(("size", "shrunk"), SHRUNK.items())
def test_short_side_is_128_at_most(size, shrunk):
    target = torch.ones(2, *size, dtype=torch.uint8)
    result = shrink_target(target)
    assert SHORT_SIDE == 128 and result.shape == (2, *shrunk) and result.dtype == torch.float32
    assert torch.equal(result, torch.ones(2, *shrunk))


def test_shrunk_edges_are_soft_and_not_antialiased():
    target = torch.zeros(1, 256, 256, dtype=torch.uint8)
    target[:, :, :101] = 1  # the edge falls within a pair of pixels
    result = shrink_target(target)[0]
    assert result[0, 48:53].tolist() == [1, 1, 0.5, 0, 0]
    quarter = torch.zeros(1, 512, 512, dtype=torch.uint8)
    quarter[:, :, 0::4] = 1  # antialiasing would make it 1/4 everywhere; two central samples of four see nothing
    assert not shrink_target(quarter).any()


def test_sum_over_masks_and_predictions_mean_over_all_conversations():
    (a, a_target), (b, b_target) = example(1, 2, 6, 4), example(2, 1, 6, 4)
    auxiliary = example(3, 2, 6, 4)[0]
    nothing = torch.zeros(0, 6, 4)
    predictions = [[a, b, nothing, b], [auxiliary, b, nothing, b]]
    found = mask_losses(predictions, [a_target, b_target, torch.zeros(0, 9, 9), None])
    pairs = [(a[0], a_target[0]), (a[1], a_target[1]), (auxiliary[0], a_target[0]), (auxiliary[1], a_target[1])]
    pairs += [(b[0], b_target[0])] * 2
    assert found["mask_bce"].item() == pytest.approx(sum(bce_by_hand(*pair) for pair in pairs) / 4, rel=1e-5)
    assert found["mask_dice"].item() == pytest.approx(sum(dice_by_hand(*pair) for pair in pairs) / 4, rel=1e-5)


def test_predictions_are_resized_to_the_target():
    logits = torch.tensor([[[-4.0, 4.0]]])
    target = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    resized = torch.tensor([[[-4.0, -2, 2, 4]]])
    found = mask_losses([[logits]], [target])["mask_bce"].item()
    assert found == pytest.approx(bce_by_hand(resized, target), rel=1e-5)


def test_no_masks_at_all_cost_nothing():
    found = mask_losses([[torch.zeros(0, 4, 4)] * 2], [None, None])
    assert {name: value.item() for name, value in found.items()} == dict.fromkeys(MASK_LOSSES, 0)


def test_half_precision_logits_are_summed_in_float32():
    logits, target = example(4, 1, 128, 128)
    found = mask_losses([[logits.bfloat16()]], [target])
    assert found["mask_dice"].dtype == torch.float32
    assert found["mask_bce"].item() == pytest.approx(bce_by_hand(logits.bfloat16().float(), target), rel=1e-4)
