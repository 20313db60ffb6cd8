"""Instruction and question sets, text alone: llava_instruct_150k, vqav2, okvqa, textvqa, vizwiz, gqa."""

import json
from abc import abstractmethod
from pathlib import Path

import numpy as np

from self1e.data.readers import read_instructions, read_questions
from self1e.data.samples import PhotoFolder, Sample, SampleError, TrainingSet
from self1e.data.tables import Tables, open_tables
from self1e.model import prompts

SPEAKERS = {"human": 0, "gpt": 1}


class TextSet(TrainingSet):
    """Records of a file, each a conversation about a photo, without masks."""

    segmentation = False

    def __init__(self, tables: Tables, photos: PhotoFolder):
        self.tables, self.records, self.photos = tables, tables.records("items"), photos

    @abstractmethod
    def entry(self, index: int) -> tuple[str, str, list[str]]:
        """(id, photo, turns) of a record; the turns are user, assistant, user, ... Raises SampleError."""

    def __len__(self) -> int:
        return len(self.records)

    def image_keys(self) -> np.ndarray:
        return self.tables.array("image_keys")

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        id, photo, turns = self.entry(index)
        image, _ = self.photos.load(photo, id)
        return Sample(id, image, [turns], [np.zeros((0, image.height, image.width), np.uint8)])


class LLaVAInstruct(TextSet):
    """Conversations of `llava_dataset/llava_instruct_150k.json` about `coco/train2017`, each of several turns.

    Other files of the folder, such as the parts that this one was merged from, are not read.
    """

    name = "llava_instruct_150k"
    redrawn = True

    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, allow_outside: bool = False):
        source, photos = self.paths(dataset_dir, data_dir)
        super().__init__(open_tables(source, read_instructions), PhotoFolder(photos, allow_outside))

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        root = Path(dataset_dir)
        return [root / "llava_dataset" / "llava_instruct_150k.json", root / "coco" / "train2017"]

    def entry(self, index: int) -> tuple[str, str, list[str]]:
        record, photo, turns = self.records[index]
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
    instruction = prompts.VQA_INSTRUCTION
    file: str

    def __init__(self, dataset_dir: Path, data_dir: Path, *, conversations: int, allow_outside: bool = False):
        folder = Path(data_dir)
        super().__init__(open_tables(folder / self.file, read_questions), PhotoFolder(folder, allow_outside))

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """The questions and, if they are there, the folder that the first one's photo is in."""
        path = Path(data_dir) / cls.file
        try:
            with open(path, encoding="utf-8-sig") as lines:
                image = json.loads(lines.readline())["image"]
                return [path, (Path(data_dir) / image.removeprefix("data/")).parent]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [path]  # missing or another schema: the reader says so, with the line

    def entry(self, index: int) -> tuple[str, str, list[str]]:
        image, question, answer = self.records[index]
        turns = [f"{prompts.IMAGE_TAG}\n{question}{self.instruction}"] + ([] if answer is None else [answer])
        return f"{self.name}/{index}", image.removeprefix("data/"), turns


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
