"""The known totals of the public sets, and how a user's files compare with them.

`totals.json` holds images, expressions (refs), sentences, questions and conversations per training set and evaluation
split, as the sets' own documentation and the loaders of other projects state them.
"""

import json
from functools import cache
from importlib.resources import files

import numpy as np

from self1e.data.samples import PhotoSet
from self1e.data.sets.referring import Referring


@cache
def known_totals() -> dict[str, dict[str, int]]:
    """Set or split -> what is counted -> the known total."""
    return json.loads(files("self1e.data").joinpath("totals.json").read_text(encoding="utf-8"))


def completeness(name: str, data: PhotoSet) -> str:
    """ "complete", "partly: 1,499 of 1,500 images", "another version: ...", or "-" where no total is known."""
    known = known_totals().get(name)
    if not known:
        return "-"
    counts = {"images": len(np.unique(data.image_keys())), "questions": len(data), "conversations": len(data)}
    if isinstance(data, Referring):
        counts = data.counts()
    differing = sorted((counts[what] <= total, what) for what, total in known.items() if counts[what] != total)
    if not differing:
        return "complete"
    fewer, what = differing[0]
    return f"{'partly' if fewer else 'another version'}: {counts[what]:,} of {known[what]:,} {what}"
