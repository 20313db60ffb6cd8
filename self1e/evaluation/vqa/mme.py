"""MME: two yes/no questions per photo in 14 tables; points per table are 100 acc + 100 acc+."""

import re
from collections.abc import Sequence
from pathlib import Path

from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer, Question, Scores, VQABenchmark, mean, read_lines
from self1e.files import write_text
from self1e.model.prompts import VQA_INSTRUCTION

TABLES = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip


def clean_reply(reply: str) -> str:
    """The reply as InternVL writes it to the result table: one line, yes/no for 是/否 and true/false, no other Han."""
    reply = reply.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    return re.sub("[\u4e00-\u9fa5]", "", reply.lower().replace("true", "yes").replace("false", "no"))


def read_reply(reply: str) -> str:
    """`yes`, `no` or `other`, read from the first four characters in lower case (`know` is no, `i know` is other)."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def table_scores(replies: Sequence[tuple[str, str]]) -> dict:
    """`score` = 100 acc + 100 acc+ (0..200) of a table, `acc` (right / counted), `acc_plus` (photos with both right).

    replies: (`clean_reply` of it, ground truth), two about each photo. One with a tab makes a line of five fields,
    which the official scorer skips: not counted for `acc`, never right for `acc_plus`.
    """
    right = [None if "\t" in reply else read_reply(reply) == truth.lower() for reply, truth in replies]
    counted = [each for each in right if each is not None]
    acc = mean(counted)
    acc_plus = mean(first is True and second is True for first, second in zip(right[::2], right[1::2]))
    skipped = len(right) - len(counted)
    score = 100 * acc + 100 * acc_plus
    return {"score": score, "acc": acc, "acc_plus": acc_plus, "rows": len(right), "rows_skipped": skipped}


def _lines(path: Path, release: Path) -> list[list[str]]:
    """Photo, question and answer of each line of a table: InternVL's file, or else the release's own, `<photo>.txt`
    beside the photos (or below, where a release sorts them into subfolders)."""
    if path.is_file():
        return [line.split("\t") for line in read_lines(path)]
    photos = {p.stem: p.name for p in release.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}}
    files = sorted(release.rglob("[!.]*.txt"), key=lambda p: p.stem)  # not the ._x.txt of a Mac
    if not files:
        raise UserError(f"{path} is missing, and {release} holds no <photo>.txt")
    return [
        [photos.get(file.stem, f"{file.stem}.jpg"), *line.split("\t")] for file in files for line in read_lines(file)
    ]


def read_questions(data_dir: Path) -> list[Question]:
    """The questions of the 14 tables, all of which must be there."""
    questions = []
    for table in (table for tables in TABLES.values() for table in tables):
        release = data_dir / "mme" / "MME_Benchmark_release_version" / table
        found = _lines(data_dir / "mme" / "Your_Results" / f"{table}.txt", release)
        photos = [cells[0] for cells in found]
        if any(len(cells) != 3 for cells in found) or photos[::2] != photos[1::2]:
            raise UserError(f"MME table {table}: each photo must have two lines of photo, question and answer")
        for number, (photo, text, truth) in enumerate(found, 1):
            record = {"table": table, "photo": photo, "truth": truth.strip()}
            image = next(filter(Path.is_file, [release / "images" / photo]), release / photo)
            questions.append(Question(f"{table}/{photo}#{number}", image, f"{text}{VQA_INSTRUCTION}", record))
    return questions


def score(answers: list[Answer], data_dir: Path) -> Scores:
    """Perception and cognition (sums over tables) and their sum, and every table with acc and acc+."""
    tables, totals, summary = {}, {}, {"total (points of 2800)": 0.0}  # the headline is first
    for part, names in TABLES.items():
        for name in names:
            own = [(reply, q.record["truth"]) for q, reply in answers if q.record["table"] == name]
            tables[name] = table_scores([(clean_reply(reply), truth) for reply, truth in own])
        totals[part] = sum(tables[name]["score"] for name in names)
        summary[f"{part.lower()} (points of {200 * len(names)})"] = totals[part]
    summary["total (points of 2800)"] = sum(totals.values())
    summary |= {f"{name} (points of 200)": scores["score"] for name, scores in tables.items()}
    return Scores(summary, {"totals": totals, "tables": tables})


def export(answers: list[Answer], folder: Path) -> None:
    """`mme/<table>.txt` with lines photo, question, truth, cleaned reply: what InternVL's `calculation.py` reads."""
    for table in {question.record["table"] for question, _ in answers}:
        own = [(q, reply) for q, reply in answers if q.record["table"] == table]
        lines = ["\t".join((q.record["photo"], q.prompt, q.record["truth"], clean_reply(reply))) for q, reply in own]
        write_text(folder / "mme" / f"{table}.txt", "\n".join(lines) + "\n")


BENCHMARKS = {"mme": VQABenchmark(questions=read_questions, max_new_tokens=20, metric=score, export=export)}
