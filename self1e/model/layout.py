"""Where things stand in a batch, known to the host: the forward pass asks the GPU for nothing.

Rows go through the LLM in at most two groups of similar length, each padded to its own longest row. What a row holds
(its image tokens, the positions that predict `[SEG]`, the supervised text) is addressed by *packed* positions, which
count through the tokens of the groups one after another. Everything the GPU needs is one index tensor, moved once, and
one tensor of all masks (`PackedMasks`).

Legend: R rows, N tokens of the longest row, P packed tokens of all groups, padding included.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that the cross-entropy passes over
PADDING_ALLOWED = 0.03  # share of the LLM's tokens above which rows are split into two groups
Grid = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Rows that go through the LLM together, `length` tokens each.

    `padded` unless all of them are that long; `segments` when one holds a `[SEG]`.
    """

    rows: tuple[int, ...]
    length: int
    padded: bool
    segments: bool


@dataclass(frozen=True)
class HeadGroup:
    """Rows with `[SEG]` about images of one grid of tiles; rows of an image are neighbours.

    `name`: of the index parts, `image <name>` (rows * h * w,) and `seg <name>` (rows * masks,), packed positions of
    the image tokens and of the tokens that predict each `[SEG]`. A row with fewer than `masks` repeats its first.
    """

    grid: Grid
    rows: tuple[int, ...]
    masks: int

    @property
    def name(self) -> str:
        return "{}x{}".format(*self.grid)


