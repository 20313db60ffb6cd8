"""The results of an evaluation on disk: written while they are made, by any number of processes, and continued.

A folder of results holds those of one setting only. `settings.json` says which weights, code, precision, switches and
decoding made them. `<stem>.jsonl` has a line for each sentence of a split or question of a benchmark; until it is
complete, each process appends to a file of its own, `<stem>.rank<r>.jsonl`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils import cached_file

from self1e import distributed
from self1e.data.samples import TrainingSet
from self1e.data.sets.expressions import ExpressionSet
from self1e.data.splits import SPLITS
from self1e.errors import UserError
from self1e.files import read_json, read_records, to_jsonl, write_json, write_text
from self1e.model.config import Self1EConfig

# Known numbers of images, expressions (refs), sentences, questions and conversations per training set and split, as
# the sets' own documentation and the loaders of other projects state them.
TOTALS: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "totals.json").read_text(encoding="utf-8"))
PACKAGE = Path(__file__).resolve().parents[1]
DECIDING = ("model", "data", "evaluation")  # the packages whose code decides figures
REMEDY = "Use the same settings to continue, another --exp_name to keep both, or --overwrite_eval to evaluate anew"


def checkpoint_folder(text: str) -> str:
    """The folder or hub id that `--version` and `--model_weights` mean: of a run's folder, the `ckpt_model` in it."""
    inside = Path(text, "ckpt_model")
    is_run = not Path(text, "config.json").exists() and (inside / "config.json").is_file()
    return str(inside) if is_run else text


def evaluated(run_dir: Path, version: str | None, weights: str | None) -> str | None:
    """The `--version` that an evaluation means: the run's own `ckpt_model`, unless weights over another are given."""
    own = run_dir / "ckpt_model"
    return str(own) if None in (version, weights) and (own / "config.json").is_file() else version


