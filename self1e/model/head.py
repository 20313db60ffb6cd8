"""The segmentation heads (paper, section 3.2): from the LLM's hidden states to mask logits.

RFR refills: it adds what the LLM changed in its image features, the residual, to features that stayed at the ViT's
resolution. RFA amplifies: its MLPs first unfold the features of both to grids of twice the side.

V1 are the image features that the LLM is given; VHQ, as the paper calls them, the self-replicated ones, one per patch;
IMG and SEG the LLM's states at image tokens and before each `[SEG]`. `e` is `grids.expand`, `up` is `grids.resize`.

| `mask_features` | image side F                                                        | mask    |
|-----------------|---------------------------------------------------------------------|---------|
| baseline        | IMG                                                                 | L  L    |
| replication     | VHQ                                                                 | 2L 2L   |
| rfr             | VHQ + up(IMG - V1)                                                  | 2L 2L   |
| rfa             | f_out( e(f_vit(VHQ)) + up( e(f_llm(IMG)) - e(f_vit(V1)) ) )         | 4L 4L   |

The query s is SEG itself, under `rfa` `f_out(mean of the r*r groups of f_llm(SEG))`. All logits are
`F . s / sqrt(C)`. The auxiliary mask uses `e(f_llm(IMG))` (`rfa`, with `f_out` on request) or IMG as image side.

Shape legend: T tiles of all images, t tiles of all conversations with a mask, L image tokens per side of a tile,
S = rL patches, r = 2 the ratio, m queries, h w a stitched grid, C LLM width.

To add a variant, write a class with `features`, and enter it in `HEADS`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from self1e.model.grids import expand, resize, stitch_tiles


class Masked(NamedTuple):
    """A conversation that asks for masks: its image's first tile and grid (rows, columns), its number of `[SEG]`s."""

    tile: int
    grid: tuple[int, int]
    queries: int


class SegmentationHead(nn.Module):
    """The head without features of its own (`baseline`), and what all heads share.

    hidden_size: C. ratio: r. auxiliary_projection: send the auxiliary image side through `f_out` too.
    """

    def __init__(self, hidden_size: int, *, ratio: int, auxiliary_projection: bool = False):
        super().__init__()
        self.ratio, self.auxiliary_projection = ratio, auxiliary_projection
        self.scale = 1 / math.sqrt(hidden_size)

    def forward(
        self, v1: Tensor, vhq: Tensor, img: Tensor, seg: Tensor, conversations: Sequence[Masked]
    ) -> tuple[Tensor, ...]:
        """Masks of all conversations of a batch that hold a `[SEG]`.

        DeepSpeed's ZeRO-3 treats the head as one unit (`training.train.prepare_model`). That works with one call per
        forward pass, tensors given by position, and a flat tuple of tensors returned, as many on every rank; other
        forms lose gradients without an error, or stop with one about the order of modules.

        Args:
            v1: (T, L, L, C), what the LLM was given. vhq: (T, S, S, C), the self-replicated features.
            img: (t, L, L, C), the LLM's normalised states at the image tokens of these conversations.
            seg: (m, C), the LLM's normalised states one position before each of their `[SEG]`s.

        Returns:
            The mask logits of all conversations in one dimension; then, but for `baseline`, whose mask already is the
            LLM's own, the auxiliary logits.
        """
        v1, vhq, img, query = self.project(v1, vhq, img, seg)
        images = img.split([math.prod(grid) for _, grid, _ in conversations])
        queries = query.split([count for _, _, count in conversations])
        masks, auxiliary = [], []
        for (tile, grid, _), x, s in zip(conversations, images, queries):  # one by one: F is the largest tensor
            tiles = slice(tile, tile + len(x))
            v, hq, x = (stitch_tiles(side, grid) for side in (v1[tiles], vhq[tiles], x))
            masks.append(self.logits(self.features(v, hq, x), s))
            side = self.auxiliary(x)
            auxiliary += [] if side is None else [self.logits(side, s)]
        return tuple(torch.cat([x.flatten() for x in logits]) for logits in (masks, auxiliary) if logits)

    def project(self, v1: Tensor, vhq: Tensor, img: Tensor, seg: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What happens to each token by itself, once for all images and conversations; gives v1, vhq, img, query."""
        return v1, vhq, img, seg

    def features(self, v1: Tensor, vhq: Tensor, img: Tensor) -> Tensor:
        """F, the image side of the mask, of one conversation: projected (1, h, w, C) each -> (1, h, w, C)."""
        return img

    def auxiliary(self, img: Tensor) -> Tensor | None:
        """The image side of the auxiliary mask: (1, h, w, C) -> (1, h, w, C)."""
        return None

    def logits(self, features: Tensor, query: Tensor) -> Tensor:
        """Scaled dot products: (1, h, w, C), (k, C) -> (k, h, w)."""
        return einsum(rearrange(features, "1 h w c -> h w c"), query, "h w c, k c -> k h w") * self.scale


class ReplicationHead(SegmentationHead):
    """The self-replicated features alone: the LLM answers, the ViT draws."""

    def features(self, v1: Tensor, vhq: Tensor, img: Tensor) -> Tensor:
        return vhq

    def auxiliary(self, img: Tensor) -> Tensor | None:
        return img


class ResidualHead(ReplicationHead):
    """RFR (eq. 3, 4): what the LLM changed, refilled into the self-replicated features."""

    def features(self, v1: Tensor, vhq: Tensor, img: Tensor) -> Tensor:
        return vhq + resize(img - v1, vhq.shape[1:3])


class AmplifiedHead(ResidualHead):
    """RFR with RFA (eq. 3 to 6): residual and refill are expanded to four times the cells, the full method."""

    def __init__(self, hidden_size: int, **kwargs):
        super().__init__(hidden_size, **kwargs)
        self.f_llm = two_layers(hidden_size, hidden_size * self.ratio**2)
        self.f_vit = two_layers(hidden_size, hidden_size * self.ratio**2)
        self.f_out = two_layers(hidden_size, hidden_size)

    def project(self, v1: Tensor, vhq: Tensor, img: Tensor, seg: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query = self.f_out(reduce(self.f_llm(seg), "m (g c) -> m c", "mean", g=self.ratio**2))
        v1, vhq, img = self.f_vit(v1), self.f_vit(vhq), self.f_llm(img)
        return expand(v1, self.ratio), expand(vhq, self.ratio), expand(img, self.ratio), query

    def features(self, v1: Tensor, vhq: Tensor, img: Tensor) -> Tensor:
        residual = img - v1
        return self.f_out(vhq + resize(residual, vhq.shape[1:3]))

    def auxiliary(self, img: Tensor) -> Tensor | None:
        return self.f_out(img) if self.auxiliary_projection else img


HEADS: dict[str, type[SegmentationHead]] = {
    "baseline": SegmentationHead,
    "replication": ReplicationHead,
    "rfr": ResidualHead,
    "rfa": AmplifiedHead,
}


def two_layers(width: int, out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear; the model's `_init_weights` gives them their first values."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))
