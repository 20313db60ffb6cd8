"""Training sets and the mixture.

    mixture = build_mixture(dataset_dir="dataset", data_dir="data", batch_size=5, seed=0)
    for tokens in mixture.micro_batches(epoch, rank=0, world_size=1): samples = [mixture[t] for t in tokens]

To add a set: one class (see `sample.TrainingSet`), one entry in TRAINING_SETS. Own data needs no code: the family
"custom" trains on the paths of `custom_data` (see `custom`).
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.masks import decode_segmentation
from self1e.data.mixture import Group, Mixture
from self1e.data.paths import missing, require_paths
from self1e.data.sample import Sample, SampleError, TrainingSet, image_key, load_image
from self1e.data.sets.custom import CustomSet
from self1e.data.sets.reasoning import ReasonSeg
from self1e.data.sets.referring import GRefCOCO, RefCLEF, RefCOCO, RefCOCOg, RefCOCOPlus
from self1e.data.sets.semantic import ADE20K, PACO, COCOStuff, Mapillary, PascalPart
from self1e.data.sets.vqa import GQA, OKVQA, LLaVAInstruct, QuestionSet, TextVQA, VizWiz, VQAv2
from self1e.data.splits import SPLITS, load_split, split_paths

__all__ = [
    "FAMILIES",
    "TRAINING_SETS",
    "Mixture",
    "Sample",
    "SampleError",
    "TrainingSet",
    "build_mixture",
    "decode_segmentation",
    "image_key",
    "load_image",
    "missing_paths",
]

TRAINING_SETS: dict[str, dict[str, type[TrainingSet]]] = {
    "sem_seg": {c.name: c for c in (ADE20K, COCOStuff, PascalPart, PACO, Mapillary)},
    "refer_seg": {c.name: c for c in (RefCLEF, RefCOCO, RefCOCOPlus, RefCOCOg, GRefCOCO)},
    "reason_seg": {ReasonSeg.name: ReasonSeg},
    "vqa": {c.name: c for c in (LLaVAInstruct, VQAv2, OKVQA, TextVQA, VizWiz, GQA)},
}
FAMILIES = (*TRAINING_SETS, CustomSet.name)
SEM_SEG = "ade20k||cocostuff||pascal_part||paco_lvis"
REFER_SEG = "refclef||refcoco||refcoco+||refcocog"
REASON_SEG = "ReasonSeg|train"
VQA = "llava_instruct_150k||vqav2||okvqa||textvqa||vizwiz||gqa"


def _names(value: str, known: Iterable[str], flag: str) -> list[str]:
    names = [name.strip() for name in value.split("||")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{flag}: unknown {', '.join(map(repr, unknown))}; known: {', '.join(known)}, joined by ||")
    return names


def _selection(
    dataset: str,
    sem_seg_data: str,
    refer_seg_data: str,
    reason_seg_data: str,
    vqa_data: str,
    custom_data: str | None,
    explanatory: float,
) -> list[tuple[type[TrainingSet], dict[str, Any]]]:
    """(class, further arguments of it) of every selected set, in order."""
    selected = []
    sets = {"sem_seg": sem_seg_data, "refer_seg": refer_seg_data, "reason_seg": reason_seg_data, "vqa": vqa_data}
    for family in _names(dataset, FAMILIES, "--dataset"):
        if family == CustomSet.name:
            if not custom_data:
                raise ValueError("--dataset custom needs --custom_data: one path or several, joined by ||")
            selected += [(CustomSet, {"source": path.strip()}) for path in custom_data.split("||")]
            continue
        value, arguments = sets[family], {}
        if family == "reason_seg":
            value, _, splits = value.partition("|")
            arguments = {"splits": splits or "train", "explanatory": explanatory}
        names = _names(value, TRAINING_SETS[family], f"--{family}_data")
        selected += [(TRAINING_SETS[family][name], arguments) for name in names]
    return selected


def missing_paths(
    *,
    dataset_dir: str | Path,
    data_dir: str | Path = "data",
    dataset: str,
    sem_seg_data: str = SEM_SEG,
    refer_seg_data: str = REFER_SEG,
    reason_seg_data: str = REASON_SEG,
    vqa_data: str = VQA,
    custom_data: str | None = None,
    explanatory: float = -1.0,
) -> list[tuple[str, Path]]:
    """(set, path) of everything that is not on disk but that the selected sets need."""
    selection = _selection(dataset, sem_seg_data, refer_seg_data, reason_seg_data, vqa_data, custom_data, explanatory)
    return missing(
        (training_set.name, path)
        for training_set, arguments in selection
        for path in training_set.paths(Path(dataset_dir), Path(data_dir), **arguments)
    )


def _rates(sample_rates: str, families: list[str]) -> list[float]:
    try:
        rates = [float(rate) for rate in str(sample_rates).split(",")]
    except ValueError as error:
        raise ValueError(f"--sample_rates {sample_rates!r}: {error}; expected numbers such as 1,1,0.5") from error
    if any(rate < 0 or not math.isfinite(rate) for rate in rates):
        raise ValueError(f"--sample_rates {sample_rates!r}: rates must be finite and not negative")
    if len(rates) != len(families):
        raise ValueError(
            f"--sample_rates {sample_rates!r} holds {len(rates)} rates for the {len(families)} of --dataset "
            f"({', '.join(families)}); give one each, in that order"
        )
    return rates


def evaluation_keys(dataset_dir: str | Path) -> np.ndarray:
    """Sorted `image_key`s of every photo of the evaluation splits that are on disk."""
    keys = [load_split(name, dataset_dir).keys() for name in SPLITS if not missing(split_paths([name], dataset_dir))]
    return np.unique(np.concatenate(keys)) if keys else np.zeros(0, np.int64)


def build_mixture(
    *,
    dataset_dir: str | Path,
    data_dir: str | Path,
    batch_size: int,
    seed: int,
    dataset: str = "sem_seg||refer_seg||reason_seg||vqa",
    sample_rates: str = "1,1,1,1",
    sem_seg_data: str = SEM_SEG,
    refer_seg_data: str = REFER_SEG,
    reason_seg_data: str = REASON_SEG,
    vqa_data: str = VQA,
    custom_data: str | None = None,
    explanatory: float = -1.0,
    num_classes_per_sample: int = 3,
    exclude_val: bool = False,
    mode: str = "published",
    transform: Callable[[Sample], Any] | None = None,
) -> Mixture:
    """The training mixture of the selected sets (arguments as the flags of the same names).

    sample_rates: one per family of `dataset`, in its order; a rate multiplies the family's samples in an epoch, a
                  fraction takes a share. In vqa it multiplies llava_instruct_150k, the question sets count once
    exclude_val:  drops every training photo that an evaluation split on disk uses, under whatever name
    Raises ValueError for bad names, rates or schemas; FileNotFoundError naming every missing path.
    """
    families = _names(dataset, FAMILIES, "--dataset")
    if len(set(families)) < len(families):
        raise ValueError(f"--dataset {dataset!r} names a family twice; use --sample_rates instead")
    rates = _rates(sample_rates, families)
    if num_classes_per_sample < 1:
        raise ValueError(f"--num_classes_per_sample is {num_classes_per_sample}; expected at least 1")
    dataset_dir, data_dir = Path(dataset_dir), Path(data_dir)
    sets = {
        "sem_seg_data": sem_seg_data,
        "refer_seg_data": refer_seg_data,
        "reason_seg_data": reason_seg_data,
        "vqa_data": vqa_data,
        "custom_data": custom_data,
        "explanatory": explanatory,
    }
    require_paths(missing_paths(dataset=dataset, dataset_dir=dataset_dir, data_dir=data_dir, **sets))
    excluded = evaluation_keys(dataset_dir) if exclude_val else None
    groups = []
    for family, rate in zip(families, rates):
        members = []
        for training_set, arguments in _selection(family, **sets):
            data = training_set(dataset_dir, data_dir, rows=num_classes_per_sample, seed=seed, **arguments)
            if excluded is not None:
                data.exclude(excluded)
            members.append(data)
        if family == "vqa":
            groups.append(Group([d for d in members if not isinstance(d, QuestionSet)], rate, False, redraw=True))
            groups.append(Group([d for d in members if isinstance(d, QuestionSet)], 1, False, redraw=False))
        else:
            groups.append(Group(members, rate, True, redraw=family == "reason_seg"))
    return Mixture(groups, batch_size=batch_size, seed=seed, mode=mode, transform=transform)
