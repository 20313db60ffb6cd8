"""Files of the data tree that are made from others: question files as JSON lines, and PASCAL-Part's annotations.

The question files in use (Qwen-VL's and InternVL's) name one answer per question. Made from the official files, the
answer is the one that most annotators gave, the first of several; the files in use may have chosen another one.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from self1e import files
from self1e.apps.unpack import is_archive, open_archive


def read_json(path: Path, member: str | None = None) -> Any:
    """A JSON file, or the one in an archive: the only one, or the one named `member`. Raises ValueError."""
    try:
        if not is_archive(path.name):
            return json.loads(path.read_text(encoding="utf-8"))
        with open_archive(path) as members:
            found = [each for each in members if each.name.endswith(member or ".json") and not each.is_noise]
            if len(found) != 1:
                names = ", ".join(each.name for each in members[:5])
                raise ValueError(f"expected one {member or 'JSON file'} among its members ({names} ...)")
            with found[0].open() as file:
                return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def common_answer(answers: Iterable[dict]) -> str:
    """The answer that most annotators gave, the first of several."""
    return Counter(answer["answer"] for answer in answers).most_common(1)[0][0]


def vqa(questions: Path, annotations: Path, *, image: str) -> list[dict]:
    """VQAv2's and OK-VQA's pair of files."""
    answers = {
        entry["question_id"]: entry.get("multiple_choice_answer") or common_answer(entry["answers"])
        for entry in read_json(annotations)["annotations"]
    }
    return [
        line(image.format(q["image_id"]), q["question"], q["question_id"], answers[q["question_id"]])
        for q in read_json(questions)["questions"]
    ]


def textvqa(source: Path, *, image: str) -> list[dict]:
    """TextVQA_0.5.1_*.json, whose answers are bare strings."""
    return [
        line(image.format(q["image_id"]), q["question"], q["question_id"], Counter(q["answers"]).most_common(1)[0][0])
        for q in read_json(source)["data"]
    ]


def textvqa_annotations(source: Path) -> dict:
    """The ten answers per question, in VQAv2's form, which the benchmark scores with."""
    entries = [
        {
            "image_id": q["image_id"],
            "question_id": q["question_id"],
            "answers": [{"answer": answer, "answer_id": k} for k, answer in enumerate(q["answers"], 1)],
        }
        for q in read_json(source)["data"]
    ]
    return {"annotations": entries}


def vizwiz(source: Path, *, image: str) -> list[dict]:
    """The `train.json` in VizWiz's Annotations.zip; a question's id is its place in that file."""
    return [
        line(image.format(q["image"]), q["question"], number, common_answer(q["answers"]))
        for number, q in enumerate(read_json(source, "train.json"))
    ]


def gqa(source: Path, *, image: str, member: str) -> list[dict]:
    """One of GQA's question files, an object with the question's id for a key."""
    return [
        line(image.format(q["imageId"]), q["question"], id, q["answer"]) for id, q in read_json(source, member).items()
    ]


def line(image: str, question: str, question_id: int | str, answer: str) -> dict:
    return {"image": image, "question": question, "question_id": question_id, "answer": answer}


CONVERTERS: dict[str, Callable] = {
    "vqa": vqa, "textvqa": textvqa, "textvqa_annotations": textvqa_annotations, "vizwiz": vizwiz, "gqa": gqa,
}  # fmt: skip


def make(name: str, inputs: list[Path], output: Path, options: dict[str, str]) -> None:
    """Write `output` from `inputs` by one of CONVERTERS, or "pascal_part". ValueError names a faulty file."""
    if name == "pascal_part":
        from self1e.apps import pascal_part  # numpy and pycocotools, which nothing else here needs

        archive, image_list = inputs
        return pascal_part.convert(archive, image_list, output)
    try:
        content = CONVERTERS[name](*inputs, **options)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{inputs[0]} is not the file that was expected ({type(error).__name__}: {error})") from error
    if isinstance(content, dict):
        files.write_json(output, content, indent=None)
    else:
        files.write_text(output, files.to_jsonl(content))
