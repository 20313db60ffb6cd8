"""Instruction and question sets, text alone: llava_instruct_150k, vqav2, okvqa, textvqa, vizwiz, gqa."""

import json
from pathlib import Path

import numpy as np

from self1e.data.index import open_index, read_instructions, read_questions
from self1e.data.sample import Sample, SampleError, TrainingSet, load_image
from self1e.model import prompts

SPEAKERS = {"human": 0, "gpt": 1}


def _text_sample(id: str, photo: Path, turns: list[str]) -> Sample:
    image = load_image(photo, id)
    return Sample(id, image, [turns], [np.zeros((0, image.height, image.width), np.uint8)])


class LLaVAInstruct(TrainingSet):
    """Conversations of `llava_dataset/*.json` about `coco/train2017`; several turns, one row."""

    name = "llava_instruct_150k"

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, seed: int):
        sources = sorted((Path(dataset_dir) / "llava_dataset").glob("*.json"))
        if not sources:
            raise FileNotFoundError(f"no *.json in {Path(dataset_dir) / 'llava_dataset'} ({self.name})")
        self.photos = Path(dataset_dir) / "coco" / "train2017"
        self._indexes = [open_index(source, read_instructions) for source in sources]
        self._tables = [index.table("items") for index in self._indexes]
        self._starts = np.cumsum([0, *map(len, self._tables)])
        self.choose(int(self._starts[-1]), seed)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        return [Path(dataset_dir) / "llava_dataset", Path(dataset_dir) / "coco" / "train2017"]

    def keys(self) -> np.ndarray:
        return np.concatenate([index.array("image_keys") for index in self._indexes])

    def read(self, item: int, rng: np.random.Generator) -> Sample:
        source = int(np.searchsorted(self._starts, item, side="right")) - 1
        record, image, turns = self._tables[source][int(item - self._starts[source])]
        id = f"{self.name}/{record}"
        return _text_sample(id, self.photos / image, instruction_turns(turns, id))


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


def _photo(data_dir: Path, image: str) -> Path:
    return Path(data_dir) / image.removeprefix("data/")


class QuestionSet(TrainingSet):
    """Questions with a short answer, one a line; a leading `data/` of an image path stands for `data_dir`."""

    cap = 100_000
    instruction = prompts.VQA_INSTRUCTION
    file: str

    def __init__(self, dataset_dir: Path, data_dir: Path, *, rows: int, seed: int):
        self.data_dir = Path(data_dir)
        self._index = open_index(self.paths(dataset_dir, data_dir)[0], read_questions)
        self._items = self._index.table("items")
        self.choose(len(self._items), seed)

    @classmethod
    def paths(cls, dataset_dir: Path, data_dir: Path) -> list[Path]:
        """The questions and, if they are there, the folder that the first one's photo is in."""
        path = Path(data_dir) / cls.file
        try:
            with open(path, encoding="utf-8") as lines:
                return [path, _photo(data_dir, json.loads(next(lines))["image"]).parent]
        except (FileNotFoundError, ValueError, KeyError, TypeError, StopIteration):
            return [path]  # missing or another schema: the index says so, with the line

    def keys(self) -> np.ndarray:
        return self._index.array("image_keys")

    def read(self, item: int, rng: np.random.Generator) -> Sample:
        image, question, answer = self._items[item]
        turns = [f"{prompts.IMAGE_TAG}\n{question}{self.instruction}"] + ([] if answer is None else [answer])
        return _text_sample(f"{self.name}/{item}", _photo(self.data_dir, image), turns)


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
