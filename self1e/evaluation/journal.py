"""Records of an evaluation on disk: written as they are made, by any number of processes, and taken up again.

While an evaluation runs, each rank appends to `<stem>.rank<r>.jsonl`; when it is complete, `<stem>.jsonl` holds all
records in their order and the ranks' files go. What an interrupted run left is read from both.
"""

import json
from collections.abc import Iterable, Iterator
from glob import escape
from pathlib import Path

from self1e import distributed
from self1e.files import to_jsonl, write_text


class Journal:
    """The records of one split or benchmark; `path` is where they lie when all are there."""

    def __init__(self, path: Path):
        self.path = path

    def _rank_path(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.rank{rank}.jsonl")

    def _rank_paths(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{escape(self.path.stem)}.rank*.jsonl"))

    def read(self) -> Iterator[tuple[str, dict]]:
        """Every record with the place where it stands, for messages.

        The last line of a file may be torn: the run was stopped while it wrote. Raises ValueError for any other line
        that is no JSON object.
        """
        for path in [self.path, *self._rank_paths()]:
            lines = path.read_bytes().split(b"\n") if path.is_file() else []
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("no object")
                except ValueError as error:
                    if number == len(lines):  # no newline behind it
                        continue
                    raise ValueError(
                        f"{path}, line {number} is not a record ({error}); delete the file, or evaluate anew with "
                        "--overwrite_eval"
                    ) from error
                yield f"{path}, line {number}", record

    def start(self, records: Iterable[dict]) -> None:
        """Join what is kept of an earlier run into one unfinished file. For one process, before any appends."""
        records = list(records)
        if records:
            write_text(self._rank_path(0), to_jsonl(records))
        for path in [self.path, *self._rank_paths()]:
            if not records or path != self._rank_path(0):
                path.unlink(missing_ok=True)

    def append(self, records: Iterable[dict]) -> None:
        """Add records of this rank."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._rank_path(distributed.rank()), "a", encoding="utf-8") as file:
            file.write(to_jsonl(records))

    def finish(self, records: Iterable[dict]) -> None:
        """Write the complete file and drop the unfinished ones. For one process, after all have appended."""
        write_text(self.path, to_jsonl(records))
        for path in self._rank_paths():
            path.unlink()
