"""Get data sets into the trees that training and evaluation read.

    self1e data get --list                              # every set: size, licence, what is there already
    self1e data get refcoco ReasonSeg --dry_run         # what would be done, and what it needs
    self1e data get splits                              # a group: what the 13 evaluation splits need
    self1e data get ade20k --to /big/dataset --data_dir /big/data

Prints what each set needs (size, licence, account), downloads what is open, checks sums where they are known, unpacks
to the tree of dataset/README.md and data/README.md, makes what must be made (PASCAL-Part's train.json, question files
whose address fails) and links photos that several sets share. An interrupted download continues when the same command
runs again. Nothing that exists is overwritten: what is in place is left as it is, whether complete or not, and
`self1e check-data` tells which. A set that asks for an account or a browser prints the steps; a file that you fetched
by hand is taken from the downloads folder.

The addresses come from the documentation of the sets. They are unchecked: nobody has requested them for this program,
and one may be dead or serve another version by now.

Cost: the time of the downloads; COCO's photos alone are 40 GB, twice that with archives.
Exit code: 0 when every set is in place; 1 when something failed or waits for a step of yours; 2 for wrong arguments;
130 after Ctrl-C.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from self1e.apps import converters
from self1e.apps.catalogue import Catalogue, DataSet, File, Roots, load_catalogue
from self1e.apps.download import (
    DownloadError,
    Unavailable,
    download,
    human,
    open_session,
    part_path,
    require_space,
    size,
)
from self1e.apps.unpack import check_format, is_archive, unpack
from self1e.flags import Parser, counted, did_you_mean

UNCHECKED = "The addresses are unchecked: they come from the sets' documentation and one may be dead by now."


class Plan:
    """The chosen sets and where everything of theirs goes."""

    def __init__(self, catalogue: Catalogue, roots: Roots, chosen: list[DataSet]):
        self.catalogue = catalogue
        self.roots = roots
        self.chosen = chosen

    def shared_places(self, name: str) -> list[Path]:
        """Every place where a set looks for the photos of the set `name`, and their own place."""
        own = [place for file in self.catalogue.sets[name].files.values() for place in file.places]
        return [self.roots.place(place) for place in [*own, *self.catalogue.photo_places(name)]]

    def targets(self, each: DataSet, file: File) -> dict[str, Path]:
        """Member of an archive (or "", the file itself) -> path in the tree.

        Photos that several sets share go where they are already, else where the first of the chosen sets looks.
        """
        if file.place:
            return {"": self.roots.place(file.place)}
        targets = {member: self.roots.place(place) for member, place in file.unpack.items()}
        if self.catalogue.photo_places(each.name):
            there = [place for place in self.shared_places(each.name) if place.exists()]
            users = [user.photos[each.name][0] for user in self.chosen if each.name in user.photos]
            there += map(self.roots.place, users[:1])
            targets = dict.fromkeys(targets, there[0]) if there else targets
        return targets

    def is_there(self, each: DataSet, file: File) -> bool:
        """Whether something stands wherever the file's contents go; what is inside is not looked at."""
        return all(target.exists() for target in self.targets(each, file).values())

    def missing(self) -> list[tuple[DataSet, File]]:
        """What is not in place yet."""
        return [(each, f) for each in self.chosen for f in each.files.values() if not self.is_there(each, f)]

    def remaining(self, each: DataSet, file: File) -> int | None:
        """Bytes of a file that have not arrived yet; None where its size is unknown."""
        target = self.roots.downloads / each.name / file.name
        arrived = max(size(path) for path in (target, *(part_path(address, target) for address in file.addresses)))
        return None if file.size is None else 0 if target.exists() else max(0, file.size - arrived)

    def check(self, *, remove: bool) -> None:
        """Find before the work what would stop it. Raises DownloadError with the fix.

        Looked at are links to nothing, rights, scipy where it is needed, and room on the disks as far as sizes are
        known. Photos hardly shrink in archives, so the contents take about as much as the archive.
        """
        archives = [self.remaining(each, file) or 0 for each, file in self.missing() if is_archive(file.name)]
        needs = {self.roots.downloads: max(archives, default=0) if remove else sum(archives)}
        for each, file in self.missing():
            first, *others = [target for target in self.targets(each, file).values() if not target.exists()]
            needs |= {first: file.size or 0} | dict.fromkeys(others, 0)
            if file.make == "pascal_part" and find_spec("scipy") is None:
                raise DownloadError(f'{each.name} needs scipy to read .mat files: pip install "self1e[data]"')
        disks: dict[int, tuple[Path, int]] = {}
        for place, needed in needs.items():
            if place.is_symlink() and not place.exists():
                raise DownloadError(
                    f"{place} is a link to {os.readlink(place)}, which does not exist; mend or remove it"
                )
            existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
            if not existing.is_dir():
                raise DownloadError(f"{existing} is a file where a folder is needed")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise DownloadError(f"no right to write in {existing}; choose another folder with --to, --data_dir")
            disk = existing.stat().st_dev
            disks[disk] = existing, disks.get(disk, (existing, 0))[1] + needed
        for place, needed in disks.values():
            require_space(place, needed, "getting these sets")

    def describe(self, each: DataSet) -> str:
        """What a set needs, and what is done for it."""
        lines = [f"{each.name}: {each.title}", f"  licence: {each.licence}", f"  account: {each.account or 'none'}"]
        lines += [f"  {key}: {text}" for key, text in (("note", each.note), ("unconfirmed", each.unconfirmed)) if text]
        for file in each.files.values():
            amount = human(file.size) if file.size else "size unknown"
            known = any(address.sha256 or address.md5 for address in file.addresses)
            if self.is_there(each, file):
                step = "in place, left as it is"
            elif file.addresses:
                step = f"{amount}, {'sum known' if known else 'no sum known'}, from {file.addresses[0].url}"
            elif file.make:
                step = f"made here from {' and '.join(Path(name).name for name in file.of)}"
            else:
                step = f"by hand, from {file.page}"
            lines.append(f"  {file.name}: {step}")
        return "\n".join(lines + [f"  photos: {photos}" for photos in each.photos])

    def total(self) -> str:
        """The size of what is missing."""
        sizes = [self.remaining(each, file) for each, file in self.missing() if file.addresses]
        known, unknown = [size for size in sizes if size is not None], sizes.count(None)
        amounts = [human(sum(known))] * bool(known) + [f"{unknown} of unknown size"] * bool(unknown)
        archives = any(is_archive(file.name) for _, file in self.missing())
        text = f"{counted(len(sizes), 'file')} to download" + (f", {' and '.join(amounts)}" if amounts else "")
        return text + ("; the contents of archives take about as much again" if archives else "")