@dataclass(frozen=True, eq=False)
class Layout:
    """What the forward pass has to know about a batch without looking at it.

    groups: the LLM's. whole: there is one group, the batch as it is, so packed positions are those of `input_ids`.
    grids: per image (rows, columns) of its tiles. row_image: per row its image; empty without photos.
    n_seg: per row. heads: rows with masks, by grid.
    index: int64 on one device; `parts` names its stretches:
        source (P,) the token in `input_ids.flatten()`; padding_mask (P,) 1 at tokens, 0 at padding;
        image (tokens,) packed image positions; tiles (tiles,) the tile that fills each `L * L` of them;
        text, labels (k,) packed positions that predict supervised tokens, and those tokens in `labels.flatten()`.
    """

    groups: tuple[Group, ...]
    whole: bool
    grids: tuple[Grid, ...]
    row_image: tuple[int, ...]
    n_seg: tuple[int, ...]
    heads: tuple[HeadGroup, ...]
    index: Tensor
    parts: dict[str, tuple[int, int]]

    def part(self, name: str) -> Tensor:
        """A named stretch of the index."""
        return self.index[slice(*self.parts[name])]

    def split(self) -> Iterator[tuple[Group, slice]]:
        """Each group of the LLM with its packed positions."""
        start = 0
        for group in self.groups:
            stop = start + len(group.rows) * group.length
            yield group, slice(start, stop)
            start = stop

    def place_image_tokens(self, embeds: Tensor, tokens: Tensor) -> Tensor:
        """Put each row's image tokens in their places: (P, C), (T, L*L, C) -> (P, C)."""
        tokens = take(tokens, self.part("tiles")).flatten(0, 1).to(embeds)
        return embeds.index_copy(0, self.part("image").to(embeds.device), tokens)

    def check_masks(self, targets: Sequence[Tensor | None]) -> None:
        """Raise ValueError unless every row has a mask for each `[SEG]` (or None)."""
        given = [count if target is None else len(target) for count, target in zip(self.n_seg, targets)]
        if len(targets) != len(self.n_seg) or given != list(self.n_seg):
            raise ValueError(f"rows hold {list(self.n_seg)} [SEG] tokens, mask_targets hold {given} masks")

    def to(self, device, *args, non_blocking: bool = True, **kwargs) -> "Layout":
        """The layout with its index on `device`."""
        return replace(self, index=self.index.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Layout":
        """The same in pinned memory, which a DataLoader asks for so that the copy to the GPU does not block."""
        return replace(self, index=self.index.pin_memory())


class PackedMasks(Sequence):
    """Masks of all rows of a batch in one tensor, so that one copy brings them to the GPU; reads like their list.

    Item `row` is uint8 (n_seg, H, W), or None for a row without supervision.
    """

    def __init__(self, masks: Sequence[Tensor | None]):
        self.shapes = [None if x is None else tuple(x.shape) for x in masks]
        given = [x.flatten() for x in masks if x is not None]
        wrong = [x.dtype for x in given if x.is_floating_point()]
        if wrong:
            raise ValueError(f"masks are {wrong[0]}; expected uint8 of 0 and 1")
        self.flat = torch.cat([x.to(torch.uint8) for x in given]) if given else torch.zeros(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row):
        sizes = [0 if shape is None else math.prod(shape) for shape in self.shapes]
        masks = [None if s is None else x.view(s) for x, s in zip(self.flat.split(sizes), self.shapes)]
        return masks[row]

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self[:])

    def to(self, device, *args, non_blocking: bool = True, **kwargs) -> "PackedMasks":
        """The masks on `device`."""
        return self._with(self.flat.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedMasks":
        """The same in pinned memory, which a DataLoader asks for so that the copy to the GPU does not block."""
        return self._with(self.flat.pin_memory())

    def _with(self, flat: Tensor) -> "PackedMasks":
        moved = PackedMasks([])
        moved.shapes, moved.flat = self.shapes, flat
        return moved


def read_layout(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    grids: Sequence[Sequence[int]] = (),
    row_image: Sequence[int] = (),
    tile_tokens: int,
    image_token_id: int,
    seg_token_id: int | None,
    split: bool = True,
    whole: bool = False,
) -> Layout:
    """Read a batch; tensors on a GPU are copied to the host, so a data worker should do it.

    Args:
        input_ids, attention_mask, labels: (R, N) as for the model's `forward`.
        grids, row_image: as in `Layout`; both empty for text without photos.
        tile_tokens: image tokens per tile.
        split: whether two groups are allowed.
        whole: leave the batch as it is, for a cache (generation).

    Raises:
        ValueError: the image tokens of a row are not as many as its image fills.
    """
    ids = input_ids.cpu().numpy()
    count, longest = ids.shape
    present = np.ones_like(ids, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    shapes: tuple[Grid, ...] = tuple((int(rows), int(cols)) for rows, cols in grids)
    row_image = tuple(map(int, row_image))
    first, last = present.argmax(1), longest - present[:, ::-1].argmax(1)
    groups = [range(count)] if whole or not split else _similar(last - first)
    made, source = [], []
    for rows in groups:
        length = longest if whole else int(max(last[row] - first[row] for row in rows))
        starts = [0 if whole else min(int(first[row]), longest - length) for row in rows]
        picked = np.concatenate([row * longest + start + np.arange(length) for row, start in zip(rows, starts)])
        source.append(picked)
        segments = bool((ids.flat[picked] == seg_token_id).any())
        made.append(Group(tuple(rows), length, not present.flat[picked].all(), segments))
    parts = {"source": np.concatenate(source)}
    parts["padding_mask"] = present.flat[parts["source"]].astype(np.int64)
    row_of = np.concatenate([np.repeat(group.rows, group.length) for group in made])
    packed = ids.flat[parts["source"]]

    def positions(where: np.ndarray) -> list[np.ndarray]:
        """Per row, the packed positions at which `where` holds."""
        found = np.flatnonzero(where)
        return [found[row_of[found] == row] for row in range(count)]

    image = positions(packed == image_token_id)
    seg = positions(packed == seg_token_id) if seg_token_id is not None else [np.zeros(0, int)] * count
    offsets = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
    if row_image:
        expected, found = [tile_tokens * int(np.prod(shapes[i])) for i in row_image], list(map(len, image))
        if expected != found:
            raise ValueError(f"rows hold {found} image tokens, their images fill {expected}: was the text cut?")
        parts["image"] = np.concatenate(image)
        parts["tiles"] = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in row_image])
    if labels is not None:
        targets = labels.cpu().numpy().flat[parts["source"]]
        predicts = np.flatnonzero((targets[1:] != IGNORE_INDEX) & (row_of[1:] == row_of[:-1]))
        parts["text"], parts["labels"] = predicts, parts["source"][predicts + 1]
    heads = []
    for grid in dict.fromkeys(shapes[i] for i in row_image):
        rows = sorted((row for row in range(count) if shapes[row_image[row]] == grid and len(seg[row])),
                      key=lambda row: (row_image[row], row))  # fmt: skip
        if rows:
            masks = max(len(seg[row]) for row in rows)
            heads.append(HeadGroup(grid, tuple(rows), masks))
            predicting = [seg[row][[*range(len(seg[row])), *[0] * (masks - len(seg[row]))]] - 1 for row in rows]
            parts[f"image {heads[-1].name}"] = np.concatenate([image[row] for row in rows])
            parts[f"seg {heads[-1].name}"] = np.concatenate(predicting)
    stops = np.cumsum([len(part) for part in parts.values()]).tolist()
    return Layout(
        groups=tuple(made),
        whole=whole or (len(made) == 1 and made[0].length == longest),
        grids=shapes,
        row_image=row_image,
        n_seg=tuple(map(len, seg)),
        heads=tuple(heads),
        index=torch.from_numpy(np.concatenate(list(parts.values())).astype(np.int64)),
        parts={name: (stop - len(part), stop) for (name, part), stop in zip(parts.items(), stops)},
    )


def _similar(lengths: np.ndarray) -> list[list[int]]:
    """Rows in one group, or in two when that leaves less padding and one leaves more than is allowed."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    cost = [ordered[cut - 1] * cut * (cut > 0) + ordered[-1] * (len(ordered) - cut) for cut in range(len(ordered))]
    cut = int(np.argmin(cost))
    if cost[0] <= lengths.sum() / (1 - PADDING_ALLOWED) or not cut:
        return [list(range(len(lengths)))]
    return [sorted(order[:cut].tolist()), sorted(order[cut:].tolist())]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries of the first axis, the index moved to where they are."""
    return x.index_select(0, index.to(x.device))


def as_grids(tile_grids: Tensor | Sequence[Sequence[int]]) -> list[Grid]:
    """(I, 2) -> per image (rows, columns)."""
    pairs = tile_grids.tolist() if isinstance(tile_grids, Tensor) else tile_grids
    return [(rows, cols) for rows, cols in pairs]
