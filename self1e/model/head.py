"""The segmentation head (paper, section 3.2): from the LLM's hidden states to mask logits. No token ids here.

Shape legend: n rows, i images, m masks (queries), h w image-token grid (L per tile side), H W = 2h 2w patch grid,
C LLM width. `e` is `grids.expand`.

| `mask_features` | image side F                                                        | mask    |
|-----------------|---------------------------------------------------------------------|---------|
| baseline        | IMG                                                                 | h  w    |
| replication     | VHQ                                                                 | H  W    |
| rfr             | VHQ + up(IMG - V1)                                                  | H  W    |
| rfa             | f_out( e(f_vit(VHQ)) + up( e(f_llm(IMG)) - e(f_vit(V1)) ) )         | 2H 2W   |

The query is the `[SEG]` state itself, under `rfa` `f_out(mean of the r*r groups of f_llm(SEG))`. All logits are
`F . s / sqrt(C)`. The auxiliary mask uses `e(f_llm(IMG))` (`rfa`, with `f_out` on request) or IMG as image side.
"""

import math
from dataclasses import dataclass

from einops import einsum, reduce
from torch import Tensor, nn

from self1e.model.grids import expand, resize

MASK_FEATURES = ("baseline", "replication", "rfr", "rfa")
INITIAL_STD = 0.02


@dataclass(frozen=True)
class ImageSide:
    """What the head keeps of images alone, so that the rows of an image share it.

    `refill`: (i, ...) features on the mask's grid; `origin`: (i, ...) what the LLM's image features are compared with.
    """

    refill: Tensor
    origin: Tensor


class SegmentationHead(nn.Module):
    """RFR and RFA (paper, eq. 3-6). `upsampling`: cells of the mask a side of an image token.

    Args:
        hidden_size: C.
        mask_features: one of `MASK_FEATURES`.
        auxiliary_projection: send the auxiliary image side through `f_out` too.
        ratio: side of the neighbourhood that one image token stands for.
    """

    def __init__(self, hidden_size: int, *, mask_features: str, auxiliary_projection: bool, ratio: int):
        super().__init__()
        self.mask_features, self.auxiliary_projection, self.ratio = mask_features, auxiliary_projection, ratio
        self.scale = 1 / math.sqrt(hidden_size)
        self.upsampling = {"baseline": 1, "replication": ratio, "rfr": ratio, "rfa": ratio**2}[mask_features]
        if mask_features == "rfa":
            self.f_llm = two_layers(hidden_size, hidden_size * ratio**2)
            self.f_vit = two_layers(hidden_size, hidden_size * ratio**2)
            self.f_out = two_layers(hidden_size, hidden_size)

    def image_side(self, low: Tensor, high: Tensor) -> ImageSide:
        """Features that depend on the photo alone.

        Args:
            low: V1 (i, h, w, C), what the LLM was given.
            high: VHQ (i, H, W, C), the self-replicated features.
        """
        if self.mask_features == "baseline":
            high = low
        if self.mask_features == "rfa":
            low, high = (expand(self.f_vit(x), self.ratio) for x in (low, high))
        return ImageSide(refill=high, origin=low)

    def forward(self, image: Tensor, seg: Tensor, side: ImageSide, seg_row: Tensor) -> tuple[Tensor, Tensor | None]:
        """Masks of rows that share one grid size.

        Args:
            image: IMG (n, h, w, C), the LLM's normalised states at image tokens.
            seg: SEG (m, C), the LLM's normalised states one position before each `[SEG]`.
            side: `image_side` indexed by row, (n, ...).
            seg_row: (m,) the row of each query.

        Returns:
            Mask logits (m, ., .) and auxiliary logits (m, ., .); the latter are None under `baseline`, whose mask
            already is the LLM's own.
        """
        if self.mask_features == "baseline":
            return self.logits(image, seg, seg_row), None
        if self.mask_features == "replication":
            return self.logits(side.refill, seg, seg_row), self.logits(image, seg, seg_row)
        if self.mask_features == "rfr":
            features = side.refill + resize(image - side.origin, side.refill.shape[1:3])
            return self.logits(features, seg, seg_row), self.logits(image, seg, seg_row)
        query = self.f_out(reduce(self.f_llm(seg), "m (n c) -> m c", "mean", n=self.ratio**2))
        image = expand(self.f_llm(image), self.ratio)
        features = self.f_out(side.refill + resize(image - side.origin, side.refill.shape[1:3]))
        auxiliary = self.f_out(image) if self.auxiliary_projection else image
        return self.logits(features, query, seg_row), self.logits(auxiliary, query, seg_row)

    def logits(self, features: Tensor, query: Tensor, seg_row: Tensor) -> Tensor:
        """Scaled dot products: (n, h, w, C), (m, C), (m,) -> (m, h, w)."""
        return einsum(features[seg_row], query, "m h w c, m c -> m h w") * self.scale


def two_layers(width: int, out: int) -> nn.Sequential:
    """Linear, exact GELU, Linear; the weights start at N(0, 0.02), the biases at 0."""
    layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.weight, std=INITIAL_STD)
        nn.init.zeros_(layer.bias)
    return layers
