"""What `segment` and `chat` return, and how mask logits become it.

Legend: H W pixels of the upright photo, h w mask grid of the model, n masks of a reply.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from self1e.flags import counted


@dataclass(frozen=True)
class Segmentation:
    """The mask of one prompt.

    prompt: as given. text: the answer. mask: bool (H, W). logits: float32 (h, w), before the resize.
    score: mean foreground probability over the mask, 0..1; None for an empty mask.
    """

    prompt: str
    text: str
    mask: np.ndarray
    logits: np.ndarray
    score: float | None

    def __repr__(self) -> str:
        share = f"{self.mask.mean():.1%} of {self.mask.shape[1]} x {self.mask.shape[0]}"
        return f"Segmentation({self.prompt!r}: {share}, score {_short(self.score)})"


@dataclass(frozen=True)
class Reply:
    """What the model wrote, with one mask for every `[SEG]` in it, in order.

    text: without the closing token. masks: bool (n, H, W). logits: float32 (n, h, w), before the resize.
    (0, 0, 0) without any. scores: mean foreground probability over each mask; None for an empty one.
    """

    text: str
    masks: np.ndarray
    logits: np.ndarray
    scores: list[float | None]

    def __repr__(self) -> str:
        scores = ", ".join(map(_short, self.scores))
        return f"Reply({self.text!r}, {counted(len(self.masks), 'mask')}{f' with scores {scores}' if scores else ''})"


def _short(score: float | None) -> str:
    return "none" if score is None else f"{score:.3f}"


def logit_of(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold (--threshold) is {threshold}; expected a probability above 0 and below 1")
    return math.log(threshold / (1 - threshold))


def to_masks(logits: Tensor, size: tuple[int, int], cut: float) -> tuple[np.ndarray, list[float | None], np.ndarray]:
    """Logits (n, h, w) -> masks bool (n, H, W), scores, logits as an array; one mask at a time is held in float."""
    if not len(logits):
        return np.zeros((0, *size), bool), [], logits.cpu().numpy()
    masks, scores = [], []
    for grid in logits:
        full = interpolate(grid[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        masks.append(full > cut)
        scores.append((full.sigmoid() * masks[-1]).sum() / masks[-1].sum())  # NaN for an empty mask
    numbers = [None if math.isnan(score) else score for score in torch.stack(scores).tolist()]
    return torch.stack(masks).cpu().numpy(), numbers, logits.cpu().numpy()
