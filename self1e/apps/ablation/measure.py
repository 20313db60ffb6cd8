"""Measure a model on the splits of the shapes benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.splits import SPLITS, load_split
from self1e.evaluation.segmentation.metrics import Unit, iou, mean, rela
from self1e.evaluation.segmentation.run import make_units
from self1e.model.inference import Segmentation
from self1e.synthetic.benchmark import FAMILIES

SPLIT = "grefcoco|unc|val"  # of each family's tree


def measure(model: Self1EForSegmentation, processor: Self1EProcessor, benchmark: Path) -> list[dict[str, Any]]:
    """The units of every held-out split below `benchmark`, with `split`."""
    units = []
    for family in FAMILIES:
        for photo in load_split(SPLIT, benchmark / family):
            image, targets = photo.load()
            results = cast(list[Segmentation], model.segment(processor, image, photo.sentences))
            masks = np.stack([result.mask for result in results])
            for unit in make_units(photo, SPLITS[SPLIT], masks, targets):
                units.append({"split": family, **unit.record()})
    return units


def figures(units: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """cIoU, gIoU and N-acc by the generalised protocol, boundary IoU as the mean over sentences with a target."""
    scores = rela([Unit.read(unit) for unit in units])
    edges = [iou(unit["boundary_I"], unit["boundary_U"]) for unit in units if not unit["no_target"]]
    return {**{name: scores[name] for name in ("ciou", "giou", "n_acc")}, "boundary_iou": mean(edges)}
