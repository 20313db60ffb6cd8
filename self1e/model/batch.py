"""What the forward pass has to know of a batch, read once and on the host, so that nothing waits for the GPU.

Conversations go through the LLM in at most two groups of similar length, each padded to its own longest. What they
hold (image tokens, the positions that predict `[SEG]`, the supervised text) is addressed by *packed* positions, which
count through the tokens of the groups one after another.

Legend: R conversations, N tokens of the longest, P packed tokens of all groups, padding included, L image tokens per
side of a tile.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that the cross-entropy passes over
PADDING_ALLOWED = 0.03  # share of the LLM's tokens above which conversations are split into two groups


class Group(NamedTuple):
    """Conversations that go through the LLM together, padded to one length."""

    part: slice  # of the packed positions
    length: int  # tokens of each conversation
    padded: bool  # False where all of them are that long
    segments: bool  # whether one holds a `[SEG]`


class Packed(NamedTuple):
    """A batch as `Self1EForSegmentation.forward` reads it; made by `pack`."""

    ids: Tensor  # (P,) token ids, 0 at padding
    padding: Tensor  # (P,), 1 at tokens, 0 at padding, which follows the tokens of its conversation
    image: Tensor  # packed positions of the image tokens, conversation by conversation
    tiles: Tensor  # the tile that fills each L * L of them
    seg_image: Tensor  # those of `image` whose conversation holds a `[SEG]`
    seg: Tensor  # (m,) packed positions that predict each `[SEG]`
    text: Tensor  # (k,) packed positions that predict supervised tokens
    text_labels: Tensor  # (k,) these tokens
    groups: list[Group]
    grids: list[tuple[int, int]]  # per image rows and columns of its tiles
    row_image: list[int]  # per conversation its image, empty for text alone
    n_seg: list[int]  # `[SEG]`s per conversation


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    grids: Tensor | Sequence | None = None,
    row_image: Tensor | Sequence[int] | None = None,
    *,
    tokens: Any,
    groups: int = 2,
) -> Packed:
    """Read a batch; tensors on a GPU are copied to the host, so a data worker should do it.

    Args:
        input_ids, attention_mask, labels: (R, N) as for the model's `forward`.
        grids, row_image: as in `Packed`; None for text without images.
        tokens: a configuration or a processor, for its `image_token_id`, `seg_token_id` and `tile_tokens`.
        groups: the most groups, 1 or 2.

    Raises ValueError when the image tokens of a conversation are not as many as its image fills.
    """
    ids = input_ids.cpu().numpy()
    count, longest = ids.shape
    present = np.ones_like(ids, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    targets = np.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu().numpy()
    shapes, images = ([] if x is None else torch.as_tensor(x).tolist() for x in (grids, row_image))
    first, end = present.argmax(1), longest - present[:, ::-1].argmax(1)
    lengths = end - first
    made: list[Group] = []
    blocks: list[np.ndarray] = []  # of each group the ids, padding and labels of its packed tokens
    spans = [slice(0)] * count  # packed positions of each conversation
    for members in similar(lengths) if groups == 2 else [np.arange(count)]:
        begin, length = made[-1].part.stop if made else 0, int(lengths[members].max())
        columns = first[members, None] + np.arange(length)  # padding of either side comes last
        block = np.stack([x[members[:, None], np.minimum(columns, longest - 1)] for x in (ids, present, targets)])
        block[:, columns >= end[members, None]] = [[0], [0], [IGNORE_INDEX]]  # 3 r n
        block[2, :, 0] = IGNORE_INDEX  # no token predicts the first one
        for number, start in zip(members, range(begin, begin + block[0].size, length)):
            spans[number] = slice(start, start + length)
        part, segments = slice(begin, begin + block[0].size), bool((block[0] == tokens.seg_token_id).any())
        made.append(Group(part, length, not block[1].all(), segments))
        blocks.append(block.reshape(3, -1))
    packed, padding, packed_labels = np.concatenate(blocks, axis=1)
    kinds = tokens.image_token_id, tokens.seg_token_id
    image, seg = ([span.start + np.flatnonzero(packed[span] == kind) for span in spans] for kind in kinds)
    n_image, expected = [len(x) for x in image], [tokens.tile_tokens * math.prod(shapes[i]) for i in images]
    if images and n_image != expected:
        raise ValueError(f"conversations hold {n_image} image tokens, their images fill {expected}: was the text cut?")
    tile = [0, *accumulate(map(math.prod, shapes))]  # the first of each image
    text = np.flatnonzero(packed_labels[1:] != IGNORE_INDEX)
    tensors = {
        "ids": packed,
        "padding": padding,
        "image": np.concatenate(image) if images else packed[:0],
        "tiles": np.array([number for i in images for number in range(tile[i], tile[i + 1])]),
        "seg_image": np.concatenate([x if len(asked) else x[:0] for x, asked in zip(image, seg)]),
        "seg": np.concatenate(seg) - 1,
        "text": text,
        "text_labels": packed_labels[text + 1],
    }
    arrays = {name: torch.from_numpy(x.astype(np.int64)) for name, x in tensors.items()}
    return Packed(**arrays, groups=made, grids=shapes, row_image=images, n_seg=[len(x) for x in seg])


def similar(lengths: np.ndarray) -> list[np.ndarray]:
    """Conversations in one group, or in two when that leaves less padding and one leaves more than is allowed."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    cost = [ordered[cut - 1] * cut * (cut > 0) + ordered[-1] * (len(ordered) - cut) for cut in range(len(ordered))]
    cut = int(np.argmin(cost)) if cost[0] > lengths.sum() / (1 - PADDING_ALLOWED) else 0
    return [np.sort(members) for members in np.split(order, [cut]) if len(members)]
