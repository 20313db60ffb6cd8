"""What a step costs at full depth, counted without values; the table is in docs/training.md."""

import pytest

from self1e.apps.costs import evaluation_cost, training_cost


def test_evaluation():
    """Seven sentences about an image, and thirty in two passes, which take no more memory."""
    seven, thirty = (evaluation_cost("2B", sentences=n) for n in (7, 30))
    assert seven.flops <= 6.9e12 and seven.weights == pytest.approx(4.2e9, rel=0.02)
    assert thirty.activations <= 16 / 7 * seven.activations


@pytest.mark.parametrize(
    ("checkpointing", "flops", "activations"), [("selective", 42.0e12, 20e9), ("full", 60.0e12, 2.3e9)]
)
def test_a_micro_batch_by_the_recipe(checkpointing, flops, activations):
    cost = training_cost("2B", checkpointing)
    assert cost.flops <= flops and cost.activations <= activations


def test_four_tiles_fit_one_gpu():
    """`--high_res` with full checkpointing."""
    assert training_cost("2B", "full", tiles=4).activations <= 8e9
