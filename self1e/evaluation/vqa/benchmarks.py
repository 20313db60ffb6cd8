"""The VQA benchmarks of `eval_vqas.sh`: where questions lie, how they are put, how long a reply may be, how it scores.

A benchmark is one entry of `VQA_BENCHMARKS` plus at most one metric function. Files, prompts and lengths are those of
InternVL's evaluation (its `data/` layout); numbers come from `vqa_metrics`.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image

from self1e.data.sample import load_image
from self1e.evaluation.vqa import metrics

SHORT = "Answer the question using a single word or phrase."
SHORT_OR_UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'. {SHORT}"


@dataclass(frozen=True)
class Question:
    """One question. `prompt`: the user's text behind the image; `record`: the benchmark's own row, for its metric."""

    id: int | str
    image: Path | bytes  # a file, or the bytes of one
    prompt: str
    record: dict

    def open_image(self) -> Image.Image:
        """The photo, RGB. Raises SampleError naming the question when it cannot be decoded."""
        return load_image(
            self.image if isinstance(self.image, Path) else io.BytesIO(self.image), f"question {self.id}"
        )


class Answer(NamedTuple):
    question: Question
    reply: str


@dataclass(frozen=True)
class Scores:
    """`summary`: rows of the table, percent unless the name says otherwise; `details`: everything, in the official
    programs' names and units; `notes`: what a reader of the figures must know."""

    summary: dict[str, float]
    details: dict
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark; all functions raise ValueError or FileNotFoundError naming the file at fault.

    questions: data folder -> questions in file order.
    max_new_tokens: limit of a reply.
    metric: (answers in file order, data folder) -> scores; None where only a server can score.
    export: (answers, folder, model name) writes what the official programs would have written there.
    """

    questions: Callable[[Path], list[Question]]
    max_new_tokens: int
    metric: Callable[[list[Answer], Path], Scores] | None
    export: Callable[[list[Answer], Path, str], None]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a missing or malformed file causes into FileNotFoundError or ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except KeyError as error:
        raise ValueError(f"{path} is malformed: no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is malformed: {error}") from error


def read_jsonl(path: Path) -> list[dict]:
    """Records of a file with one JSON object a line; blank lines are skipped."""
    records = []
    with reading(path):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from error
        if not records:
            raise ValueError("it holds no record")
    return records


def read_json(path: Path) -> dict:
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def image_path(name: str, data_dir: Path) -> Path:
    """The photo that a question file names: a leading `data/` stands for the data folder."""
    return data_dir / name.removeprefix("data/") if name.startswith("data/") else Path(name)


def jsonl_questions(data_dir: Path, *, file: str, instruction: str) -> list[Question]:
    """Lines with `image`, `question`, `question_id`; the prompt is the question, a blank and the instruction."""
    path = data_dir / file
    records = read_jsonl(path)
    with reading(path):
        return [
            Question(r["question_id"], image_path(r["image"], data_dir), f"{r['question']} {instruction}", r)
            for r in records
        ]


def write_json(path: Path, content: object) -> None:
    """Indented UTF-8 JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# VQAv2, OK-VQA, TextVQA, VizWiz


def ten_answer_accuracy(answers: list[Answer], data_dir: Path, *, annotations: str) -> Scores:
    """Agreement with the ten annotators whose answers are in the annotation file."""
    path = data_dir / annotations
    content = read_json(path)
    with reading(path):
        by_id = {entry["question_id"]: entry for entry in content["annotations"]}
        missing = [answer.question.id for answer in answers if answer.question.id not in by_id]
        if missing:
            raise ValueError(f"no annotation for {len(missing)} questions, the first has question_id {missing[0]!r}")
        entries = [by_id[answer.question.id] for answer in answers]
        references = [[each["answer"] for each in entry["answers"]] for entry in entries]
        for entry, texts in zip(entries, references):
            if len(texts) != 10:
                raise ValueError(f"question_id {entry['question_id']!r} has {len(texts)} answers, not ten")
        details = metrics.vqa_accuracy(
            [answer.reply for answer in answers],
            references,
            [entry.get("answer_type", "none") for entry in entries],
            [entry.get("question_type", "none") for entry in entries],
        )
    summary = {
        "accuracy (InternVL eval script)": 100 * details["eval_script_accuracy"],
        "accuracy (VQA official)": details["vqa_official_overall_percent"],
    }
    return Scores(summary, details)


def export_vqa(answers: list[Answer], folder: Path, model: str, *, key: str) -> None:
    rows = [{"question": a.question.prompt, "question_id": a.question.id, "answer": a.reply} for a in answers]
    write_json(folder / f"{key}.json", rows)


