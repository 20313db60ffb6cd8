"""Segmentation scores from integer pixel counts: the LISA and ReLA protocols, ReasonSeg's extras.

A *unit* is one sentence about one photo. Its counts are taken once, at the annotation's size, and every figure is
computed from the list of units alone, so the JSONL that an evaluation writes is enough to recompute them:

    self1e score runs/NAME/eval/refcoco_unc_val.jsonl

prints the figures, in seconds on one CPU. Scores are fractions in [0, 1]; a score over nothing is `None`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from self1e.data.masks import IGNORED, decode_segmentation

LISA_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
RELA_THRESHOLDS = (0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Counts of one sentence, in pixels of the annotation that are not ignored.

    I, U: intersection and union. `predicted_pixels` + `target_pixels` = I + U.
    `no_target`: the annotation says that nothing fits the sentence; `None` where a benchmark has no such sentences.
    `is_sentence`: a long query (a whole sentence) rather than a phrase; `None` outside ReasonSeg.
    `mask`: the prediction as COCO's compressed RLE, for pictures; no figure needs it.
    """

    id: str
    image: str
    text: str
    I: int
    U: int
    target_pixels: int
    predicted_pixels: int
    no_target: bool | None = None
    is_sentence: bool | None = None
    mask: dict | None = None

    @property
    def iou(self) -> float:
        return iou(self.I, self.U)

    def record(self) -> dict:
        """The unit as a line of JSON holds it: marks that its split does not have are left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def decode(self, height: int, width: int) -> np.ndarray:
        """The predicted mask, uint8 {0, 1} (height, width). Raises ValueError where the unit holds none."""
        if self.mask is None:
            raise ValueError(f"unit {self.id} holds no mask, so there is nothing to draw; evaluate again to have it")
        return decode_segmentation(self.mask, height, width)

    @classmethod
    def read(cls, record: dict, place: str) -> "Unit":
        """The unit of a record. Raises ValueError naming `place` for a record that is none."""
        known = {field.name for field in fields(cls)}
        try:
            unit = cls(**{name: value for name, value in record.items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{place}: not a unit record ({error})") from error
        counts = (unit.I, unit.U, unit.target_pixels, unit.predicted_pixels)
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"{place}: not a unit record (pixel counts are {counts})")
        return unit


def count_pixels(prediction, target) -> dict[str, list[int]]:
    """Pixel counts of n masks; NumPy arrays and torch tensors (on any device) alike.

    prediction: bool (n, H, W), True = foreground. target: uint8 (n, H, W), 1 = foreground, 255 = ignored.
    Returns `I, U, target_pixels, predicted_pixels`, n integers each.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    predicted, wanted = prediction & (target != IGNORED), target == 1
    counts = {"I": predicted & wanted, "U": predicted | wanted, "target_pixels": wanted, "predicted_pixels": predicted}
    return {name: pixels.sum((-2, -1)).tolist() for name, pixels in counts.items()}


def iou(I: int, U: int) -> float:
    """I / U, and 1 when there was nothing to find and nothing was predicted (LISA); counts or sums of counts."""
    return I / U if U else 1.0


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None  # fsum: the order of the units does not matter


def precision_at(thresholds: Sequence[float], ious: Sequence[float]) -> dict[str, float | None]:
    """Share of the units whose IoU reaches each threshold."""
    return {f"pr@{t}": mean([iou >= t for iou in ious]) for t in thresholds}


def lisa(units: Sequence[Unit]) -> dict:
    """gIoU (mean IoU), cIoU and Pr@0.5..0.9 (LISA, Lai et al. 2024; Pr@k as in RefCOCO papers)."""
    ious = [unit.iou for unit in units]
    return {
        "n": len(units),
        "giou": mean(ious),
        "ciou": iou(sum(unit.I for unit in units), sum(unit.U for unit in units)) if units else None,
        **precision_at(LISA_THRESHOLDS, ious),
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
        **precision_at(RELA_THRESHOLDS, iou_with),
        "n_acc": mean(iou_without),  # TP / (TP + FN)
        "t_acc": mean([unit.predicted_pixels > 0 for unit in with_target]),  # TN / (TN + FP)
    }


def bootstrap(units: Sequence[Unit], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict:
    """Percentile intervals of gIoU and cIoU over units drawn with replacement: `{"giou": [low, high], ...}`."""
    ious, I, U = (np.array([getattr(unit, name) for unit in units]) for name in ("iou", "I", "U"))
    draws = np.random.default_rng(seed).integers(len(units), size=(resamples, len(units)))
    union = U[draws].sum(1)
    samples = {
        "giou": ious[draws].mean(1),
        "ciou": np.divide(I[draws].sum(1), union, out=np.ones(resamples), where=union > 0),  # as `iou`
    }
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {name: np.quantile(values, tails).tolist() for name, values in samples.items()}
    return {**intervals, "level": level, "resamples": resamples, "seed": seed}


def lisa_and_rela(units: Sequence[Unit]) -> dict:
    """gRefCOCO: the LISA figures, which the paper reports, and ReLA's in a block of their own."""
    return {**lisa(units), "rela": rela(units)}


def reasonseg(units: Sequence[Unit]) -> dict:
    """ReasonSeg: short and long queries apart, and intervals, because val has only 200 photos."""
    return {
        **lisa(units),
        "short": lisa([unit for unit in units if not unit.is_sentence]),
        "long": lisa([unit for unit in units if unit.is_sentence]),
        "bootstrap": bootstrap(units),
    }


PROTOCOLS: dict[str, Callable[[Sequence[Unit]], dict]] = {"lisa": lisa, "rela": lisa_and_rela, "reasonseg": reasonseg}


def protocol_of(units: Sequence[Unit]) -> str:
    """The protocol that a split's units were counted for: `no_target` is ReLA's mark, `is_sentence` ReasonSeg's."""
    if all(unit.no_target is not None for unit in units):
        return "rela"
    if all(unit.is_sentence is not None for unit in units):
        return "reasonseg"
    return "lisa"


def score(units: Sequence[Unit]) -> dict:
    """All figures of one split, `protocol`, `n`, `giou` and `ciou` among them. Raises ValueError without units."""
    if not units:
        raise ValueError("no units to score: the split is empty")
    protocol = protocol_of(units)
    return {"protocol": protocol, **PROTOCOLS[protocol](units)}


def read_units(path: str | Path) -> list[Unit]:
    """The units of a split's JSONL. Raises ValueError naming the first line that is no unit, or a file without any."""
    units = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not a unit record ({error})") from error
            units.append(Unit.read(record, f"{path}, line {number}"))
    if not units:
        raise ValueError(f"{path} holds no units; expected a line for each, as an evaluation writes them")
    return units
