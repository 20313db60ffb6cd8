"""What to train on: the families of data sets, and the parsed values of the flags that choose among them.

    config = DataConfig.parse(dataset_dir="dataset", data_dir="data", dataset="refer_seg||vqa", sample_rates="2,1")
    mixture = build_mixture(config, batch_size=5, seed=0)

To add a data set, write one class (see `samples.TrainingSet`) and give it one entry in the `sets` of its family. To
add a family, add one entry to FAMILIES; its flag is `--<family>_data`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from self1e.data.samples import TrainingSet
from self1e.data.sets.custom import CustomSet
from self1e.data.sets.reasoning import ReasonSeg, split_names
from self1e.data.sets.referring import GRefCOCO, RefCLEF, RefCOCO, RefCOCOg, RefCOCOPlus
from self1e.data.sets.semantic import ADE20K, PACO, COCOStuff, Mapillary, PascalPart
from self1e.data.sets.vqa import GQA, OKVQA, LLaVAInstruct, TextVQA, VizWiz, VQAv2
from self1e.errors import UserError, check_known

SEPARATOR = "||"


@dataclass(frozen=True)
class SetChoice:
    """A selected set, the further arguments of its class, and whether the rate of its family multiplies it."""

    training_set: type[TrainingSet]
    options: Mapping[str, Any] = field(default_factory=dict)
    rated: bool = True

    def paths(self, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """Files and folders that must exist before it is opened."""
        paths: Callable[..., list[Path]] = self.training_set.paths
        return paths(dataset_dir, data_dir, **self.options)

    def open(self, config: "DataConfig") -> TrainingSet:
        """The set. Raises UserError for files of another schema, and for a set without samples."""
        data = self.training_set(
            config.dataset_dir,
            config.data_dir,
            conversations=config.conversations,
            allow_outside=config.allow_outside,
            **self.options,
        )
        if not len(data):
            raise UserError(
                f"{data.name}: no training samples in {self.paths(config.dataset_dir, config.data_dir)[0]}"
            )
        return data


@dataclass(frozen=True)
class Family:
    """Data sets that share a flag and a rate.

    sets:    name -> class of every known set
    default: the flag's value when it is not given, names joined by "||"; None: it must be given
    help:    the flag's line in `--help`
    options: further flags of the family with their defaults; `choose` gets their values
    unrated: names of sets that count once, whatever the family's rate
    """

    sets: Mapping[str, type[TrainingSet]]
    default: str | None
    help: str
    options: Mapping[str, Any] = field(default_factory=dict)
    unrated: tuple[str, ...] = ()

    def choose(self, flag: str, value: str | None, **options: Any) -> tuple[SetChoice, ...]:
        """The sets that a flag's value names. Raises UserError naming the flag and what is known."""
        names = _names(value or "", self.sets, flag)
        return tuple(SetChoice(self.sets[name], rated=name not in self.unrated) for name in names)


class ReasoningFamily(Family):
    """A family whose flag also names the splits to train on, as in "ReasonSeg|train_val"."""

    def choose(self, flag: str, value: str | None, **options: Any) -> tuple[SetChoice, ...]:
        names, _, splits = (value or "").partition("|")
        split_names(splits or "train")
        if options["explanatory"] != -1 and not 0 <= options["explanatory"] <= 1:
            raise UserError(f"--explanatory is {options['explanatory']}; expected -1 (off) or a share from 0 to 1")
        chosen = super().choose(flag, names)
        return tuple(SetChoice(c.training_set, {"splits": splits or "train"} | options) for c in chosen)


class CustomFamily(Family):
    """A family whose flag holds paths of own data, each of which is a set."""

    def choose(self, flag: str, value: str | None, **options: Any) -> tuple[SetChoice, ...]:
        if not value:
            raise UserError(f"--dataset custom needs {flag}: one path or several, joined by ||")
        return tuple(SetChoice(CustomSet, {"source": path.strip()}) for path in value.split(SEPARATOR))


def _by_name(*sets: type[TrainingSet]) -> dict[str, type[TrainingSet]]:
    return {training_set.name: training_set for training_set in sets}