def _vqa(key: str, annotations: str, instruction: str = SHORT) -> Benchmark:
    """Entry of a benchmark with ten reference answers; `key` is InternVL's name, e.g. `vqav2_val`."""
    folder = key.split("_")[0]
    return Benchmark(
        questions=partial(jsonl_questions, file=f"{folder}/{key}.jsonl", instruction=instruction),
        max_new_tokens=10,
        metric=partial(ten_answer_accuracy, annotations=f"{folder}/{annotations}"),
        export=partial(export_vqa, key=key),
    )


# ---------------------------------------------------------------------------------------------------------------------
# GQA

_GQA_QUESTIONS = ("gqa/testdev_balanced_questions.json", "gqa/testdev_balanced_all_questions.json")


def _gqa_predictions(answers: list[Answer]) -> dict[str, str]:
    return {str(answer.question.id): metrics.gqa_prediction(answer.reply) for answer in answers}


def gqa_accuracy(answers: list[Answer], data_dir: Path) -> Scores:
    """Exact match on the balanced testdev questions; their file goes by either of two names."""
    paths = [data_dir / name for name in _GQA_QUESTIONS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{paths[0]} is missing (so is {paths[1].name}, its other name)")
    questions = read_json(path)
    with reading(path):
        details = metrics.gqa_accuracy(_gqa_predictions(answers), questions)
    empty = [kind for kind in ("open", "binary") if not details[f"n_{kind}"]]
    notes = [f"no {kind} question: {kind} accuracy is given as 0" for kind in empty]
    return Scores({name: details[name] for name in ("accuracy", "open", "binary")}, details, notes)


def export_gqa(answers: list[Answer], folder: Path, model: str) -> None:
    rows = [
        {"question": q.prompt, "questionId": q.id, "answer": reply, "annotation": q.record.get("answer")}
        for q, reply in answers
    ]
    write_json(folder / "gqa_testdev_llava.json", rows)
    predictions = [{"questionId": key, "prediction": text} for key, text in _gqa_predictions(answers).items()]
    write_json(folder / "testdev_balanced_predictions.json", predictions)


# ---------------------------------------------------------------------------------------------------------------------
# POPE

POPE_CATEGORIES = ("random", "popular", "adversarial")


def pope_questions(data_dir: Path) -> list[Question]:
    """`text` of each line is the prompt as it stands; photos lie in `pope/val2014`."""
    path = data_dir / "pope" / "llava_pope_test.jsonl"
    records = read_jsonl(path)
    with reading(path):
        for record in records:
            if SHORT not in record["text"]:
                raise ValueError(f"the text of question_id {record['question_id']!r} lacks `{SHORT}`")
            if record["category"] not in POPE_CATEGORIES:
                raise ValueError(f"category {record['category']!r} is none of {', '.join(POPE_CATEGORIES)}")
        return [Question(r["question_id"], data_dir / "pope" / "val2014" / r["image"], r["text"], r) for r in records]


def pope_scores(answers: list[Answer], data_dir: Path) -> Scores:
    """Scores per category, and overall as the mean of the categories (official for F1).

    Quirk kept: replies pair with label lines by position inside their category, not by id.
    """
    categories, notes = {}, []
    for category in POPE_CATEGORIES:
        asked = [answer for answer in answers if answer.question.record["category"] == category]
        if not asked:
            notes.append(f"{category}: no question")
            continue
        path = data_dir / "pope" / "coco" / f"coco_pope_{category}.json"
        labels = read_jsonl(path)
        with reading(path):
            if len(labels) != len(asked):
                raise ValueError(f"{len(labels)} labels for {len(asked)} {category} questions")
            unknown = {label["label"] for label in labels} - {"yes", "no"}
            if unknown:
                raise ValueError(f"a label is yes or no, not {sorted(unknown)}")
            scores = metrics.pope_scores(
                [metrics.pope_answer(answer.reply) for answer in asked], [label["label"] for label in labels]
            )
            strangers = sum(answer.question.record["image"] != label["image"] for answer, label in zip(asked, labels))
        categories[category] = scores
        if strangers:
            notes.append(f"{category}: {strangers} labels are of another image than the question at their place")
        if not scores["TP"] + scores["FP"]:
            notes.append(f"{category}: nothing answered yes, precision is given as 0")
        if not scores["TP"] + scores["FN"]:
            notes.append(f"{category}: nothing labelled yes, recall is given as 0")
    overall = {
        name: metrics.mean(scores[name] for scores in categories.values())
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }
    summary = {f"{name} (overall)": 100 * value for name, value in overall.items()}
    summary |= {
        f"{name} ({category})": 100 * scores[name] for category, scores in categories.items() for name in overall
    }
    details = {"categories": categories, "overall": overall}
    details["overall_f1_printed_percent"] = round(100 * overall["f1"], 2)
    return Scores(summary, details, notes)


def export_pope(answers: list[Answer], folder: Path, model: str) -> None:
    rows = [
        {"question_id": a.question.id, "text": a.reply, "text_orig": a.reply, "model_id": model, "metadata": {}}
        for a in answers
    ]
    write_json(folder / "pope.json", rows)


# ---------------------------------------------------------------------------------------------------------------------
# MME


def _mme_rows(table: str, data_dir: Path) -> Iterator[tuple[str, str, str]]:
    """(photo, question, answer) of one table: InternVL's `Your_Results/<table>.txt`, else the release's own files,
    `<photo>.txt` beside the photos (or below, where a release sorts them into subfolders)."""
    path = data_dir / "mme" / "Your_Results" / f"{table}.txt"
    if path.is_file():
        with reading(path):
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    photo, question, answer = line.split("\t")
                    yield photo, question, answer
        return
    release = data_dir / "mme" / "MME_Benchmark_release_version" / table
    photos = {p.stem: p.name for p in release.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}}
    files = sorted(release.rglob("*.txt"), key=lambda p: p.stem)
    if not files:
        raise FileNotFoundError(f"{path} is missing, and {release} holds no <photo>.txt")
    for file in files:
        if file.stem not in photos:
            raise FileNotFoundError(f"the photo of {file} is missing: no {file.stem}.jpg or .png below {release}")
        with reading(file):
            for line in file.read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    question, answer = line.split("\t")
                    yield photos[file.stem], question, answer


