"""What the forward pass has to know of a batch, read once and on the host, so that nothing waits for the GPU.

Conversations go through the LLM in at most two groups of similar length, each padded to its own longest. What they
hold (image tokens, the positions that predict `[SEG]`, the supervised text) is addressed by *packed* positions, which
count through the tokens of the groups one after another.

Legend: R conversations, N tokens of the longest, P packed tokens of all groups, padding included, L image tokens per
side of a tile.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that the cross-entropy passes over
PADDING_ALLOWED = 0.03  # share of the LLM's tokens above which conversations are split into two groups
Grid = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Conversations that go through the LLM together, `length` tokens each.

    `padded` unless all of them are that long; `segments` when one holds a `[SEG]`.
    """

    conversations: tuple[int, ...]
    length: int
    padded: bool
    segments: bool


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch as `Self1EForSegmentation.forward` reads it; made by `pack`.

    Args:
        ids: (P,) token ids. padding: (P,), 1 at tokens, 0 at padding.
        image: packed positions of the image tokens, conversation by conversation; tiles: the tile that fills each
            L * L of them. seg_image: those of `image` whose conversation holds a `[SEG]`.
        seg: (m,) packed positions that predict each `[SEG]`.
        text: (k,) packed positions that predict supervised tokens; text_labels: (k,) these tokens.
        groups: of the LLM. grids: per image (rows, columns) of its tiles. row_image: per conversation its image, empty
            for text alone. n_seg: `[SEG]`s per conversation.
    """

    ids: Tensor
    padding: Tensor
    image: Tensor
    tiles: Tensor
    seg_image: Tensor
    seg: Tensor
    text: Tensor
    text_labels: Tensor
    groups: tuple[Group, ...]
    grids: tuple[Grid, ...]
    row_image: tuple[int, ...]
    n_seg: tuple[int, ...]

    def split(self) -> Iterator[tuple[Group, slice]]:
        """Each group with its packed positions."""
        start = 0
        for group in self.groups:
            stop = start + len(group.conversations) * group.length
            yield group, slice(start, stop)
            start = stop

    def to(self, device, *args, non_blocking: bool = True, **kwargs) -> "Packed":
        """The same with its tensors on `device`."""
        return self._with(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packed":
        """The same in pinned memory, which a DataLoader asks for so that the copy to the GPU does not block."""
        return self._with(Tensor.pin_memory)

    def _with(self, change) -> "Packed":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(x) for name, x in tensors.items() if isinstance(x, Tensor)})


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    grids: Tensor | Sequence[Grid] | None = None,
    row_image: Tensor | Sequence[int] | None = None,
    tile_tokens: int,
    image_token_id: int,
    seg_token_id: int | None,
    groups: int = 2,
) -> Packed:
    """Read a batch; tensors on a GPU are copied to the host, so a data worker should do it.

    Args:
        input_ids, attention_mask, labels: (R, N) as for the model's `forward`.
        grids, row_image: as in `Packed`, or as tensors; None for text without images.
        tile_tokens: L * L.
        groups: the most groups, 1 or 2.

    Raises:
        ValueError: the image tokens of a conversation are not as many as its image fills.
    """
    ids = input_ids.cpu().numpy()
    count, longest = ids.shape
    present = np.ones_like(ids, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    shapes = as_grids(() if grids is None else grids)
    images = torch.as_tensor(() if row_image is None else row_image).tolist()
    first, last = present.argmax(1), longest - present[:, ::-1].argmax(1)
    made, sources = [], []
    for members in similar(last - first) if groups == 2 else [range(count)]:
        length = int(max(last[i] - first[i] for i in members))
        starts = [i * longest + min(int(first[i]), longest - length) for i in members]
        places = np.concatenate([start + np.arange(length) for start in starts])
        padded, segments = not present.flat[places].all(), bool((ids.flat[places] == seg_token_id).any())
        made.append(Group(tuple(members), length, padded, segments))
        sources.append(places)
    source = np.concatenate(sources)  # of each packed token, its place in `ids.flat`
    packed, owner = ids.flat[source], source // longest  # and its conversation

    def positions(token: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Packed positions of a token, conversation by conversation, and how many each one has."""
        found = np.flatnonzero(packed == token)
        return found[np.argsort(owner[found], kind="stable")], np.bincount(owner[found], minlength=count)

    (image, n_image), (seg, n_seg) = positions(image_token_id), positions(seg_token_id)
    expected = [tile_tokens * math.prod(shapes[i]) for i in images]
    if images and n_image.tolist() != expected:
        raise ValueError(
            f"conversations hold {n_image.tolist()} image tokens, their images fill {expected}: was the text cut?"
        )
    first = [0, *accumulate(map(math.prod, shapes))]  # tile of each image
    targets = (np.full_like(ids, IGNORE_INDEX) if labels is None else labels.cpu().numpy()).flat[source]
    text = np.flatnonzero((targets[1:] != IGNORE_INDEX) & (owner[1:] == owner[:-1]))
    tensors = {
        "ids": packed,
        "padding": present.flat[source],
        "image": image if images else image[:0],
        "tiles": np.array([tile for i in images for tile in range(first[i], first[i + 1])]),
        "seg_image": image[np.repeat(n_seg > 0, n_image)],
        "seg": seg - 1,
        "text": text,
        "text_labels": targets[text + 1],
    }
    return Packed(
        **{name: torch.from_numpy(x.astype(np.int64)) for name, x in tensors.items()},
        groups=tuple(made),
        grids=tuple(shapes),
        row_image=tuple(images),
        n_seg=tuple(n_seg.tolist()),
    )


def similar(lengths: np.ndarray) -> list[list[int]]:
    """Conversations in one group, or in two when that leaves less padding and one leaves more than is allowed."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    cost = [ordered[cut - 1] * cut * (cut > 0) + ordered[-1] * (len(ordered) - cut) for cut in range(len(ordered))]
    cut = int(np.argmin(cost))
    if cost[0] <= lengths.sum() / (1 - PADDING_ALLOWED) or not cut:
        return [list(range(len(lengths)))]
    return [sorted(order[:cut].tolist()), sorted(order[cut:].tolist())]


def as_grids(tile_grids: Tensor | Sequence[Sequence[int]]) -> list[Grid]:
    """(I, 2) -> per image (rows, columns)."""
    pairs = tile_grids.tolist() if isinstance(tile_grids, Tensor) else tile_grids
    return [(rows, cols) for rows, cols in pairs]
