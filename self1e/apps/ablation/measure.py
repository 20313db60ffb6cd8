"""Measure a model on the splits of the shapes benchmark.

Beside the evaluation's counts a unit holds those of the boundary IoU (Cheng et al. 2021): of both masks only the
pixels that lie within a distance of their contour, 2% of the photo's diagonal, are compared.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.splits import SPLITS, load_split
from self1e.evaluation.segmentation.metrics import Unit, iou, mean, rela
from self1e.evaluation.segmentation.run import make_units
from self1e.model.inference import Segmentation
from self1e.synthetic.benchmark import FAMILIES

BOUNDARY = 0.02  # of the diagonal
SPLIT = "grefcoco|unc|val"  # of each family's tree


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask bool (H, W) within the boundary's distance of its contour; the photo's edge counts."""
    distance = max(1, round(BOUNDARY * math.hypot(*mask.shape)))
    padded = np.pad(mask.astype(np.uint8), 1)
    inside = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1] > 0
    return mask & ~inside


def measure(model: Self1EForSegmentation, processor: Self1EProcessor, benchmark: Path) -> list[dict[str, Any]]:
    """The units of every held-out split below `benchmark`, with `split`, `boundary_I` and `boundary_U`."""
    units = []
    for family in FAMILIES:
        for photo in load_split(SPLIT, benchmark / family):
            image, targets = photo.load()
            results = cast(list[Segmentation], model.segment(processor, image, photo.sentences))
            masks = np.stack([result.mask for result in results])
            for unit, mask, target in zip(make_units(photo, SPLITS[SPLIT], masks, targets), masks, targets == 1):
                found, wanted = boundary(mask), boundary(target)
                edges = {"boundary_I": int((found & wanted).sum()), "boundary_U": int((found | wanted).sum())}
                units.append({"split": family, **unit.record(), **edges})
    return units


def figures(units: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """cIoU, gIoU and N-acc by the generalised protocol, boundary IoU as the mean over sentences with a target."""
    scores = rela([Unit.read(unit, unit["id"]) for unit in units])
    edges = [iou(unit["boundary_I"], unit["boundary_U"]) for unit in units if not unit["no_target"]]
    return {**{name: scores[name] for name in ("ciou", "giou", "n_acc")}, "boundary_iou": mean(edges)}
