"""Mask losses (paper, section 4.1; formulas of LISA's protocol): BCE and Dice on masks of short side at most 128."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT_SIDE = 128  # pixels
DICE_SCALE = 1000  # as published; in fp32 it only decides how much DICE_EPS weighs
DICE_EPS = 1e-6


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, mean over pixels: (m, h, w) twice -> (m,)."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss: (m, h, w) twice -> (m,)."""
    x, t = logits.sigmoid().flatten(1) / DICE_SCALE, target.flatten(1) / DICE_SCALE
    overlap = (x * target.flatten(1)).sum(1)
    return 1 - (2 * overlap + DICE_EPS) / (x.sum(1) + t.sum(1) + DICE_EPS)


def shrink_target(target: Tensor) -> Tensor:
    """(m, H, W) {0, 1} -> float (m, h, w): short side at most 128, bilinear without antialias, hence soft edges."""
    target, (height, width) = target.float(), target.shape[-2:]
    short = min(height, width)
    if short <= SHORT_SIDE:
        return target
    size = (height * SHORT_SIDE // short, width * SHORT_SIDE // short)
    return F.interpolate(target[None], size=size, mode="bilinear")[0]


def mask_losses(predictions: Sequence[tuple[Tensor, ...]], targets: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """BCE and Dice of a micro-batch: summed over a row's masks and predictions, divided by the number of all rows.

    Masks of one size are resized and compared together, so that a micro-batch costs few kernels.

    Args:
        predictions: per row the logits to train, each (n_seg, h, w): the mask and, if used, the auxiliary mask.
        targets: per row (n_seg, H, W) in {0, 1}, or None for a row without supervision of its masks.

    Returns:
        `{"mask_bce", "mask_dice"}`, scalars; 0 where no row has a mask.
    """
    device = predictions[0][0].device
    alike: dict[tuple, list[tuple[tuple[Tensor, ...], Tensor]]] = {}  # sizes -> rows
    for row, target in zip(predictions, targets):
        if target is not None and len(target):
            sizes = tuple(target.shape[1:]), *(tuple(logits.shape[1:]) for logits in row)
            alike.setdefault(sizes, []).append((row, target.to(device, non_blocking=True)))
    total = {"mask_bce": torch.zeros((), device=device), "mask_dice": torch.zeros((), device=device)}
    for rows in alike.values():
        target = shrink_target(torch.cat([target for _, target in rows]))
        kinds = [torch.cat(logits).float()[None] for logits in zip(*(row for row, _ in rows))]
        size = target.shape[-2:]
        logits = torch.cat([F.interpolate(x, size=size, mode="bilinear")[0] for x in kinds])
        target = target.repeat(len(kinds), 1, 1)
        total["mask_bce"] = total["mask_bce"] + bce(logits, target).sum()
        total["mask_dice"] = total["mask_dice"] + dice(logits, target).sum()
    return {name: value / len(predictions) for name, value in total.items()}
