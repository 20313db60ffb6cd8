"""What `self1e data get` knows of each data set: `data_sources/*.yaml`, read into records."""

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from self1e.apps.download import Address
from self1e.flags import check_known


@dataclass(frozen=True)
class Roots:
    """The folders of this machine that stand for `dataset/`, `data/` and the downloads."""

    dataset: Path
    data: Path
    downloads: Path

    def place(self, name: str) -> Path:
        """ "data/gqa/images" -> that path below `data`."""
        root, _, rest = name.partition("/")
        return {"dataset": self.dataset, "data": self.data}[root] / rest


@dataclass(frozen=True)
class File:
    """A file to download, or to make, and where its contents go. The keys are explained in segmentation.yaml."""

    name: str
    addresses: list[Address]
    size: int | None  # bytes, perhaps approximate
    options: dict[str, str]
    page: str | None = None
    unpack: dict[str, str] = field(default_factory=dict)
    place: str | None = None
    make: str | None = None
    of: list[str] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """Everything in the tree that comes from it."""
        return [self.place] if self.place else list(self.unpack.values())


@dataclass(frozen=True)
class DataSet:
    """A data set: files of its own, and folders of photos that belong to another set.

    photos: name of a set of photos -> places where this set looks for them
    inputs: files that only conversions need
    """

    name: str
    title: str
    licence: str
    files: dict[str, File]
    inputs: dict[str, File] = field(default_factory=dict)
    photos: dict[str, list[str]] = field(default_factory=dict)
    account: str | None = None
    note: str | None = None
    unconfirmed: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """All sets by name, and groups of names."""

    sets: dict[str, DataSet]
    groups: dict[str, list[str]]

    def choose(self, names: list[str]) -> list[DataSet]:
        """The sets of these names and groups ("all": every one), each behind the photos that it needs.

        Raises ValueError for an unknown name, with the known ones.
        """
        check_known("unknown set", names, [*self.groups, "all", *self.sets])
        chosen: dict[str, DataSet] = {}
        for name in names:
            for member in self.sets if name == "all" else self.groups.get(name, [name]):
                for each in (*self.sets[member].photos, member):
                    chosen[each] = self.sets[each]
        return list(chosen.values())

    def photo_places(self, name: str) -> list[str]:
        """Every place where a set looks for the photos of the set `name`."""
        places = [place for each in self.sets.values() for place in each.photos.get(name, [])]
        return list(dict.fromkeys(places))


def read_file(name: str, entry: dict) -> File:
    known = {key: entry.pop(key) for key in ("bytes", "sha256", "md5") if key in entry}
    addresses = [
        Address(**source) if isinstance(source, dict) else Address(source, **known) for source in entry.pop("from", [])
    ]
    size = known.get("bytes", entry.pop("about", None))
    given = {key: entry.pop(key) for key in ("page", "unpack", "place", "make", "of") if key in entry}
    return File(name, addresses, size, options=entry, **given)


@cache
def load_catalogue() -> Catalogue:
    """The catalogue that ships with the package."""
    sets: dict[str, DataSet] = {}
    groups: dict[str, list[str]] = {}
    folder = files("self1e.apps").joinpath("data_sources")
    for name in "segmentation", "questions":
        content = yaml.safe_load(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
        groups |= content["groups"]
        for key, entry in content["sets"].items():
            for part in "files", "inputs":
                if part in entry:
                    entry[part] = {each: read_file(each, dict(facts)) for each, facts in entry[part].items()}
            sets[key] = DataSet(name=key, **entry)
    return Catalogue(sets, groups)