def _mme_photo(table: str, photo: str, data_dir: Path) -> Path:
    release = data_dir / "mme" / "MME_Benchmark_release_version" / table
    sorted_away = release / "images" / photo
    return sorted_away if sorted_away.is_file() else release / photo


def mme_questions(data_dir: Path) -> list[Question]:
    """The rows of the 14 tables, all of which must be there."""
    questions = []
    for table in (table for tables in metrics.MME_TABLES.values() for table in tables):
        rows = list(_mme_rows(table, data_dir))
        photos = [photo for photo, _, _ in rows]
        if photos[::2] != photos[1::2]:
            raise ValueError(f"MME table {table} is malformed: each photo must have two consecutive rows")
        for number, (photo, text, truth) in enumerate(rows, 1):
            record = {"table": table, "photo": photo, "truth": truth.strip()}
            image = _mme_photo(table, photo, data_dir)
            questions.append(Question(f"{table}/{photo}#{number}", image, f"{text} {SHORT}", record))
    return questions


def mme_scores(answers: list[Answer], data_dir: Path) -> Scores:
    """Perception and cognition (sums over tables), and every table with acc and acc+."""
    tables, totals, summary = {}, {}, {}
    for part, names in metrics.MME_TABLES.items():
        for name in names:
            rows = [
                (metrics.mme_reply(answer.reply), answer.question.record["truth"])
                for answer in answers
                if answer.question.record["table"] == name
            ]
            tables[name] = metrics.mme_table_scores(rows)
        totals[part] = sum(tables[name]["score"] for name in names)
        summary[f"{part.lower()} (points of {200 * len(names)})"] = totals[part]
    summary |= {f"{name} (points of 200)": scores["score"] for name, scores in tables.items()}
    skipped = sum(scores["rows_skipped"] for scores in tables.values())
    notes = [f"{skipped} replies hold a tab; the official scorer skips such rows"] if skipped else []
    return Scores(summary, {"totals": totals, "tables": tables}, notes)


def export_mme(answers: list[Answer], folder: Path, model: str) -> None:
    """`mme/<table>.txt` with lines photo, question, truth, cleaned reply: what InternVL's `calculation.py` reads."""
    lines: dict[str, list[str]] = {}
    for question, reply in answers:
        record = question.record
        row = (record["photo"], question.prompt, record["truth"], metrics.mme_reply(reply))
        lines.setdefault(record["table"], []).append("\t".join(row))
    (folder / "mme").mkdir(parents=True, exist_ok=True)
    for table, rows in lines.items():
        (folder / "mme" / f"{table}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# MMBench

_MMBENCH_SUBMITTED = ("index", "question", *metrics.OPTIONS, "prediction", "answer", "split")
_MMBENCH_UNSUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_LETTER_ONLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}


