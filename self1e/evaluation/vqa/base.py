"""What every VQA benchmark is made of, and the reading of its files.

A benchmark is one `VQABenchmark`: where its questions lie, how they are put, how long a reply may be, how it scores.
`run` lists them. Files, prompts and lengths are those of InternVL's evaluation (its `data/` layout).
Scores are those of the official programs, so that figures can be compared with published ones; only their crashes
(empty MMBench replies, zero denominators) are not matched. Fractions are 0..1; `_percent` in a name means 0..100.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from self1e.data.samples import naming
from self1e.errors import UserError
from self1e.files import check_fetched
from self1e.model.photos import photo_of


@dataclass(frozen=True)
class Question:
    """One question. `prompt`: the user's text behind the image; `record`: the benchmark's entry, for its metric."""

    id: int | str
    image: Path | bytes  # a file, or the bytes of one
    prompt: str
    record: dict

    def open_image(self) -> Image.Image:
        """The photo, RGB. Raises UserError naming the question when it cannot be decoded."""
        with naming(f"question {self.id}"):
            return photo_of(self.image if isinstance(self.image, Path) else io.BytesIO(self.image))


class Answer(NamedTuple):
    question: Question
    reply: str


@dataclass(frozen=True)
class Scores:
    summary: dict[str, float]  # lines of the table, the headline first, percent unless the name says otherwise
    details: dict  # everything, in the official programs' names and units


@dataclass(frozen=True, kw_only=True)
class VQABenchmark:
    """One benchmark; all functions raise UserError naming the file at fault."""

    questions: Callable[[Path], list[Question]]  # of a data folder, in file order
    max_new_tokens: int  # of a reply
    metric: Callable[[list[Answer], Path], Scores] | None  # (answers, data folder); None: only a server can score
    export: Callable[[list[Answer], Path], None]  # (answers, folder) writes the official program's files


def require(path: Path, records: Iterable[Any], *fields: str) -> None:
    """Raise UserError for one of the records of a file that is no object with all `fields`."""
    for number, record in enumerate(records, 1):
        if missing := [name for name in fields if not isinstance(record, dict) or name not in record]:
            raise UserError(f"{path}: record {number} has no {', '.join(missing)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    check_fetched(path)
    return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]


def read_jsonl(path: Path, *fields: str) -> list[dict]:
    """Records of a file with one JSON object per line; each must have all `fields`."""
    try:
        records = [json.loads(line) for line in read_lines(path)]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON ({error})") from error
    require(path, records, *fields)
    if not records:
        raise UserError(f"{path} holds no record")
    return records


def jsonl_questions(data_dir: Path, *, file: str, instruction: str) -> list[Question]:
    """Lines with `image`, where a leading `data/` stands for the data folder, `question` and `question_id`."""
    questions = []
    for record in read_jsonl(data_dir / file, "image", "question", "question_id"):
        name = record["image"]
        image = data_dir / name.removeprefix("data/") if name.startswith("data/") else Path(name)
        questions.append(Question(record["question_id"], image, f"{record['question']}{instruction}", record))
    return questions


def mean(values: Iterable[float]) -> float:
    """Sum over count; 0 for none."""
    return ratio(sum(values := list(values)), len(values))


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where the whole is 0 (the official programs stop with ZeroDivisionError there)."""
    return part / whole if whole else 0.0
