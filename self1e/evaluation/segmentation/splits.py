"""Segmentation benchmarks: a benchmark = one entry here, plus its name in `self1e.data` where its files are read.

Published figures are percent, of the SELF1E paper (arXiv 2603.19026): `2B`, `8B` = trained on the base
mixture, `SEG-2B`, `SEG-8B` = on the segmentation mixture. They are cIoU except where an entry says otherwise.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

MODELS = ("2B", "SEG-2B", "8B", "SEG-8B")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How a split is scored and what to compare with.

    protocol: a key of `mask_metrics.PROTOCOLS`. headline: the figures that the paper reports, keys of the result.
    published: model -> one percentage for each headline figure. default: part of "all splits".
    """

    protocol: str = "lisa"
    headline: tuple[str, ...] = ("ciou",)
    published: dict[str, tuple[float, ...]] = field(default_factory=dict)
    default: bool = True


def _referring(*ciou: float, protocol: str = "lisa") -> Benchmark:
    return Benchmark(protocol=protocol, published={model: (value,) for model, value in zip(MODELS, ciou)})


def _reasoning(small: tuple[float, float], large: tuple[float, float]) -> Benchmark:
    return Benchmark(protocol="reasonseg", headline=("giou", "ciou"), published={"2B": small, "8B": large})


BENCHMARKS: dict[str, Benchmark] = {
    "ReasonSeg|val": _reasoning((59.4, 68.8), (65.9, 69.7)),
    "ReasonSeg|test": _reasoning((57.3, 57.6), (65.7, 67.0)),
    "refcoco|unc|val": _referring(80.2, 84.3, 82.5, 84.7),
    "refcoco|unc|testA": _referring(82.1, 85.4, 83.8, 86.2),
    "refcoco|unc|testB": _referring(77.6, 82.3, 80.1, 83.4),
    "refcoco+|unc|val": _referring(74.6, 78.9, 77.6, 80.2),
    "refcoco+|unc|testA": _referring(79.1, 83.5, 81.6, 84.2),
    "refcoco+|unc|testB": _referring(69.2, 75.1, 73.7, 77.0),
    "refcocog|umd|val": _referring(77.0, 80.4, 79.1, 82.1),
    "refcocog|umd|test": _referring(77.8, 81.0, 79.8, 82.8),
    "grefcoco|unc|val": _referring(protocol="rela"),
    "grefcoco|unc|testA": _referring(protocol="rela"),
    "grefcoco|unc|testB": _referring(protocol="rela"),
    "refclef|unc|val": Benchmark(default=False),
    "refclef|unc|test": Benchmark(default=False),
}

OWN_DATA = Benchmark(default=False)  # custom|<path>

DEFAULT_SPLITS: tuple[str, ...] = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.default)


def get_benchmarks(names: Iterable[str]) -> dict[str, Benchmark]:
    """The entries of `names`, in that order. Raises ValueError listing every unknown name and the known ones."""
    names = list(names)
    known = BENCHMARKS | {name: OWN_DATA for name in names if name.startswith("custom|")}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"unknown evaluation split {', '.join(map(repr, unknown))}; known: {', '.join(BENCHMARKS)}, custom|<path>"
        )
    return {name: known[name] for name in names}


def file_stem(split: str) -> str:
    """`refcoco|unc|val` -> `refcoco_unc_val`, `custom|own/val.csv` -> `custom_own_val_csv`: stem of result files."""
    return re.sub(r"[|/\\:.]+", "_", split)