class Getter:
    """Brings the sets of a plan into place, one after the other.

    problems: set name -> messages of what failed or is left to the user
    """

    def __init__(self, plan: Plan, *, accept_changed: bool = False, remove: bool = False):
        self.plan = plan
        self.roots = plan.roots
        self.accept_changed = accept_changed
        self.remove = remove
        self.session = open_session()
        self.problems: dict[str, list[str]] = {}

    def get(self) -> None:
        """Bring the sets into place; a failure is noted under its set and the others go on."""
        for each in self.plan.chosen:
            problems = self.problems.setdefault(each.name, [])
            for file in each.files.values():
                try:
                    if not self.plan.is_there(each, file):
                        self.get_file(each, file)
                except (DownloadError, ValueError) as error:
                    problems.append(str(error))
                except OSError as error:
                    problems.append(f"cannot write {error.filename or file.name}: {error.strerror or error}")
            try:
                self.link_photos(each)
            except OSError as error:
                problems.append(f"cannot link {error.filename2 or error.filename}: {error.strerror}; link it by hand")
            problems += [f"its photos ({name}) are not in place" for name in each.photos if self.problems.get(name)]

    def get_file(self, each: DataSet, file: File) -> None:
        """Bring one file, or the contents of one archive, into place. Raises what `get` notes."""
        targets = self.plan.targets(each, file)
        try:
            source = self.fetch(each, file)
        except Unavailable as error:
            if not file.make:
                raise
            if file.addresses:
                print(f"{error}\n{file.name} is made from the official files instead.", file=sys.stderr)
            return self.make(each, file, targets[""])
        try:
            check_format(source, file.name)  # also of what was saved by hand
            if is_archive(file.name):
                unpack(source, targets)
            else:
                move(source, targets[""])
        except ValueError as error:
            raise ValueError(f"{source}: {error}; delete it to fetch it again") from error
        if self.remove:
            source.unlink(missing_ok=True)

    def fetch(self, each: DataSet, file: File) -> Path:
        """Download a file from the first address that has it, unless it is there already; returns its path.

        Raises Unavailable with the reason of each address and the step by hand.
        """
        target = self.roots.downloads / each.name / file.name
        if target.exists():
            return target
        reasons = []
        for address in file.addresses:
            try:
                download(
                    address,
                    target,
                    session=self.session,
                    check=lambda path: check_format(path, file.name),
                    accept_changed=self.accept_changed,
                )
                return target
            except Unavailable as error:
                reasons.append(str(error))
        where = f"open {file.page}" if file.page else f"look for {file.name} on the site of {each.title}"
        account = f" (it takes {each.account})" if each.account else ""
        reasons.append(f"By hand: {where}{account}, save {file.name} as {target}, and run the same command again.")
        raise Unavailable("\n".join(reasons))

    def make(self, each: DataSet, file: File, target: Path) -> None:
        """Make a file from its inputs: files of the set, or paths of the tree."""
        known = each.files | each.inputs
        inputs = [self.fetch(each, known[name]) if name in known else self.roots.place(name) for name in file.of]
        missing = [path for path in inputs if not path.exists()]
        if missing:
            raise ValueError(f"{target} cannot be made without {missing[0]}, which could not be fetched")
        converters.make(str(file.make), inputs, target, file.options)

    def link_photos(self, each: DataSet) -> None:
        """Let every place where a set looks for shared photos lead to the one where they are."""
        for name, places in each.photos.items():
            source = next((place for place in self.plan.shared_places(name) if place.exists()), None)
            for place in map(self.roots.place, places):
                if source is not None and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    link = os.path.relpath(source.resolve(), place.parent.resolve())
                    place.symlink_to(link, target_is_directory=True)


