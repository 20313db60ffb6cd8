"""The segmentation heads (paper, section 3.2): from the LLM's hidden states to mask logits.

RFR refills: it adds what the LLM changed in its image features, the residual, to features that were kept at the ViT's
resolution. RFA amplifies: its MLPs first unfold the features of both to grids of twice the side.

Shape legend: n rows, k masks (queries) per row, h w image-token grid (L per tile side), H W = 2h 2w patch grid,
C LLM width, r = 2 the ratio. V1 are the image features that the LLM is given; VHQ, as the paper calls them, the
self-replicated ones, one per patch; IMG and SEG the LLM's states at image tokens and before each `[SEG]`. `e` is
`grids.expand`, `up` is `grids.resize`.

| `mask_features` | image side F                                                        | mask    |
|-----------------|---------------------------------------------------------------------|---------|
| baseline        | IMG                                                                 | h  w    |
| replication     | VHQ                                                                 | H  W    |
| rfr             | VHQ + up(IMG - V1)                                                  | H  W    |
| rfa             | f_out( e(f_vit(VHQ)) + up( e(f_llm(IMG)) - e(f_vit(V1)) ) )         | 2H 2W   |

The query s is SEG itself, under `rfa` `f_out(mean of the r*r groups of f_llm(SEG))`. All logits are
`F . s / sqrt(C)`. The auxiliary mask uses `e(f_llm(IMG))` (`rfa`, with `f_out` on request) or IMG as image side.

F is not built at full size, because `up` and dot products are linear. The first layer of `f_out` is applied before
`up` and, where it sees the photo alone, once per photo; its second layer moves to the query:
`(W h + b) . s = h . (W^T s) + b . s`. Only the hidden layer has the size (rows, 2H, 2W, C), a few rows at a time.

To add a feature variant, write a class with `upsampling`, `image_side` and `forward`, and enter it in `HEADS`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from self1e.model.grids import expand, grid_of, resize

INITIAL_STD = 0.02
ROWS_AT_ONCE = 4  # rows whose hidden layer is in memory together


@dataclass(frozen=True)
class ImageSide:
    """What the head keeps of one photo, so that all its rows share it.

    `refill`: (1, ...) features on the mask's grid; `origin`: (1, ...) what the LLM's image features are compared with.
    """

    refill: Tensor
    origin: Tensor

    def to(self, device: torch.device) -> "ImageSide":
        """The same on `device`: with a device map, photos are encoded elsewhere."""
        return ImageSide(self.refill.to(device), self.origin.to(device))


class SegmentationHead(nn.Module):
    """The head without features of its own (`baseline`), and what all heads share.

    Args:
        hidden_size: C.
        ratio: r, side of the neighbourhood that one image token stands for.
        auxiliary_projection: send the auxiliary image side through `f_out` too.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, hidden_size: int, *, ratio: int, auxiliary_projection: bool = False):
        super().__init__()
        self.ratio, self.auxiliary_projection = ratio, auxiliary_projection
        self.scale = 1 / math.sqrt(hidden_size)
        self.gradient_checkpointing = False  # the library sets both

    @property
    def upsampling(self) -> int:
        """Cells of the mask per side of an image token."""
        return 1

    def image_side(self, low: Tensor, high: Tensor) -> list[ImageSide]:
        """What depends on photos alone, photos of one grid together.

        Args:
            low: V1 (i, h, w, C), what the LLM was given.
            high: VHQ (i, H, W, C), the self-replicated features.
        """
        return sides_of(low, low)

    def forward(self, image: Tensor, seg: Tensor, sides: Sequence[ImageSide]) -> tuple[Tensor, Tensor | None]:
        """Masks of rows that share one grid size.

        Args:
            image: IMG (n, h, w, C), the LLM's normalised states at image tokens.
            seg: SEG (n, k, C), the LLM's normalised states one position before each `[SEG]`.
            sides: per row the image side of its photo; rows of a photo are neighbours and share the object.

        Returns:
            Mask logits (n, k, ., .) and auxiliary logits (n, k, ., .); the latter are None under `baseline`, whose
            mask already is the LLM's own.
        """
        return self.logits(image, seg), None

    def logits(self, features: Tensor, query: Tensor) -> Tensor:
        """Scaled dot products: (n or 1, h, w, C), (n, k, C) -> (n, k, h, w)."""
        return einsum(features, query, "n h w c, n k c -> n k h w") * self.scale


class ReplicationHead(SegmentationHead):
    """The self-replicated features alone: the LLM answers, the ViT draws."""

    @property
    def upsampling(self) -> int:
        return self.ratio

    def image_side(self, low: Tensor, high: Tensor) -> list[ImageSide]:
        return sides_of(high, low)

    def forward(self, image: Tensor, seg: Tensor, sides: Sequence[ImageSide]) -> tuple[Tensor, Tensor | None]:
        mask = torch.cat([self.logits(side.refill, seg[rows]) for side, rows in rows_by_photo(sides, image.device)])
        return mask, self.logits(image, seg)


