"""A packed batch: groups of similar length, positions, and that packing changes no result."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import noise

from self1e.model.batch import PADDING_ALLOWED, pack

IDS = {"tokens": SimpleNamespace(tile_tokens=2, image_token_id=9, seg_token_id=7)}


def ids_of(lengths, side="right"):
    longest = max(lengths)
    mask = torch.tensor([[int(i < n) for i in range(longest)] for n in lengths])
    mask = mask if side == "right" else mask.flip(1)
    return torch.arange(100, 100 + mask.numel()).view_as(mask), mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [300, 301, 500, 299], [10, 11, 30, 12, 31], [40, 2]])
def test_every_token_is_in_one_group(lengths, side):
    ids, mask = ids_of(lengths, side)
    for groups in (1, 2):
        batch = pack(ids, mask, groups=groups, **IDS)
        assert len(batch.groups) <= groups
        assert sorted(batch.ids[batch.padding.bool()].tolist()) == ids[mask.bool()].tolist()
        found = []
        for part, length, padded, _ in batch.groups:
            own = batch.padding[part].view(-1, length).sum(1).tolist()
            assert length == max(own) and padded == (min(own) < length)
            found += own
        assert sorted(found) == sorted(lengths)


def test_two_groups_leave_little_padding():
    """Micro-batches of 5 images: three short conversations each, or one long one (every fourth image)."""
    rng, tokens, padding, once = np.random.default_rng(0), 0, 0, 0
    for _ in range(300):
        talks = rng.random(5) < 0.25
        lengths = [
            int(n) for talk in talks for n in (rng.integers(330, 513, 1) if talk else rng.integers(293, 312, 3))
        ]
        size = len(pack(*ids_of(lengths), **IDS).ids)
        tokens, padding, once = tokens + size, padding + size - sum(lengths), once + len(lengths) * max(lengths)
    assert padding / tokens <= PADDING_ALLOWED < 1 - (tokens - padding) / once


def test_positions():
    ids = torch.tensor([[1, 9, 9, 2, 7, 3], [9, 9, 9, 9, 4, 0], [9, 9, 7, 5, 7, 0]])
    mask = (ids > 0).long()
    labels = torch.where(ids == 7, ids, -100)
    batch = pack(ids, mask, labels, grids=[(1, 2), (1, 1)], row_image=[1, 0, 1], groups=1, **IDS)
    assert batch.image.tolist() == [1, 2, 6, 7, 8, 9, 12, 13] and batch.tiles.tolist() == [2, 0, 1, 2]
    assert batch.n_seg == [1, 0, 2] and batch.seg.tolist() == [3, 13, 15]
    assert batch.seg_image.tolist() == [1, 2, 12, 13]
    assert batch.text.tolist() == [3, 13, 15] and batch.text_labels.tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match=r"hold \[2, 4, 2\] image tokens, their images fill \[2, 4, 4\]"):
        pack(ids, mask, grids=[(1, 2), (1, 1)], row_image=[1, 0, 0], **IDS)


def mixed(processor, **options) -> dict:
    texts = ["It is [SEG].", "A thing." + " yes" * 40, "[SEG] and [SEG].", "Two."]
    masks = [np.ones((text.count("[SEG]"), 9, 9), np.uint8) for text in texts]
    encoded = [processor.encode(noise(56, 56), [["<image>\nWhat?", text] for text in texts], masks)]
    return dict(processor.collate(encoded, **options))


def test_two_groups_one_group_and_the_public_keys_give_the_same(load_tiny, tiny_processor):
    model, (one, two, public) = load_tiny(), (mixed(tiny_processor, groups=n) for n in (1, 2, None))
    assert [len(batch["packed"].groups) for batch in (one, two)] == [1, 2] and "packed" not in public
    expected = model(**two)
    for found in (model(**one), model(**public)):
        torch.testing.assert_close(found.loss, expected.loss)
        for ours, theirs in zip(found.mask_logits, expected.mask_logits):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
