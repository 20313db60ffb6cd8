"""Segmentation scores from integer pixel counts: the LISA and ReLA protocols, ReasonSeg's extras, boundary IoU.

A *unit* is one sentence about one photo. Its counts are taken once, at the annotation's size, and every figure is
computed from the list of units alone: `self1e score` recomputes them from the JSONL that an evaluation wrote. Scores
are fractions in [0, 1]; a score over nothing is `None`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from self1e.data.masks import IGNORED
from self1e.errors import UserError

BOUNDARY = 0.02  # of the photo's diagonal
LEVEL, RESAMPLES = 0.95, 2000  # of bootstrap intervals
MARKS = {"rela": "no_target", "reasonseg": "is_sentence"}  # protocol -> what its units say besides counts


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A line of a split's JSONL: the counts of one sentence, in pixels of the annotation that are not ignored."""

    id: str
    image: str
    text: str
    I: int  # intersection
    U: int  # union
    target_pixels: int
    predicted_pixels: int
    boundary_I: int | None = None  # of the pixels near the contours, see `boundary`
    boundary_U: int | None = None
    no_target: bool | None = None  # nothing fits the sentence; None where a benchmark has no such sentences
    is_sentence: bool | None = None  # rather than a phrase; None outside ReasonSeg
    mask: dict | None = None  # the prediction as COCO's compressed RLE, for pictures

    @property
    def iou(self) -> float:
        return iou(self.I, self.U)


def count_pixels(prediction: np.ndarray, target: np.ndarray) -> dict[str, int]:
    """Pixel counts of one mask, by their names in `Unit`.

    prediction: bool (H, W), True = foreground. target: uint8 (H, W), 1 = foreground, 255 = ignored.
    """
    assert prediction.shape == target.shape, f"prediction {prediction.shape} and target {target.shape} differ in shape"
    counted, wanted = target != IGNORED, target == 1
    predicted = prediction & counted
    found, sought = boundary(prediction) & counted, boundary(wanted)
    pixels = {"I": predicted & wanted, "U": predicted | wanted, "target_pixels": wanted, "predicted_pixels": predicted}
    pixels |= {"boundary_I": found & sought, "boundary_U": found | sought}
    return {name: int(np.count_nonzero(mask)) for name, mask in pixels.items()}


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask bool (H, W) that lie near its contour (boundary IoU, Cheng et al. 2021).

    Near is within 2% of the photo's diagonal; the photo's edge is a contour, too.
    """
    distance = max(1, round(BOUNDARY * math.hypot(*mask.shape)))
    pixels = mask.astype(np.uint8)
    left, top, width, height = cv2.boundingRect(pixels)
    box = (slice(top, top + height), slice(left, left + width))  # outside of it is nothing to be looked at
    inside = cv2.erode(np.pad(pixels[box], 1), np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    near = np.zeros_like(mask)
    near[box] = mask[box] & (inside == 0)
    return near


def iou(I: int, U: int) -> float:
    """I / U, and 1 when there was nothing to find and nothing was predicted (LISA); counts or sums of counts."""
    return I / U if U else 1.0


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # fsum: the order of the units does not matter


def precision_at(thresholds: Sequence[float], ious: Sequence[float]) -> dict[str, float | None]:
    """Share of the units whose IoU reaches each threshold."""
    return {f"pr@{t}": mean([iou >= t for iou in ious]) for t in thresholds}


def lisa(units: Sequence[Unit]) -> dict:
    """gIoU (mean IoU), cIoU, Pr@0.5..0.9 (LISA, Lai et al. 2024), and mean boundary IoU of sentences with a target."""
    ious = [unit.iou for unit in units]
    edges = [(unit.boundary_I, unit.boundary_U) for unit in units if unit.target_pixels]
    return {
        "n": len(units),
        "giou": mean(ious),
        "ciou": iou(sum(unit.I for unit in units), sum(unit.U for unit in units)) if units else None,
        **precision_at((0.5, 0.6, 0.7, 0.8, 0.9), ious),
        "boundary_iou": mean([iou(I, U) for I, U in edges if I is not None and U is not None]),
    }


def rela(units: Sequence[Unit]) -> dict:
    """Generalised referring segmentation (ReLA, Liu et al. 2023, section 3.2).

    "No target" is the positive class, predicted by a mask without foreground. Such a sentence scores 1 and adds
    nothing to I and U when found, else 0 with the predicted area added to U. Pr@k is over sentences with a target.
    """
    with_target = [unit for unit in units if not unit.no_target]
    without = [unit for unit in units if unit.no_target]
    iou_with = [unit.iou for unit in with_target]
    iou_without = [float(unit.predicted_pixels == 0) for unit in without]
    union = sum(unit.U for unit in with_target) + sum(unit.predicted_pixels for unit in without)
    return {
        "n_target": len(with_target),
        "n_no_target": len(without),
        "giou": mean(iou_with + iou_without),
        "ciou": iou(sum(unit.I for unit in with_target), union) if units else None,
        **precision_at((0.7, 0.8, 0.9), iou_with),
        "n_acc": mean(iou_without),  # TP / (TP + FN)
        "t_acc": mean([unit.predicted_pixels > 0 for unit in with_target]),  # TN / (TN + FP)
    }


def bootstrap(units: Sequence[Unit], seed: int = 0) -> dict:
    """Percentile intervals of gIoU and cIoU over units drawn with replacement: `{"giou": [low, high], ...}`."""
    draws = np.random.default_rng(seed).integers(len(units), size=(RESAMPLES, len(units)))
    ious, I, U = (np.array([getattr(unit, name) for unit in units])[draws] for name in ("iou", "I", "U"))
    cious = np.divide(I.sum(1), U.sum(1), out=np.ones(RESAMPLES), where=U.sum(1) > 0)  # as `iou`
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    giou, ciou = (np.quantile(values, tails).tolist() for values in (ious.mean(1), cious))
    return {"giou": giou, "ciou": ciou, "level": LEVEL, "resamples": RESAMPLES, "seed": seed}


def reasonseg(units: Sequence[Unit]) -> dict:
    """ReasonSeg: short and long queries apart, and intervals, because val has only 200 photos."""
    return {
        **lisa(units),
        "short": lisa([unit for unit in units if not unit.is_sentence]),
        "long": lisa([unit for unit in units if unit.is_sentence]),
        "bootstrap": bootstrap(units),
    }


PROTOCOLS: dict[str, Callable[[Sequence[Unit]], dict]] = {
    "lisa": lisa,
    "rela": lambda units: {**lisa(units), "rela": rela(units)},  # the paper reports the former
    "reasonseg": reasonseg,
}


def score(units: Sequence[Unit]) -> dict:
    """All figures of one split, by the protocol that the units have the marks of."""
    if not units:
        raise UserError("no units to score: the split is empty")
    marked = (name for name, mark in MARKS.items() if all(getattr(unit, mark) is not None for unit in units))
    protocol = next(marked, "lisa")
    return {"protocol": protocol, **PROTOCOLS[protocol](units)}


def read_units(path: str | Path) -> list[Unit]:
    """The units of a split's JSONL."""
    with open(path, encoding="utf-8") as lines:
        return [Unit(**json.loads(line)) for line in lines]
