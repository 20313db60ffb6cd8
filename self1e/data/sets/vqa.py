"""Instruction and question sets, text alone: llava_instruct_150k, vqav2, okvqa, textvqa, vizwiz, gqa."""

import reprlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from self1e.data.readers import Records, fields, json_lines, open_tables, stream_json
from self1e.data.samples import DATASETS, Sample, TrainingSet
from self1e.errors import UserError
from self1e.model import prompts
from self1e.model.photos import photo_of

QUESTIONS = {  # question set -> its file
    **{name: f"{name}/{name}_train.jsonl" for name in ("vqav2", "okvqa", "textvqa", "vizwiz")},
    "gqa": "gqa/train_balanced.jsonl",
}


def read_instructions(path: Path) -> Records:
    """LLaVA conversations: table `items` [image, [[from, value], ...]]."""
    for location, value in stream_json(path):
        image, turns = fields(value, location, image=str, conversations=list)
        yield "items", [image, [fields(turn, location, **{"from": str, "value": str}) for turn in turns]]


def read_questions(path: Path) -> Records:
    """Question lines (.jsonl): table `items` [image, question, answer or null]."""
    for location, value in json_lines(path):
        image, question = fields(value, location, image=str, question=str)
        if isinstance(answer := value.get("answer"), (list, dict)):
            raise UserError(f"{location}: answer is {reprlib.repr(answer)}")
        yield "items", [image, question, None if answer is None else str(answer)]


class TextSet(TrainingSet):
    """Records of a file, each a conversation about a photo, without masks; a photo may have several."""

    segmentation = False
    records: Sequence[Any]  # the photo's name, and what is said about it

    @abstractmethod
    def turns(self, index: int) -> list[str]:
        """User, assistant, user, ... Raises UserError."""

    def __len__(self) -> int:
        return len(self.records)

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def file_name(self, index: int) -> str:
        return self.records[index][0].removeprefix("data/")

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        turns = self.turns(index)
        image = photo_of(self.photo(index))
        return Sample(self.id(index), image, [turns], [np.zeros((0, image.height, image.width), np.uint8)])


class LLaVAInstruct(TextSet):
    """Conversations of several turns. Other files of the folder, of which this one was merged, are not read."""

    files = "llava_dataset/llava_instruct_150k.json", "coco/train2017"
    redrawn = True

    def open(self, source: Path, photos: Path) -> None:
        self.records, self.folder = open_tables(source, read_instructions)["items"], photos

    def turns(self, index: int) -> list[str]:
        """An opening assistant turn is dropped; `<image>` moves to the front of the first user turn."""
        turns = self.records[index][1]
        if turns and turns[0][0] == "gpt":
            turns = turns[1:]
        if not turns or any(speaker != ("human", "gpt")[k % 2] for k, (speaker, _) in enumerate(turns)):
            raise UserError("its turns do not alternate between human and gpt")
        texts = [t.replace(prompts.IMAGE_TAG, "").strip() if prompts.IMAGE_TAG in t else t for _, t in turns]
        return [f"{prompts.IMAGE_TAG}\n{texts[0]}", *texts[1:]]


class QuestionSet(TextSet):
    """Questions with a short answer, one per line; a leading `data/` of an image path stands for `data_dir`."""

    cap = 100_000
    rated = False

    def paths(self) -> list[Path]:
        return [self.data_dir / QUESTIONS[self.name]]

    def open(self, source: Path) -> None:
        self.records, self.folder = open_tables(source, read_questions)["items"], source.parents[1]
        if self.records and not (photos := (self.folder / self.file_name(0)).parent).exists():
            raise UserError(f"{self.name}: its photos are missing: {photos} ({DATASETS})")

    def turns(self, index: int) -> list[str]:
        _, question, answer = self.records[index]
        instruction = prompts.VIZWIZ_INSTRUCTION if self.name == "vizwiz" else prompts.VQA_INSTRUCTION
        return [f"{prompts.IMAGE_TAG}\n{question}{instruction}"] + ([] if answer is None else [answer])
