"""Instruction and question sets, text alone: llava_instruct_150k, vqav2, okvqa, textvqa, vizwiz, gqa."""

import json
from abc import abstractmethod
from pathlib import Path

import numpy as np

from self1e.data.paths import inside
from self1e.data.readers import read_instructions, read_questions
from self1e.data.samples import Sample, TrainingSet
from self1e.data.tables import Tables, open_tables
from self1e.errors import UserError
from self1e.model import prompts
from self1e.model.photos import read_picture

SPEAKERS = {"human": 0, "gpt": 1}
QUESTIONS = {  # question set -> its file
    "vqav2": "vqav2/vqav2_train.jsonl",
    "okvqa": "okvqa/okvqa_train.jsonl",
    "textvqa": "textvqa/textvqa_train.jsonl",
    "vizwiz": "vizwiz/vizwiz_train.jsonl",
    "gqa": "gqa/train_balanced.jsonl",
}


class TextSet(TrainingSet):
    """Records of a file, each a conversation about a photo below `photos`, without masks."""

    segmentation = False
    tables: Tables
    photos: Path

    @abstractmethod
    def entry(self, index: int) -> tuple[str, list[str]]:
        """Photo and turns of a record; the turns are user, assistant, user, ... Raises UserError."""

    def __len__(self) -> int:
        return len(self.tables.records("items"))

    def image_keys(self) -> np.ndarray:
        return self.tables.array("image_keys")

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        photo, turns = self.entry(index)
        image, _ = read_picture(inside(self.photos, photo, allow_outside=self.allow_outside))
        return Sample(self.id(index), image, [turns], [np.zeros((0, image.height, image.width), np.uint8)])


class LLaVAInstruct(TextSet):
    """Conversations of `llava_dataset/llava_instruct_150k.json` about `coco/train2017`, each of several turns.

    Other files of the folder, such as the parts that this one was merged from, are not read.
    """

    redrawn = True

    @staticmethod
    def paths(name: str, dataset_dir: Path, data_dir: Path) -> list[Path]:
        return [dataset_dir / "llava_dataset" / "llava_instruct_150k.json", dataset_dir / "coco" / "train2017"]

    def open(self, source: Path, photos: Path) -> None:
        self.tables, self.photos = open_tables(source, read_instructions), photos
        self.records = self.tables.records("items")

    def id(self, index: int) -> str:
        return f"{self.name}/{self.records[index][0]}"

    def entry(self, index: int) -> tuple[str, list[str]]:
        _, photo, turns = self.records[index]
        return photo, instruction_turns(turns)


def instruction_turns(turns: list[list[str]]) -> list[str]:
    """[[speaker, text], ...] -> user, assistant, user, ...

    An opening assistant turn is dropped; `<image>` moves to the front of the first user turn. Raises UserError when
    the speakers do not alternate.
    """
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns or any(SPEAKERS.get(speaker) != k % 2 for k, (speaker, _) in enumerate(turns)):
        raise UserError("its turns do not alternate between human and gpt")
    texts = [text.replace(prompts.IMAGE_TAG, "").strip() if prompts.IMAGE_TAG in text else text for _, text in turns]
    return [f"{prompts.IMAGE_TAG}\n{texts[0]}", *texts[1:]]


class QuestionSet(TextSet):
    """Questions with a short answer, one per line; a leading `data/` of an image path stands for `data_dir`."""

    cap = 100_000
    rated = False

    @staticmethod
    def paths(name: str, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """The questions and, if they are there, the folder that the first one's photo is in."""
        path = data_dir / QUESTIONS[name]
        try:
            with open(path, encoding="utf-8-sig") as lines:
                image = json.loads(lines.readline())["image"]
                return [path, (data_dir / image.removeprefix("data/")).parent]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [path]  # missing or another schema: the reader says so, with the line

    def open(self, source: Path, *_: Path) -> None:
        self.tables, self.photos = open_tables(source, read_questions), source.parents[1]
        self.records = self.tables.records("items")
        self.instruction = prompts.VIZWIZ_INSTRUCTION if self.name == "vizwiz" else prompts.VQA_INSTRUCTION

    def entry(self, index: int) -> tuple[str, list[str]]:
        image, question, answer = self.records[index]
        turns = [f"{prompts.IMAGE_TAG}\n{question}{self.instruction}"] + ([] if answer is None else [answer])
        return image.removeprefix("data/"), turns
