"""What to train on: the families of data sets, and the parsed values of the flags that choose among them.

    config = DataConfig.parse(dataset_dir="dataset", data_dir="data", dataset="refer_seg||vqa", sample_rates="2,1")
    mixture = build_mixture(config, batch_size=5, seed=0)

To add a data set, write one class (see `samples.TrainingSet`) and give it one entry in the `sets` of its family. To
add a family, add one entry to FAMILIES; its flag is `--<family>_data`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from self1e.data.samples import TrainingSet
from self1e.data.sets.custom import Custom
from self1e.data.sets.reasoning import ReasonSeg
from self1e.data.sets.referring import Referring
from self1e.data.sets.semantic import ADE20K, PACO, COCOStuff, Mapillary, PascalPart
from self1e.data.sets.vqa import QUESTIONS, LLaVAInstruct, QuestionSet
from self1e.errors import UserError, check_known

SEPARATOR = "||"


class Family(NamedTuple):
    """Data sets that share a flag and a rate."""

    sets: Mapping[str, type[TrainingSet]]  # by name, which may go on in the flag, as in "ReasonSeg|train_val"
    default: str | None  # the flag's value when it is not given, names joined by "||"; None: it must be given
    help: str  # the flag's line in `--help`
    options: tuple[str, ...] = ()  # further flags that its sets take


REFERRING = ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco")
FAMILIES: dict[str, Family] = {
    "sem_seg": Family(
        {
            "ade20k": ADE20K,
            "cocostuff": COCOStuff,
            "pascal_part": PascalPart,
            "paco_lvis": PACO,
            "mapillary": Mapillary,
        },
        "ade20k||cocostuff||pascal_part||paco_lvis",
        "semantic and part segmentation sets, joined by ||",
    ),
    "refer_seg": Family(
        dict.fromkeys(REFERRING, Referring), SEPARATOR.join(REFERRING[:4]), "referring sets, joined by ||"
    ),
    "reason_seg": Family(
        {"ReasonSeg": ReasonSeg}, "ReasonSeg|train", "the reasoning set and its splits", ("explanatory",)
    ),
    "vqa": Family(
        {"llava_instruct_150k": LLaVAInstruct, **dict.fromkeys(QUESTIONS, QuestionSet)},
        SEPARATOR.join(["llava_instruct_150k", *QUESTIONS]),
        "conversation and question sets, joined by ||",
    ),
    "custom": Family({}, None, "own data of the family custom: paths, joined by ||"),
}
DEFAULT_FAMILIES = "sem_seg||refer_seg||reason_seg||vqa"


@dataclass(frozen=True)
class Choice:
    """A selected set."""

    name: str
    training_set: type[TrainingSet]
    options: Mapping[str, Any]  # of its constructor
    rate: float = 1  # of its family: multiplies the samples of an epoch, of a fraction a share is taken

    def paths(self) -> list[Path]:
        """Files and folders that must exist before it is opened; the first is its own."""
        return self.training_set.paths(self.name, self.options["dataset_dir"], self.options["data_dir"])

    def open(self) -> TrainingSet:
        """The set. Raises UserError for files of another schema, and for a set without samples."""
        data = self.training_set(self.name, **self.options)
        if not len(data):
            raise UserError(f"{data.name}: no training samples in {self.paths()[0]}")
        return data


class DataConfig(NamedTuple):
    """The data of a run, parsed and checked; nothing of it has been opened yet."""

    dataset_dir: Path
    families: list[list[Choice]]  # the selected sets of each family, in the order of `--dataset`
    exclude_val: bool  # drop every training photo that an evaluation split on disk uses, under whatever name

    @classmethod
    def parse(
        cls,
        *,
        dataset_dir: str | Path,
        data_dir: str | Path,
        dataset: str = DEFAULT_FAMILIES,
        sample_rates: str | None = None,
        num_classes_per_sample: int = 3,
        exclude_val: bool = False,
        allow_outside: bool = False,
        **flags: Any,
    ) -> "DataConfig":
        """Build it from the flags of these names; flags: those of families, and any others. Raises UserError."""
        if num_classes_per_sample < 1:
            raise UserError(f"--num_classes_per_sample is {num_classes_per_sample}; expected at least 1")
        common = {"dataset_dir": Path(dataset_dir), "data_dir": Path(data_dir), "allow_outside": allow_outside}
        common["conversations"] = num_classes_per_sample
        families = []
        names = _names(dataset, FAMILIES, "--dataset")
        for name, rate in zip(names, _rates(sample_rates, names)):
            family, value = FAMILIES[name], flags.get(f"{name}_data", FAMILIES[name].default) or ""
            options = common | {option: flags[option] for option in family.options if option in flags}
            if name == "custom":
                if not value:
                    raise UserError("--dataset custom needs --custom_data: one path or several, joined by ||")
                chosen = [Choice(f"custom|{path.strip()}", Custom, options, rate) for path in value.split(SEPARATOR)]
            else:
                own = _names(value, family.sets, f"--{name}_data")
                chosen = [Choice(each, family.sets[each.split("|")[0]], options, rate) for each in own]
            families.append(chosen)
        return cls(Path(dataset_dir), families, exclude_val)

    def paths(self) -> list[tuple[str, Path]]:
        """(set, path) of every file and folder that the selected sets need."""
        choices = [choice for family in self.families for choice in family]
        return [(choice.name.split("|")[0], path) for choice in choices for path in choice.paths()]


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
