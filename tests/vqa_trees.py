"""Tiny VQA benchmarks in the real formats, for the tests of self1e/evaluation/vqa; photos are noise."""

import base64
import io
import json
from pathlib import Path

import pandas as pd
import torch
from helpers import GOLDEN, noise, read_json
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.cli import main as self1e
from self1e.evaluation.vqa import mme, pope

ASK = "Answer the question using a single word or phrase."
PHOTO_SIZES = [(40, 30), (90, 30), (30, 60)]
EXACT = 1e-9  # sums of tenths in float64


def photo(seed: int) -> Image.Image:
    return noise(*PHOTO_SIZES[seed % len(PHOTO_SIZES)], seed)


def save_photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed).save(path)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_vqav2(data: Path, n: int = 5) -> None:
    """Questions of different lengths about three photos, and ten answers each."""
    rows = [
        {"image": f"data/vqav2/val2014/{i % 3}.jpg", "question": f"What is {'yet ' * i}this?", "question_id": 70 + i}
        for i in range(n)
    ]
    write_lines(data / "vqav2" / "vqav2_val.jsonl", rows)
    for i in range(3):
        save_photo(data / "vqav2" / "val2014" / f"{i}.jpg", i)
    entries = [
        {"question_id": row["question_id"], "answer_type": "other", "question_type": "what is",
         "answers": [{"answer": "cat"}] * 9 + [{"answer": "dog"}]}
        for row in rows
    ]  # fmt: skip
    (data / "vqav2" / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": entries}))


def write_pope(data: Path) -> None:
    questions = []
    for category in pope.CATEGORIES:
        labels = []
        for i, label in enumerate(("yes", "no")):
            text = f"Is there thing {i} in the image?"
            labels.append({"question_id": i + 1, "image": f"{i}.jpg", "text": text, "label": label})
            questions.append(
                {"question_id": len(questions), "image": f"{i}.jpg", "text": f"{text}\n{ASK}", "category": category}
            )
            save_photo(data / "pope" / "val2014" / f"{i}.jpg", i)
        write_lines(data / "pope" / "coco" / f"coco_pope_{category}.json", labels)
    write_lines(data / "pope" / "llava_pope_test.jsonl", questions)


def write_mme_release(data: Path) -> None:
    """As the release has it: a text file a photo, some tables sorted into subfolders."""
    for i, table in enumerate(t for tables in mme.TABLES.values() for t in tables):
        folder = data / "mme" / "MME_Benchmark_release_version" / table
        sorted_away = i % 2 == 0
        save_photo(folder / ("images" if sorted_away else "") / "p.jpg", i)
        text = folder / ("questions_answers_YN" if sorted_away else "") / "p.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n")
        text.with_name("._p.txt").write_bytes(b"\0\5\x16\7\xff")  # as a Mac leaves it beside


def write_mmbench(data: Path, key: str = "mmbench_dev_20230712") -> None:
    buffer = io.BytesIO()
    photo(0).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    row = {"question": "Which?", "hint": None, "category": "ocr", "image": image, "source": "s",
           "l2-category": "coarse_perception", "comment": None, "split": "dev"}  # fmt: skip
    rows = [row | {"index": 1, "A": "up", "B": "down", "C": "None", "answer": "A", "hint": "Look."}]
    rows.append(row | {"index": 1000001, "A": "down", "B": "up", "C": "None", "answer": "B"})
    (data / "mmbench").mkdir(parents=True)
    pd.DataFrame(rows).to_csv(data / "mmbench" / f"{key}.tsv", sep="\t", index=False)


def write_gqa(data: Path) -> None:
    row = {"image": "data/gqa/images/n1.jpg", "answer": "yes"}
    rows = [row | {"question": f"Is it {i}?", "question_id": f"20{i}"} for i in (1, 2)]
    write_lines(data / "gqa" / "llava_gqa_testdev_balanced_qwen_format.jsonl", rows)
    save_photo(data / "gqa" / "images" / "n1.jpg", 1)
    questions = {
        "201": {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}},
        "202": {"answer": "red", "isBalanced": True, "types": {"structural": "query"}},
    }
    (data / "gqa" / "testdev_balanced_all_questions.json").write_text(json.dumps(questions))


def golden(name: str) -> dict:
    return read_json(GOLDEN / "vqa_metrics" / f"{name}.json")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(tmp_path: Path, version: Path | str | None, *flags: str, datasets: str = "vqa-vqav2-val") -> int:
    """The exit code of an evaluation of the run `e`, on a CPU and by one process."""
    return self1e([
        "eval", "vqa", "--log_base_dir", str(tmp_path / "runs"), "--exp_name", "e", "--device", "cpu",
        *(["--version", str(version)] if version else []),
        "--data_dir", str(tmp_path / "data"), "--datasets", datasets, "--workers", "0", *flags,
    ])  # fmt: skip


def results(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "e" / "eval_vqa"


def load_model(version: Path):
    model = Self1EForSegmentation.from_pretrained(str(version), dtype=torch.float32).eval()
    return model, Self1EProcessor.from_pretrained(str(version))