def mmbench_questions(data_dir: Path, *, key: str, language: str) -> list[Question]:
    """Rows of a table, circular copies included, read with pandas' defaults (so an option `None` counts as absent)."""
    path = data_dir / "mmbench" / f"{key}.tsv"
    with reading(path):
        table = pd.read_csv(path, sep="\t")
        missing = [name for name in ("index", "question", "A", "split", *_MMBENCH_UNSUBMITTED) if name not in table]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        questions, images = [], {}
        for row in table.to_dict("records"):
            code = row.pop("image")
            if code not in images:  # shared by the circular copies
                images[code] = base64.b64decode(code, validate=True)
            hint = "" if pd.isna(row["hint"]) else f"{row['hint']}\n"
            options = "".join(f"\n{letter}. {text}" for letter, text in metrics.mmbench_options(row).items())
            prompt = f"{hint}{row['question']}{options}\n{_LETTER_ONLY[language]}"
            questions.append(Question(row["index"], images[code], prompt, row))
    return questions


def _mmbench_table(answers: list[Answer]) -> pd.DataFrame:
    """The table with a column `prediction`."""
    rows = [
        answer.question.record
        | {"prediction": metrics.mmbench_prediction(answer.reply, metrics.mmbench_options(answer.question.record))}
        for answer in answers
    ]
    return pd.DataFrame(rows)


def mmbench_scores(answers: list[Answer], data_dir: Path) -> Scores:
    """Circular and plain accuracy by VLMEvalKit's exact matching: local scores, the server may read more replies."""
    details = metrics.mmbench_scores(_mmbench_table(answers))
    names = {"circular": "circular", "plain_all_rows": "plain", "plain_main_rows_only": "plain, unrotated rows only"}
    several = len(details["plain_all_rows"]) > 1
    summary = {
        names[kind] + (f", {split}" if several else "") + ("" if group == "Overall" else f", {group}"): 100 * score
        for kind, splits in details.items()
        for split, groups in splits.items()
        for group, score in groups.items()
        if group == "Overall" or (kind == "circular" and group in metrics.MMBENCH_ABILITIES.values())
    }
    return Scores(summary, details)


def export_mmbench(answers: list[Answer], folder: Path, model: str, *, key: str) -> None:
    """The Excel file that the MMBench server takes."""
    table = _mmbench_table(answers)
    folder.mkdir(parents=True, exist_ok=True)
    submitted = table[[column for column in _MMBENCH_SUBMITTED if column in table]]
    (folder / f"{key}.xlsx").write_bytes(metrics.mmbench_xlsx(submitted))


def _mmbench(key: str, language: str, scored: bool) -> Benchmark:
    return Benchmark(
        questions=partial(mmbench_questions, key=key, language=language),
        max_new_tokens=100,
        metric=mmbench_scores if scored else None,
        export=partial(export_mmbench, key=key),
    )


# ---------------------------------------------------------------------------------------------------------------------

VQA_BENCHMARKS: dict[str, Benchmark] = {
    "vqa-vqav2-val": _vqa("vqav2_val", "v2_mscoco_val2014_annotations.json"),
    "vqa-textvqa-val": _vqa("textvqa_val", "textvqa_val_annotations.json"),
    "vqa-vizwiz-val": _vqa("vizwiz_val", "vizwiz_val_annotations.json", SHORT_OR_UNANSWERABLE),
    "vqa-okvqa-val": _vqa("okvqa_val", "mscoco_val2014_annotations.json"),
    "vqa-gqa-testdev": Benchmark(
        questions=partial(jsonl_questions, file="gqa/llava_gqa_testdev_balanced_qwen_format.jsonl", instruction=SHORT),
        max_new_tokens=10,
        metric=gqa_accuracy,
        export=export_gqa,
    ),
    "pope": Benchmark(questions=pope_questions, max_new_tokens=100, metric=pope_scores, export=export_pope),
    "mme": Benchmark(questions=mme_questions, max_new_tokens=20, metric=mme_scores, export=export_mme),
    "mmbench-dev-en": _mmbench("mmbench_dev_20230712", "en", scored=True),
    "mmbench-dev-cn": _mmbench("mmbench_dev_cn_20231003", "cn", scored=True),
    "mmbench-test-en": _mmbench("mmbench_test_en_20231003", "en", scored=False),
    "mmbench-test-cn": _mmbench("mmbench_test_cn_20231003", "cn", scored=False),
}


def get_vqa_benchmarks(names: list[str]) -> dict[str, Benchmark]:
    """The entries of `names`, in that order. Raises ValueError listing unknown names and the known ones."""
    unknown = [name for name in names if name not in VQA_BENCHMARKS]
    if unknown:
        raise ValueError(f"unknown VQA benchmark {', '.join(unknown)}; known: {', '.join(VQA_BENCHMARKS)}")
    return {name: VQA_BENCHMARKS[name] for name in names}