class ResidualHead(ReplicationHead):
    """RFR (eq. 3, 4): what the LLM changed, refilled into the self-replicated features."""

    def forward(self, image: Tensor, seg: Tensor, sides: Sequence[ImageSide]) -> tuple[Tensor, Tensor | None]:
        masks = []
        for side, rows in rows_by_photo(sides, image.device):
            change = rearrange(self.logits(image[rows] - side.origin, seg[rows]), "n k h w -> n h w k")
            change = rearrange(resize(change, grid_of(side.refill)), "n h w k -> n k h w")
            masks.append(self.logits(side.refill, seg[rows]) + change)
        return torch.cat(masks), self.logits(image, seg)


class AmplifiedHead(SegmentationHead):
    """RFR with RFA (eq. 3 to 6): residual and refill are expanded to four times the cells, the full method."""

    def __init__(self, hidden_size: int, **kwargs):
        super().__init__(hidden_size, **kwargs)
        self.f_llm = two_layers(hidden_size, hidden_size * self.ratio**2)
        self.f_vit = two_layers(hidden_size, hidden_size * self.ratio**2)
        self.f_out = two_layers(hidden_size, hidden_size)

    @property
    def upsampling(self) -> int:
        return self.ratio**2

    def image_side(self, low: Tensor, high: Tensor) -> list[ImageSide]:
        first = self.f_out[0]
        refill, origin = (first(expand(self.f_vit(x), self.ratio)) for x in (high, low))
        return sides_of(refill, origin)

    def forward(self, image: Tensor, seg: Tensor, sides: Sequence[ImageSide]) -> tuple[Tensor, Tensor | None]:
        first, activation, last = self.f_out
        query = self.f_out(reduce(self.f_llm(seg), "n k (g c) -> n k c", "mean", g=self.ratio**2))
        folded, offset = last(query, adjoint=True)
        expanded = expand(self.f_llm(image), self.ratio)
        projected = first(expanded)
        masks = []
        for side, rows in rows_by_photo(sides, image.device, ROWS_AT_ONCE):
            change = projected[rows] - side.origin  # the layer's bias cancels here and stays in `refill`
            given = side.refill, change, folded[rows], offset[rows]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                masks.append(self._gradient_checkpointing_func(self.refine, *given))
            else:
                masks.append(self.refine(*given))
        if self.auxiliary_projection:
            auxiliary = self.logits(activation(projected), folded) + offset[..., None, None] * self.scale
        else:
            auxiliary = self.logits(expanded, query)
        return torch.cat(masks), auxiliary

    def refine(self, refill: Tensor, change: Tensor, query: Tensor, offset: Tensor) -> Tensor:
        """The hidden layer of `f_out` and its product with folded queries.

        It calls no module, because ranks come here unequally often: ZeRO-3 would take even the activation's module for
        another order of layers, drop its plan on one rank alone, and wait for ever.
        """
        hidden = F.gelu(resize(change, grid_of(refill)) + refill)
        return self.logits(hidden, query) + offset[..., None, None] * self.scale


HEADS: dict[str, type[SegmentationHead]] = {
    "baseline": SegmentationHead,
    "replication": ReplicationHead,
    "rfr": ResidualHead,
    "rfa": AmplifiedHead,
}


class AdjointLinear(nn.Linear):
    """A linear layer that a dot product can send to its other side: `y(h) . s = h . a + c` with `a, c` of s."""

    def forward(self, x: Tensor, *, adjoint: bool = False):
        """(..., in) -> (..., out), or as adjoint (..., out) -> (..., in) and (...,)."""
        return (x @ self.weight, (x * self.bias).sum(-1)) if adjoint else super().forward(x)


def two_layers(width: int, out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear; the weights start at N(0, 0.02), the biases at 0."""
    layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), AdjointLinear(width, out))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)
    return layers


def sides_of(refill: Tensor, origin: Tensor) -> list[ImageSide]:
    """(i, ...) twice -> one entry per photo."""
    return [ImageSide(refill[i : i + 1], origin[i : i + 1]) for i in range(len(refill))]


def rows_by_photo(
    sides: Sequence[ImageSide], device: torch.device, limit: int | None = None
) -> Iterator[tuple[ImageSide, slice]]:
    """Neighbouring rows of one photo, at most `limit` at a time, with its image side on `device`."""
    start = 0
    for _, rows in groupby(sides, key=id):
        count, side = len(list(rows)), sides[start].to(device)
        for first in range(start, start + count, limit or count):
            yield side, slice(first, min(first + (limit or count), start + count))
        start += count
