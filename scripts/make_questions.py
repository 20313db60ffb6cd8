"""Make question files (JSON lines) from the official files of VQAv2, OK-VQA, TextVQA, VizWiz and GQA.

Needed only where the files that Qwen-VL and InternVL share cannot be downloaded (scripts/get_data.sh fetches those).

Command: python scripts/make_questions.py vqa questions.json annotations.json \
             --image "data/vqav2/train2014/COCO_train2014_{:012d}.jpg" > data/vqav2/vqav2_train.jsonl
         python scripts/make_questions.py textvqa TextVQA_0.5.1_train.json --image "data/textvqa/train_images/{}.jpg"
         python scripts/make_questions.py textvqa_annotations TextVQA_0.5.1_val.json > textvqa_val_annotations.json
         python scripts/make_questions.py vizwiz train.json --image "data/vizwiz/train/{}"
         python scripts/make_questions.py gqa train_balanced_questions.json --image "data/gqa/images/{}.jpg"
Cost:    seconds.
Result:  a line per question: {"image": ..., "question": ..., "question_id": ..., "answer": ...}. The answer is the one
         that most annotators gave, the first of several; the shared files may have chosen another of these.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator


def most_common(answers: Iterable[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


def vqa(image: str, questions: dict, annotations: dict) -> Iterator[tuple]:
    """VQAv2's and OK-VQA's pair of files."""
    answers = {
        entry["question_id"]: entry.get("multiple_choice_answer") or most_common(x["answer"] for x in entry["answers"])
        for entry in annotations["annotations"]
    }
    for q in questions["questions"]:
        yield image.format(q["image_id"]), q["question"], q["question_id"], answers[q["question_id"]]


def textvqa(image: str, source: dict) -> Iterator[tuple]:
    for q in source["data"]:
        yield image.format(q["image_id"]), q["question"], q["question_id"], most_common(q["answers"])


def vizwiz(image: str, source: list) -> Iterator[tuple]:
    """A question's id is its position in the file."""
    for number, q in enumerate(source):
        yield image.format(q["image"]), q["question"], number, most_common(x["answer"] for x in q["answers"])


def gqa(image: str, source: dict) -> Iterator[tuple]:
    for id, q in source.items():
        yield image.format(q["imageId"]), q["question"], id, q["answer"]


def textvqa_annotations(source: dict) -> dict:
    """TextVQA's ten answers per question in VQAv2's form, by which the benchmark scores."""
    entries = []
    for q in source["data"]:
        answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(q["answers"], 1)]
        entries.append({"image_id": q["image_id"], "question_id": q["question_id"], "answers": answers})
    return {"annotations": entries}


SETS = {"vqa": vqa, "textvqa": textvqa, "vizwiz": vizwiz, "gqa": gqa}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS, "textvqa_annotations"])
    parser.add_argument("files", nargs="+", type=argparse.FileType(encoding="utf-8"), help="the official JSON files")
    parser.add_argument("--image", default="{}", help="path of a photo, with {} for its id")
    args = parser.parse_args()
    contents = [json.load(file) for file in args.files]
    if args.set == "textvqa_annotations":
        json.dump(textvqa_annotations(*contents), sys.stdout)
    else:
        for values in SETS[args.set](args.image, *contents):
            record = dict(zip(("image", "question", "question_id", "answer"), values, strict=True))
            print(json.dumps(record, ensure_ascii=False))
