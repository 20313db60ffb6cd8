"""What to train on: the families of data sets, and what the flags select among them.

To add a data set, write one class (see `samples.TrainingSet`) and enter it in its family. To add a family, add one
entry to FAMILIES and one to DEFAULTS; its flag is `--<family>_data`.
"""

import math
from collections.abc import Iterable
from typing import Any

from self1e.data.samples import TrainingSet
from self1e.data.sets.custom import Custom
from self1e.data.sets.reasoning import ReasonSeg
from self1e.data.sets.referring import Referring
from self1e.data.sets.semantic import ADE20K, PACO, COCOStuff, Mapillary, PascalPart
from self1e.data.sets.vqa import QUESTIONS, LLaVAInstruct, QuestionSet
from self1e.errors import UserError, check_known

SEPARATOR = "||"
# Family, whose sets share a flag and a rate -> name of a set, which may go on in the flag ("ReasonSeg|val") -> class.
FAMILIES: dict[str, dict[str, type[TrainingSet]]] = {
    "sem_seg": {
        "ade20k": ADE20K,
        "cocostuff": COCOStuff,
        "pascal_part": PascalPart,
        "paco_lvis": PACO,
        "mapillary": Mapillary,
    },
    "refer_seg": dict.fromkeys(("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco"), Referring),
    "reason_seg": {"ReasonSeg": ReasonSeg},
    "vqa": {"llava_instruct_150k": LLaVAInstruct, **dict.fromkeys(QUESTIONS, QuestionSet)},
    "custom": {},  # paths of own data
}
DEFAULTS = {  # what the flag of a family selects where it is not given; own data must be given
    "sem_seg": "ade20k||cocostuff||pascal_part||paco_lvis",
    "refer_seg": "refclef||refcoco||refcoco+||refcocog",
    "reason_seg": "ReasonSeg|train",
    "vqa": "llava_instruct_150k||vqav2||okvqa||textvqa||vizwiz||gqa",
}
DEFAULT_FAMILIES = "sem_seg||refer_seg||reason_seg||vqa"
Selection = list[tuple[list[TrainingSet], float]]  # each family's sets, not opened yet, and its rate


def select(*, dataset: str = DEFAULT_FAMILIES, sample_rates: str | None = None, **flags: Any) -> Selection:
    """What the flags of these names select; flags: those of families and sets, and any others. Raises UserError."""
    selection = []
    names = _names(dataset, FAMILIES, "--dataset")
    for name, rate in zip(names, _rates(sample_rates, names)):
        value, known = flags.get(f"{name}_data", DEFAULTS.get(name)) or "", FAMILIES[name]
        if name == "custom":
            if not value:
                raise UserError("--dataset custom needs --custom_data: one path or several, joined by ||")
            own, known = [f"custom|{path.strip()}" for path in value.split(SEPARATOR)], {"custom": Custom}
        else:
            own = _names(value, known, f"--{name}_data")
        selection.append(([known[each.split("|")[0]](each, **flags) for each in own], rate))
    return selection


def _names(value: str, known: Iterable[str], flag: str) -> list[str]:
    names = [name.strip() for name in value.split(SEPARATOR)]
    check_known(f"{flag}: unknown", [name.split("|")[0] for name in names], known)
    return names


def _rates(sample_rates: str | None, families: list[str]) -> list[float]:
    if sample_rates is None:
        return [1.0] * len(families)
    try:
        rates = [float(rate) for rate in sample_rates.split(",")]
    except ValueError:
        rates = []
    if len(rates) != len(families) or not all(0 <= rate < math.inf for rate in rates):
        raise UserError(
            f"--sample_rates {sample_rates!r}: expected {len(families)} numbers from 0 on, such as 1,0.5, one for "
            f"each of --dataset in that order ({', '.join(families)})"
        )
    return rates
