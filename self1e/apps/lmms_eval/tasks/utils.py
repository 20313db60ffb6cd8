"""A segmentation split of the tree as a task of lmms-eval: one document per sentence, scored as `eval_all.sh` does.

A reply is JSON with masks in COCO's RLE, `{"masks": [{"size": [H, W], "counts": "..."}, ...]}`, as lmms-eval's own
segmentation models write it. Several masks are united. A reply that holds no such text predicts nothing.
"""

import json
import os
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from self1e.data.masks import decode_segmentation
from self1e.data.samples import EvalImage, EvalSplit
from self1e.data.splits import get_splits, load_split
from self1e.evaluation.segmentation.metrics import Unit, score
from self1e.evaluation.segmentation.run import make_units
from self1e.model.prompts import IMAGE_TAG

DATASET_DIR = "SELF1E_DATASET_DIR"  # variable with the root of the segmentation data; default: dataset
FIGURES = ("giou", "ciou", "rela_giou", "rela_ciou", "n_acc", "t_acc")


class SplitTask(ConfigurableMessagesTask):
    """A task whose documents are the sentences of the split that its YAML names as `dataset_name`."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Read the annotations from the tree. Raises FileNotFoundError naming every missing path."""
        name = self.config.dataset_name
        documents = [
            {"split": name, "photo": number, "row": row, "question": prompt.removeprefix(f"{IMAGE_TAG}\n")}
            for number, photo in enumerate(photos_of(name))
            for row, prompt in enumerate(photo.prompts)
        ]
        self.dataset = DatasetDict({self.config.test_split: Dataset.from_list(documents)})
        self.dataset_no_image = self.dataset


@lru_cache
def photos_of(split: str) -> EvalSplit:
    return load_split(split, os.environ.get(DATASET_DIR, "dataset"))


@lru_cache(maxsize=2)  # a photo's sentences follow each other
def load(split: str, number: int) -> tuple[EvalImage, Image.Image, np.ndarray]:
    """The annotation, the photo and the masks, uint8 (n, H, W), of a photo."""
    photo = photos_of(split)[number]
    return photo, *photo.load()


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [load(doc["split"], doc["photo"])[1]]


def doc_to_text(doc: dict[str, Any]) -> str:
    return doc["question"]


def doc_to_target(doc: dict[str, Any]) -> str:
    """The id of the sentence; what a model must find is a mask, which `process_results` reads."""
    return photos_of(doc["split"])[doc["photo"]].unit_ids[doc["row"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, Any]]:
    """The counts of one sentence (`Unit.record`) under the name of every figure, for the aggregations below."""
    photo, _, targets = load(doc["split"], doc["photo"])
    row = slice(doc["row"], doc["row"] + 1)
    fields = ("sentences", "is_sentence", "unit_ids", "no_target")
    alone = replace(photo, **{name: getattr(photo, name)[row] for name in fields})
    entry = get_splits([doc["split"]])[doc["split"]]
    (unit,) = make_units(alone, entry, united(results[0], targets.shape[1:])[None], targets[row])
    return dict.fromkeys(FIGURES if entry.protocol == "rela" else FIGURES[:2], unit.record())


def united(reply: str, size: tuple[int, ...]) -> np.ndarray:
    """The union of a reply's masks, bool of the given size (H, W); masks of another size are resized to it.

    A reply of another form, which any other model may give, predicts nothing.
    """
    height, width = size
    union = np.zeros((height, width), bool)
    try:
        masks = [decode_segmentation(rle, *rle["size"]) for rle in json.loads(reply)["masks"]]
    except (ValueError, TypeError, KeyError):
        return union
    for mask in masks:
        resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
        union |= np.asarray(resized) > 0
    return union


def figure(records: list[dict[str, Any]], name: str, *, rela: bool = False) -> float | None:
    """A figure of a split from the counts of its sentences; `rela`: by ReLA's protocol."""
    found = score([Unit.read(record) for record in records])
    return found["rela"][name] if rela else found[name]


# The aggregations that the tasks name.
giou, ciou = (partial(figure, name=name) for name in ("giou", "ciou"))
rela_giou, rela_ciou, n_acc, t_acc = (
    partial(figure, name=name, rela=True) for name in ("giou", "ciou", "n_acc", "t_acc")
)
