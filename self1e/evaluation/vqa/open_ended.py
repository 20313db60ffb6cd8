"""VQAv2, OK-VQA, TextVQA and VizWiz: open questions whose replies are compared with ten annotators' answers.

Two programs score them, and both figures are given: InternVL's eval script and the VQA challenge's `vqaEval.py`. They
normalise answers differently; VizWiz's `unanswerable` is an answer like any other.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd

from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer, Scores, VQABenchmark, jsonl_questions, mean, require
from self1e.files import read_json, write_json
from self1e.model.prompts import VIZWIZ_INSTRUCTION, VQA_INSTRUCTION

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_RESTORED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
""".split()
# The challenge's table of apostrophes: each of these words is restored when exactly one of its apostrophes is missing;
# one entry of the table goes the wrong way.
_APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in _RESTORED for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def _strip_marks(text: str) -> str:
    comma_in_number = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _MARKS:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or comma_in_number else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)  # both programs pass a flag of value 32 as the count


def _plain_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(1 << 16)  # annotators repeat each other
def normalise_answer(text: str) -> str:
    """An answer as InternVL's eval script compares it: case, punctuation, articles, number words, apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _plain_words(_strip_marks(_one_line(text)))


@lru_cache(1 << 16)
def normalise_answer_official(text: str) -> str:
    """An answer as the VQA challenge's evaluator compares it (when the ten references are not all the same string)."""
    return _plain_words(_strip_marks(_one_line(text)))


def _agreement(answer: str, references: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the other nine / 3)."""
    matches = [answer == reference for reference in references]
    credits = [min(1.0, (sum(matches) - match) / 3) for match in matches]
    return sum(credits) / len(credits)


def vqa_score(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of one question, 0..1, as InternVL's eval script computes it, from the annotators' ten answers."""
    return _agreement(normalise_answer(answer), [normalise_answer(reference) for reference in references])


def vqa_score_official(answer: str, references: Sequence[str]) -> float:
    """As `vqa_score`, as the VQA challenge's evaluator computes it.

    Quirk: when all references are the same string nothing is normalised, so `YES` against ten `yes` scores 0.
    """
    answer, references = _one_line(answer), [_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalise_answer_official(answer)
        references = [normalise_answer_official(reference) for reference in references]
    return _agreement(answer, references)


def vqa_accuracy(replies: Sequence[str], annotated: Sequence[Mapping]) -> dict:
    """Both scorers over one benchmark; annotated: the entry of each question in the annotation file.

    A percent is rounded to two digits as the official evaluator does.
    """
    references = [[each["answer"] for each in entry["answers"]] for entry in annotated]
    official = [vqa_score_official(reply, ten) for reply, ten in zip(replies, references)]

    def percent_by(kind: str) -> dict[str, float]:
        table = pd.Series(official).groupby([entry.get(kind, "none") for entry in annotated], sort=False)
        return {str(name): round(100 * sum(scores) / len(scores), 2) for name, scores in table}

    return {
        "n": len(replies),
        "eval_script_accuracy": mean(vqa_score(reply, ten) for reply, ten in zip(replies, references)),
        "vqa_official_overall_percent": round(100 * mean(official), 2),
        "vqa_official_per_answer_type_percent": percent_by("answer_type"),
        "vqa_official_per_question_type_percent": percent_by("question_type"),
    }


def score(answers: list[Answer], data_dir: Path, *, annotations: str) -> Scores:
    """Agreement with the ten annotators whose answers are in the annotation file."""
    path = data_dir / annotations
    annotated = read_json(path, dict).get("annotations", [])
    require(path, annotated, "question_id", "answers")
    by_id = {entry["question_id"]: entry for entry in annotated}
    missing = [answer.question.id for answer in answers if answer.question.id not in by_id]
    if missing:
        raise UserError(f"{path} has no annotation for {len(missing)} questions, the first is {missing[0]!r}")
    details = vqa_accuracy([answer.reply for answer in answers], [by_id[answer.question.id] for answer in answers])
    summary = {
        "accuracy (InternVL eval script)": 100 * details["eval_script_accuracy"],
        "accuracy (VQA official)": details["vqa_official_overall_percent"],
    }
    return Scores(summary, details)


def export(answers: list[Answer], folder: Path, *, key: str) -> None:
    rows = [{"question": q.prompt, "question_id": q.id, "answer": reply} for q, reply in answers]
    write_json(folder / f"{key}.json", rows)


def _benchmark(key: str, annotations: str, instruction: str = VQA_INSTRUCTION) -> VQABenchmark:
    """A benchmark with ten reference answers; `key` is InternVL's name, e.g. `vqav2_val`."""
    folder = key.split("_")[0]
    return VQABenchmark(
        questions=partial(jsonl_questions, file=f"{folder}/{key}.jsonl", instruction=instruction),
        max_new_tokens=10,
        metric=partial(score, annotations=f"{folder}/{annotations}"),
        export=partial(export, key=key),
    )


BENCHMARKS = {
    "vqa-vqav2-val": _benchmark("vqav2_val", "v2_mscoco_val2014_annotations.json"),
    "vqa-textvqa-val": _benchmark("textvqa_val", "textvqa_val_annotations.json"),
    "vqa-vizwiz-val": _benchmark("vizwiz_val", "vizwiz_val_annotations.json", VIZWIZ_INSTRUCTION),
    "vqa-okvqa-val": _benchmark("okvqa_val", "mscoco_val2014_annotations.json"),
}
