"""The known totals of the public sets, and how a user's files compare with them.

`totals.json` holds images, expressions (refs), sentences, questions and conversations per training set and evaluation
split, as the sets' own documentation and the loaders of other projects state them. A set without a confirmed total has
no entry.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import numpy as np

from self1e.data.samples import EvalSplit, TrainingSet
from self1e.data.sets.referring import ReferringData


@cache
def known_totals() -> dict[str, dict[str, int]]:
    """Set or split -> what is counted -> the known total."""
    return json.loads(files("self1e.data").joinpath("totals.json").read_text(encoding="utf-8"))


def counts(data: TrainingSet | EvalSplit) -> dict[str, int]:
    """What a set or split holds on disk, for `compare`."""
    if isinstance(reader := getattr(data, "data", None), ReferringData):
        return reader.counts()
    return {"images": len(np.unique(data.image_keys())), "questions": len(data), "conversations": len(data)}


def compare(name: str, counts: Mapping[str, int]) -> str:
    """ "complete", "partly: 1,499 of 1,500 images", "another version: ...", or "-" where no total is known.

    counts: what a set or split holds, such as {"images": 1500, "sentences": 10834}
    """
    known = known_totals().get(name, {})
    differing = {what: total for what, total in known.items() if what in counts and counts[what] != total}
    more = [what for what in differing if counts[what] > differing[what]]
    if not known.keys() & counts.keys():
        return "-"
    if not differing:
        return "complete"
    what = (more or list(differing))[0]
    amount = f"{counts[what]:,} of {differing[what]:,} {what}"
    return f"another version: {amount}" if more else f"partly: {amount}"