FAMILIES: dict[str, Family] = {
    "sem_seg": Family(
        _by_name(ADE20K, COCOStuff, PascalPart, PACO, Mapillary),
        "ade20k||cocostuff||pascal_part||paco_lvis",
        "semantic and part segmentation sets, joined by ||",
    ),
    "refer_seg": Family(
        _by_name(RefCLEF, RefCOCO, RefCOCOPlus, RefCOCOg, GRefCOCO),
        "refclef||refcoco||refcoco+||refcocog",
        "referring sets, joined by ||",
    ),
    "reason_seg": ReasoningFamily(
        _by_name(ReasonSeg), "ReasonSeg|train", "the reasoning set and its splits", {"explanatory": -1.0}
    ),
    "vqa": Family(
        _by_name(LLaVAInstruct, VQAv2, OKVQA, TextVQA, VizWiz, GQA),
        "llava_instruct_150k||vqav2||okvqa||textvqa||vizwiz||gqa",
        "conversation and question sets, joined by ||",
        unrated=("vqav2", "okvqa", "textvqa", "vizwiz", "gqa"),
    ),
    "custom": CustomFamily({}, None, "own data of the family custom: paths, joined by ||"),
}
DEFAULT_FAMILIES = "sem_seg||refer_seg||reason_seg||vqa"


@dataclass(frozen=True)
class FamilyChoice:
    """A selected family: its rate multiplies its samples in an epoch, of a fraction a share is taken."""

    name: str
    rate: float
    sets: tuple[SetChoice, ...]


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, parsed and checked; nothing of it has been opened yet.

    dataset_dir:   folder of the segmentation sets and LLaVA
    data_dir:      folder of the question sets
    families:      what is trained on, in the order of `--dataset`
    conversations: of a sample, at most (`--num_classes_per_sample`)
    exclude_val:   drop every training photo that an evaluation split on disk uses, under whatever name
    allow_outside: photos may lie outside the folders of their set (see `paths.inside`)
    """

    dataset_dir: Path
    data_dir: Path
    families: tuple[FamilyChoice, ...] = ()
    conversations: int = 3
    exclude_val: bool = False
    allow_outside: bool = False

    @staticmethod
    def flags() -> dict[str, Any]:
        """The flags that `parse` takes besides the two folders, with their defaults."""
        return {
            "dataset": DEFAULT_FAMILIES,
            "sample_rates": None,
            **{f"{name}_data": family.default for name, family in FAMILIES.items()},
            **{name: value for family in FAMILIES.values() for name, value in family.options.items()},
            "num_classes_per_sample": 3,
            "exclude_val": False,
            "allow_outside": False,
        }

    @classmethod
    def parse(cls, *, dataset_dir: str | Path, data_dir: str | Path, **flags: Any) -> "DataConfig":
        """Build it from the values of the command line's flags of the same names (see `flags`).

        sample_rates: one per family of `dataset`, in its order; None: 1 each
        Raises UserError that names the flag, TypeError for a name that is no flag.
        """
        if unknown := flags.keys() - cls.flags().keys():
            raise TypeError(f"DataConfig.parse takes no {', '.join(sorted(unknown))}")
        flags = cls.flags() | flags
        names = _names(flags["dataset"], FAMILIES, "--dataset")
        if flags["num_classes_per_sample"] < 1:
            raise UserError(f"--num_classes_per_sample is {flags['num_classes_per_sample']}; expected at least 1")
        families = []
        for name, rate in zip(names, _rates(flags["sample_rates"], names)):
            options = {option: flags[option] for option in FAMILIES[name].options}
            sets = FAMILIES[name].choose(f"--{name}_data", flags[f"{name}_data"], **options)
            families.append(FamilyChoice(name, rate, sets))
        return cls(
            dataset_dir=Path(dataset_dir),
            data_dir=Path(data_dir),
            families=tuple(families),
            conversations=flags["num_classes_per_sample"],
            exclude_val=flags["exclude_val"],
            allow_outside=flags["allow_outside"],
        )

    def paths(self) -> list[tuple[str, Path]]:
        """(set, path) of every file and folder that the selected sets need."""
        return [
            (choice.training_set.name, path)
            for family in self.families
            for choice in family.sets
            for path in choice.paths(self.dataset_dir, self.data_dir)
        ]


def _names(value: str, known: Iterable[str], flag: str) -> list[str]:
    names = [name.strip() for name in value.split(SEPARATOR)]
    check_known(f"{flag}: unknown", names, known)
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
