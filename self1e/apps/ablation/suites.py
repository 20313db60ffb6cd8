"""The rows of the ablation, and what the paper says about them.

A row is one of the files `configs/ablation_*.yaml`, the same that a run on a cluster takes; the full method has none.
"""

from dataclasses import dataclass

FULL = "full"
SUITES: dict[str, tuple[str, ...]] = {  # from the least to the most that the paper expects
    "method": ("baseline", "replication", "rfr", FULL),
    "attention": ("causal", "image", FULL),
    "replication": ("window", "interpolate", FULL),
    "auxiliary": ("no_auxiliary", FULL),
}
LABELS = {  # of the full method, by suite
    "method": "RFA (full)",
    "attention": "image+seg (full)",
    "replication": "tile (full)",
    "auxiliary": "auxiliary loss (full)",
}


def label(suite: str, row: str) -> str:
    """How a row is called in the tables and pictures of a suite."""
    return LABELS[suite] if row == FULL else row.replace("_", " ")


@dataclass(frozen=True)
class Measure:
    """A figure over the units of some splits; no splits: over all of them."""

    label: str
    figure: str
    splits: tuple[str, ...] = ()


MEASURES: dict[str, Measure] = {
    "ciou": Measure("cIoU, all", "ciou"),
    "giou": Measure("gIoU, all", "giou"),
    "boundary_iou": Measure("boundary IoU, all", "boundary_iou"),
    "fine": Measure("boundary IoU, thin + holes + small", "boundary_iou", ("thin", "holes", "small")),
    "reasoning": Measure(
        "cIoU, relations + superlatives + counting", "ciou", ("relations", "superlatives", "counting")
    ),
    "several": Measure("cIoU, several", "ciou", ("several",)),
    "n_acc": Measure("N-acc, none", "n_acc", ("none",)),
}


@dataclass(frozen=True)
class Claim:
    """The paper expects `better` above `worse` (or, with `at_least`, not below) in each of `measures`."""

    suite: str
    better: str
    worse: str
    measures: tuple[str, ...]
    at_least: bool = False

    @property
    def text(self) -> str:
        better, worse = (label(self.suite, row) for row in (self.better, self.worse))
        return f"{better} at least as good as {worse}" if self.at_least else f"{worse} < {better}"


RESOLUTION, ATTENTION = ("ciou", "fine"), ("ciou", "reasoning")
CLAIMS = (
    Claim("method", "replication", "baseline", RESOLUTION),
    Claim("method", "rfr", "replication", RESOLUTION),
    Claim("method", FULL, "rfr", RESOLUTION),
    Claim("attention", "image", "causal", ATTENTION),
    Claim("attention", FULL, "image", ATTENTION),
    Claim("auxiliary", FULL, "no_auxiliary", ("ciou", "fine")),
    Claim("replication", FULL, "window", RESOLUTION, at_least=True),
    Claim("replication", FULL, "interpolate", RESOLUTION, at_least=True),
)
