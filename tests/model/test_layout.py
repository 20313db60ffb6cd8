"""The layout of a batch: groups of similar length, positions, and what a stale or absent one means."""

import numpy as np
import pytest
import torch
from helpers import noise

from self1e.model import modeling
from self1e.model.layout import PADDING_ALLOWED, PackedMasks, read_layout

PLACES = {"tile_tokens": 2, "image_token_id": 9, "seg_token_id": 7}


def ids_of(lengths, side="right"):
    longest = max(lengths)
    mask = torch.tensor([[int(i < n) for i in range(longest)] for n in lengths])
    mask = mask if side == "right" else mask.flip(1)
    return torch.arange(100, 100 + mask.numel()).view_as(mask), mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [300, 301, 500, 299], [10, 11, 30, 12, 31], [40, 2]])
def test_every_token_is_in_one_group(lengths, side):
    ids, mask = ids_of(lengths, side)
    layout = read_layout(ids, mask, **PLACES)
    assert sorted(row for group in layout.groups for row in group.rows) == list(range(len(lengths)))
    assert len(layout.groups) <= 2
    source, filled = layout.part("source"), layout.part("padding_mask").bool()
    assert sorted(ids.flatten()[source[filled]].tolist()) == ids[mask.bool()].tolist()
    for group, part in layout.split():
        assert group.length == max(lengths[row] for row in group.rows)
        assert group.padded == any(lengths[row] < group.length for row in group.rows)
        found = layout.part("padding_mask")[part].view(len(group.rows), -1).sum(1).tolist()
        assert found == [lengths[row] for row in group.rows]
    whole = read_layout(ids, mask, whole=True, **PLACES)
    assert whole.whole and whole.part("source").tolist() == list(range(ids.numel()))


def test_two_groups_leave_little_padding():
    """Micro-batches of 5 photos: three short rows each, or one long conversation (every fourth photo)."""
    rng, tokens, padding, once = np.random.default_rng(0), 0, 0, 0
    for _ in range(300):
        talks = rng.random(5) < 0.25
        lengths = [
            int(n) for talk in talks for n in (rng.integers(330, 513, 1) if talk else rng.integers(293, 312, 3))
        ]
        layout = read_layout(*ids_of(lengths), **PLACES)
        size = sum(len(group.rows) * group.length for group in layout.groups)
        tokens, padding, once = tokens + size, padding + size - sum(lengths), once + len(lengths) * max(lengths)
    assert padding / tokens <= PADDING_ALLOWED < 1 - (tokens - padding) / once


def test_rows_in_two_groups_give_the_results_of_one(load_tiny, tiny_processor, monkeypatch):
    model = load_tiny()
    texts = ["It is [SEG].", "A thing." + " yes" * 40, "[SEG] and [SEG].", "Two."]
    masks = [np.ones((text.count("[SEG]"), 9, 9), np.uint8) for text in texts]
    encoded = [tiny_processor.encode(noise(56, 56), [["<image>\nWhat?", text] for text in texts], masks)]
    batch = dict(tiny_processor.collate(encoded))
    assert len(batch["layout"].groups) == 2
    found = model(**batch)
    monkeypatch.setattr(modeling, "is_deepspeed_zero3_enabled", lambda: True)  # one group there
    passes = []
    model.model.language_model.register_forward_hook(lambda *args: passes.append(1))
    expected = model(**batch)
    assert len(passes) == 1
    torch.testing.assert_close(found.loss, expected.loss)
    for ours, theirs in zip(found.mask_logits, expected.mask_logits):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_ids_changed_by_hand_are_read_again(load_tiny, tiny_processor):
    """On the CPU a layout that came with the batch is not trusted; without one, the batch is read."""
    model = load_tiny()
    encoded = [tiny_processor.encode(noise(56, 56), [["<image>\nWhat?", "It is [SEG] yes."]])]
    batch = dict(tiny_processor.collate(encoded))
    assert len(model(**batch).mask_logits[0]) == 1
    batch["input_ids"][batch["input_ids"] == model.config.seg_token_id] = 5
    assert len(model(**batch).mask_logits[0]) == 0
    del batch["layout"]
    assert len(model(**batch).mask_logits[0]) == 0


def test_packed_masks_read_like_their_list():
    masks = [
        torch.ones(2, 3, 4, dtype=torch.uint8),
        None,
        torch.zeros(0, 5, 6, dtype=torch.uint8),
        torch.ones(1, 1, 2),
    ]
    packed = PackedMasks([*masks[:3], masks[3].bool()])
    assert len(packed) == 4 and packed[1] is None
    assert [None if x is None else tuple(x.shape) for x in packed] == [(2, 3, 4), None, (0, 5, 6), (1, 1, 2)]
    assert torch.equal(packed[0], masks[0]) and packed[-1].dtype == torch.uint8 and len(packed[:2]) == 2
    with pytest.raises(ValueError, match="float32; expected uint8"):
        PackedMasks(masks)
