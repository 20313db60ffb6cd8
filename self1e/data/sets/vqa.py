"""Instruction and question sets, text alone: llava_instruct_150k, vqav2, okvqa, textvqa, vizwiz, gqa."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from self1e.data.readers import read_instructions, read_questions, take
from self1e.data.samples import PhotoFolder, Sample, SampleError, TrainingSet
from self1e.data.tables import Writer, open_index
from self1e.model import prompts

SPEAKERS = {"human": 0, "gpt": 1}


class TextSet(TrainingSet):
    """Records of one index, each a conversation about a photo, without masks."""

    segmentation = False

    def open(self, source: Path, read: Callable[[Path, Writer], None], photos: PhotoFolder) -> None:
        """Take all records of `source`."""
        self.photos, self._index = photos, open_index(source, read)
        self._items = self._index.table("items")
        self.choose(len(self._items), source)

    @abstractmethod
    def entry(self, item: int) -> tuple[str, str, list[str]]:
        """(id, photo, turns) of a record; the turns are user, assistant, user, ... Raises SampleError."""

    def keys(self) -> np.ndarray:
        return self._index.array("image_keys")

    def contents(self) -> Iterator[bytes]:
        yield self._index.sha256.encode()

    def files(self, item: int) -> list[Path]:
        id, photo, _ = self.entry(item)
        return [self.photos.path(photo, id)]

    def read(self, item: int, rng: np.random.Generator) -> Sample:
        id, photo, turns = self.entry(item)
        image, _ = self.photos.load(photo, id)
        return Sample(id, image, [turns], [np.zeros((0, image.height, image.width), np.uint8)])


class LLaVAInstruct(TextSet):
    """Conversations of `llava_dataset/llava_instruct_150k.json` about `coco/train2017`; several turns, one row.

    Other files of the folder, such as the parts that this one was merged from, are not read.
    """

    name = "llava_instruct_150k"
    folder = "llava_dataset"
    redrawn = True

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, allow_outside: bool = False):
        source, photos = self.paths(dataset_dir, data_dir)
        self.open(source, read_instructions, PhotoFolder(photos, allow_outside))

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        root = Path(dataset_dir)
        return [root / "llava_dataset" / "llava_instruct_150k.json", root / "coco" / "train2017"]

    def counts(self) -> dict[str, int]:
        return super().counts() | {"conversations": len(self._items)}

    def entry(self, item: int) -> tuple[str, str, list[str]]:
        record, photo, turns = self._items[item]
        id = f"{self.name}/{record}"
        return id, photo, instruction_turns(turns, id)


def instruction_turns(turns: list[list[str]], id: str) -> list[str]:
    """[[speaker, text], ...] -> user, assistant, user, ...

    An opening assistant turn is dropped; `<image>` moves to the front of the first user turn. Raises SampleError when
    the speakers do not alternate.
    """
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns or any(SPEAKERS.get(speaker) != k % 2 for k, (speaker, _) in enumerate(turns)):
        raise SampleError(id, "its turns do not alternate between human and gpt")
    texts = [text.replace(prompts.IMAGE_TAG, "").strip() if prompts.IMAGE_TAG in text else text for _, text in turns]
    return [f"{prompts.IMAGE_TAG}\n{texts[0]}", *texts[1:]]


class QuestionSet(TextSet):
    """Questions with a short answer, one per line; a leading `data/` of an image path stands for `data_dir`."""

    cap = 100_000
    rated = False
    instruction = prompts.VQA_INSTRUCTION
    file: str

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, allow_outside: bool = False):
        self.open(Path(data_dir) / self.file, read_questions, PhotoFolder(Path(data_dir), allow_outside))

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """The questions and, if they are there, the folder that the first one's photo is in."""
        path = Path(data_dir) / cls.file
        try:
            with open(path, encoding="utf-8") as lines:
                image = take(json.loads(next(lines)), "image", str)
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError, StopIteration):
            return [path]  # missing or another schema: the index says so, with the line
        return [path, (Path(data_dir) / image.removeprefix("data/")).parent]

    @classmethod
    def mark(cls, dataset_dir: Path, data_dir: Path) -> Path:
        return Path(data_dir) / cls.file

    def counts(self) -> dict[str, int]:
        return {"questions": len(self._items)}

    def entry(self, item: int) -> tuple[str, str, list[str]]:
        image, question, answer = self._items[item]
        turns = [f"{prompts.IMAGE_TAG}\n{question}{self.instruction}"] + ([] if answer is None else [answer])
        return f"{self.name}/{item}", image.removeprefix("data/"), turns


class VQAv2(QuestionSet):
    name = "vqav2"
    file = "vqav2/vqav2_train.jsonl"


class OKVQA(QuestionSet):
    name = "okvqa"
    file = "okvqa/okvqa_train.jsonl"


class TextVQA(QuestionSet):
    name = "textvqa"
    file = "textvqa/textvqa_train.jsonl"


class VizWiz(QuestionSet):
    name = "vizwiz"
    file = "vizwiz/vizwiz_train.jsonl"
    instruction = prompts.VIZWIZ_INSTRUCTION


class GQA(QuestionSet):
    name = "gqa"
    file = "gqa/train_balanced.jsonl"
