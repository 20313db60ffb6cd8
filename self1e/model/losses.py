"""Mask losses (paper, section 4.1; formulas of LISA's protocol): BCE and Dice on masks of short side at most 128."""

from collections import defaultdict
from collections.abc import Callable, Sequence

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


# By name; each compares logits with soft targets, (m, h, w) twice -> (m,). Their weights stand in the configuration.
MASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mask_bce": bce, "mask_dice": dice}


def mask_losses(predictions: Sequence[Sequence[Tensor]], targets: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Each of `MASK_LOSSES`: summed over masks and kinds of predictions, divided by the number of all conversations.

    Masks of one size are resized and compared together, so that a micro-batch costs few kernels.

    Args:
        predictions: the masks' logits and, if used, the auxiliary masks': each per conversation (n_seg, h, w).
        targets: per conversation (n_seg, H, W) in {0, 1}, or None without supervision of its masks.

    Returns:
        Scalars by name; 0 where no conversation has a mask.
    """
    device = predictions[0][0].device
    by_size: dict[tuple, list[list[Tensor]]] = defaultdict(list)
    for target, *logits in zip(targets, *predictions, strict=True):
        if target is not None and len(target) != len(logits[0]):
            raise ValueError(f"a conversation has {len(logits[0])} [SEG] and {len(target)} masks")
        if target is not None and len(target):
            masks = [target.to(device, non_blocking=True), *logits]
            by_size[tuple(x.shape[1:] for x in masks)].append(masks)
    total = {name: torch.zeros((), device=device) for name in MASK_LOSSES}
    for conversations in by_size.values():
        target, *kinds = map(torch.cat, zip(*conversations))
        target = shrink_target(target)
        resized = [F.interpolate(x.float()[None], size=target.shape[-2:], mode="bilinear")[0] for x in kinds]
        predicted, target = torch.cat(resized), target.repeat(len(kinds), 1, 1)
        for name, loss in MASK_LOSSES.items():
            total[name] = total[name] + loss(predicted, target).sum()
    return {name: value / len(targets) for name, value in total.items()}