def weights_identity(version: str | Path, weights: str | Path | None = None) -> dict[str, str | None]:
    """What tells these weights from all others wherever they lie: `weights`, those that are loaded, and their `base`.

    A checkpoint of ours is known by the random `weights_id` of its save, one of the hub by its commit, any other by
    the names, sizes and sampled bytes of its files. `base` is None where `version` itself holds the weights.
    """
    if weights is not None:
        return weights_identity(weights) | {"base": weights_identity(version)["weights"]}
    identity = Self1EConfig.get_config_dict(version)[0].get("weights_id")
    if not Path(version).is_dir():
        identity = f"{version}@{Path(str(cached_file(version, 'config.json'))).parent.name}"
    if identity is None:
        digest = hashlib.sha256()
        for path in sorted(p for p in Path(version).iterdir() if p.suffix in {".json", ".safetensors", ".bin"}):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for start in range(0, size, max(4096, size // 64)):
                    file.seek(start)
                    digest.update(file.read(4096))
        identity = digest.hexdigest()[:32]
    return {"weights": identity, "base": None}


def code_hash() -> str:
    """16 hexadecimal digits that are others as soon as a module of `self1e/{model,data,evaluation}` is."""
    digest = hashlib.sha256()
    for path in sorted(path for room in DECIDING for path in (PACKAGE / room).rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make_settings(weights: Mapping[str, str | None] | None, **decoding: Any) -> dict[str, Any]:
    """What `settings.json` holds. Results are continued only by an evaluation with the same settings.

    weights: `weights_identity` of what is evaluated; None where it is not known.
    """
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    return {"weights": None, **(weights or {}), "code": code_hash(), **decoding, **versions}


def claim_folder(
    folder: Path, settings: Mapping[str, Any], *, overwrite: bool, results: str = "*.jsonl", remedy: str = REMEDY
) -> None:
    """Make `folder` hold `results` of `settings` only: others are a UserError, or deleted if `overwrite`."""
    path = folder / "settings.json"
    before, now = read_json(path, dict) if path.is_file() else {}, json.loads(json.dumps(settings))
    if before != now and any(path.stat().st_size for path in folder.glob(results)):
        if not overwrite:
            differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing)
            raise UserError(f"{folder} holds results of other settings: {changes}. {remedy}")
        made = "*.json*", "summary.md", "official/**/*", "*/overview.png", "*/*_iou*.jpg"
        for file in [path for pattern in made for path in folder.glob(pattern) if path.is_file()]:
            file.unlink()
    if before != now:
        write_json(path, now)


def file_stem(split: str) -> str:
    """The stem of a split's result files: `refcoco|unc|val` -> `refcoco_unc_val`.

    Of a kind in PREFIXES it ends with a hash, `custom_own_val_csv_1f6c2a`: `own/val.csv` and `own_val.csv` differ.
    """
    stem = re.sub(r"[|/\\:.]+", "_", split)
    if split in SPLITS:
        return stem
    return f"{stem[-80:]}_{hashlib.sha256(split.encode(errors='surrogateescape')).hexdigest()[:6]}"


def completeness(name: str, data: TrainingSet) -> str:
    """ "complete", what differs from the known total, "1,499 of 1,500 images", or "-" where none is known."""
    if name not in TOTALS:
        return "-"
    counts = {"images": len(np.unique(data.image_keys())), "questions": len(data), "conversations": len(data)}
    if "refs" in TOTALS[name] and isinstance(data, ExpressionSet):  # a sentence's suffix is its ref and its number
        suffixes = [each.suffix for index in range(len(data)) for each in data.expressions(index)]
        counts |= {"refs": len({suffix.rsplit("/", 1)[0] for suffix in suffixes}), "sentences": len(suffixes)}
    for what, total in TOTALS[name].items():
        if counts[what] != total:
            return f"{counts[what]:,} of {total:,} {what}"
    return "complete"


class Results:
    """The results of one split or benchmark, `<folder>/<stem>.jsonl`.

    asked: what is evaluated, the value of `key` in a record -> what else the record must say, such as the sentence.
    found: the records that need not be made again, by key; empty until `open`.
    """

    def __init__(self, folder: Path, stem: str, asked: Mapping[Any, Mapping[str, Any]], *, key: str = "id"):
        self.path, self.asked, self.key = folder / f"{stem}.jsonl", asked, key
        self.own = folder / f"{stem}.rank{distributed.rank()}.jsonl"
        self.found: dict[Any, dict] = {}

    def files(self) -> list[Path]:
        """Of this split or benchmark: its results, those of each process, and its figures."""
        return sorted(self.path.parent.glob(f"{escape(self.path.stem)}.*"))

    def read(self) -> dict[Any, dict]:
        """The records on the disk by their key. A last line that was torn when a run ended is left out.

        Raises UserError for records of other data.
        """
        found = {}
        for path in (path for path in self.files() if path.suffix == ".jsonl"):
            for record in read_records(path):
                asked = self.asked.get(record[self.key])
                if asked is None or not asked.items() <= record.items():
                    raise UserError(f"{path} holds results of other data than is evaluated now. {REMEDY}")
                found[record[self.key]] = record
        return found

    def _write(self, path: Path, records: Iterable[dict]) -> None:
        """Write a file that takes the place of all others of this split or benchmark."""
        write_text(path, to_jsonl(records))
        for other in self.files():
            if other != path:
                other.unlink()

    def open(self, *, overwrite: bool) -> None:
        """Take over what is on the disk, nothing with `overwrite`. For all ranks, before any appends."""

        def begin() -> dict[Any, dict]:
            found = {} if overwrite else self.read()
            if len(found) < len(self.asked):
                self._write(self.own, found.values())  # where the earlier ones end is a whole line
            return found

        self.found = distributed.on_main(begin)

    def append(self, new: Mapping[Any, Mapping[str, Any]]) -> None:
        """Write what this rank has found out, by key."""
        with open(self.own, "a", encoding="utf-8") as file:
            file.write(to_jsonl({self.key: key, **self.asked[key], **values} for key, values in new.items()))

    def finish(self) -> list[dict]:
        """Write the complete file, when all ranks have come here; its records, in the order of `asked`, on each."""

        def complete() -> list[dict]:
            found = self.read()
            records = [found[key] for key in self.asked]
            self._write(self.path, records)
            return records

        distributed.gather(None)
        return distributed.on_main(complete)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table whose columns also line up in a terminal; all but the first `text_columns` are flush right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    lines = (
        [cell.ljust(w) if i < text_columns else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        for row in cells
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