def move(source: Path, target: Path) -> None:
    """Move a download to its place, also on another disk; nothing half shows there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.unpacking")
    try:
        shutil.move(source, staged)
        staged.rename(target)
    finally:
        staged.unlink(missing_ok=True)


def table(catalogue: Catalogue, roots: Roots) -> str:
    """All sets with what is in place, size and licence, and the groups."""
    rows = [("set", "in place", "download", "licence")]
    for each in catalogue.sets.values():
        plan = Plan(catalogue, roots, [each])
        photos = [roots.place(place).exists() for places in each.photos.values() for place in places]
        there = [plan.is_there(each, file) for file in each.files.values()] + photos
        state = "yes" if all(there) else "partly" if any(there) else "no"
        sizes = [file.size for file in each.files.values()]
        amount = human(sum(filter(None, sizes))) if any(sizes) else "unknown"
        by_hand = any(not file.addresses and not file.make for file in each.files.values())
        more = " + ?" if any(sizes) and not all(sizes) else ""
        rows.append((each.name, state, amount + more, each.licence + (" [by hand]" if by_hand else "")))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
    groups = "\n".join(f"  {name}: {' '.join(members)}" for name, members in catalogue.groups.items())
    return f"{text}\n\ngroups:\n{groups}\n  all: every set\n\n{UNCHECKED}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    words = [*(sys.argv[1:] if argv is None else argv)]
    parser = Parser(prog="self1e data get", usage="%(prog)s [SET ...] [flags]", description=__doc__)
    if words and words[0] != "get" and not words[0].startswith("-"):
        hint = did_you_mean(words[0], ["get"]) or f", as in self1e data get {words[0]}"
        parser.error(f"self1e data {words[0]}: the only command is get{hint}")
    add = parser.add_argument
    add("sets", nargs="*", metavar="SET", help="names of sets or groups; --list shows them")
    add("--to", type=Path, default=Path("dataset"), metavar="DIR", help="the dataset folder; default: dataset")
    add("--data_dir", type=Path, metavar="DIR", help="the folder of the question sets; default: data beside --to")
    add("--downloads", type=Path, metavar="DIR", help="where archives are kept; default: downloads in --to")
    add("--list", action="store_true", help="list the sets and stop")
    add("--dry_run", action="store_true", help="print what would be done and stop")
    add("--remove_archives", action="store_true", help="delete an archive once its contents are in place")
    add("--accept_changed", action="store_true", help="take files whose size or sum is not the known one")
    args = parser.parse_args(words[1:] if words[:1] == ["get"] else words)
    if not args.sets and not args.list:
        parser.error("name a set or a group; self1e data get --list shows them")
    for flag in "to", "data_dir", "downloads":
        path = getattr(args, flag)
        if path is not None and path.exists() and not path.is_dir():
            parser.error(f"--{flag} {path} is a file; expected a folder")
    try:
        args.chosen = load_catalogue().choose(args.sets)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    catalogue = load_catalogue()
    roots = Roots(
        args.to, args.data_dir or args.to.absolute().parent / "data", args.downloads or args.to / "downloads"
    )
    if args.list:
        print(table(catalogue, roots))
        return 0
    plan = Plan(catalogue, roots, args.chosen)
    print("\n\n".join(map(plan.describe, args.chosen)))
    print(f"\n{plan.total()}\n{UNCHECKED}")
    if args.dry_run:
        return 0
    getter = Getter(plan, accept_changed=args.accept_changed, remove=args.remove_archives)
    try:
        plan.check(remove=args.remove_archives)
        roots.downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(roots.downloads / ".lock", timeout=0):
            getter.get()
    except KeyboardInterrupt:
        print("\nstopped; what has arrived is kept, run the same command again to continue", file=sys.stderr)
        return 130
    except Timeout:
        print(f"another `self1e data get` uses {roots.downloads}; wait for it, or choose --downloads", file=sys.stderr)
        return 1
    except DownloadError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print()
    for name, problems in getter.problems.items():
        print(f"{name}: {'in place' if not problems else 'not in place'}")
        for problem in problems:
            print("  " + problem.replace("\n", "\n  "), file=sys.stderr)
    if any(getter.problems.values()):
        return 1
    print(f"self1e check-data {roots.dataset} reads everything once and tells whether it is complete")
    return 0
