"""Reshapes between patch, tile and image grids (paper, section 3).

Legend: b batch, h w grid, p q neighbourhood (r x r, row-major), c channels, R C tiles per column and row of an image.
To add a replication, enter a function in `REPLICATIONS`.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def compress(x: Tensor, ratio: int = 2) -> Tensor:
    """Fold r x r neighbours into channels (pixel unshuffle): (b, h r, w r, c) -> (b, h, w, r r c)."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=ratio, q=ratio)


def expand(x: Tensor, ratio: int = 2) -> Tensor:
    """Inverse of `compress`, also on non-square grids: (b, h, w, r r c) -> (b, h r, w r, c)."""
    return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=ratio, q=ratio)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of a channels-last grid, `align_corners=False`: (b, h, w, c) -> (b, *size, c)."""
    x = F.interpolate(rearrange(x, "b h w c -> b c h w"), size=tuple(size), mode="bilinear")
    return rearrange(x, "b c h w -> b h w c")


def stitch_tiles(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put the tiles of images, row-major, in their places: (b R C, h, w, c) -> (b, R h, C w, c), grid = (R, C)."""
    return rearrange(x, "(b R C) h w c -> b (R h) (C w) c", R=grid[0], C=grid[1])


def replicate_tile(x: Tensor, ratio: int = 2) -> Tensor:
    """Each patch stands for its whole neighbourhood: (b, h, w, c) -> (b, h, w, r r c)."""
    return repeat(x, "b h w c -> b h w (n c)", n=ratio**2)


def replicate_window(x: Tensor, ratio: int = 2) -> Tensor:
    """Each r x r neighbourhood at stride 1, the (h-r+1, w-r+1) grid resized back: (b, h, w, c) -> (b, h, w, r r c)."""
    windows = x.unfold(1, ratio, 1).unfold(2, ratio, 1)  # b h-1 w-1 c p q
    return resize(rearrange(windows, "b h w c p q -> b h w (p q c)"), x.shape[1:3])


def replicate_interpolate(x: Tensor, ratio: int = 2) -> Tensor:
    """Enlarge r times, then compress in the projector's own channel order: (b, h, w, c) -> (b, h, w, r r c)."""
    return compress(resize(x, (x.shape[1] * ratio, x.shape[2] * ratio)), ratio)


REPLICATIONS = {"tile": replicate_tile, "window": replicate_window, "interpolate": replicate_interpolate}
