"""MME: two yes/no questions per photo in 14 tables; points per table are 100 acc + 100 acc+."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer, MissingFile, Question, Scores, VQABenchmark, mean, read_lines
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


def table_scores(rows: Sequence[tuple[str, str]]) -> dict:
    """Scores of one MME table.

    `rows`: (`clean_reply` of the reply, ground truth), each two consecutive rows about one photo. A reply with a tab
    makes a line of five fields, which the official scorer skips: not counted for `acc`, never right for `acc_plus`.

    Returns `score` = 100 acc + 100 acc+ (0..200), `acc` (right / counted rows), `acc_plus` (photos with both right).

    Raises UserError for an odd number of rows.
    """
    if len(rows) % 2:
        raise UserError(f"an MME table holds two rows per photo, here is an odd number, {len(rows)}")
    right = [None if "\t" in reply else read_reply(reply) == truth.lower() for reply, truth in rows]
    counted = [row for row in right if row is not None]
    both = [first is True and second is True for first, second in zip(right[::2], right[1::2])]
    acc, acc_plus = mean(counted), mean(both)
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": acc,
        "acc_plus": acc_plus,
        "rows": len(rows),
        "rows_skipped": len(rows) - len(counted),
    }


def _rows(table: str, data_dir: Path) -> Iterator[tuple[str, ...]]:
    """(photo, question, answer) of one table: InternVL's `Your_Results/<table>.txt`, else the release's own files,
    `<photo>.txt` beside the photos (or below, where a release sorts them into subfolders)."""
    path = data_dir / "mme" / "Your_Results" / f"{table}.txt"
    if path.is_file():
        for line in read_lines(path):
            yield _cells(line, 3, path)
        return
    release = data_dir / "mme" / "MME_Benchmark_release_version" / table
    photos = {p.stem: p.name for p in release.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}}
    files = sorted(release.rglob("*.txt"), key=lambda p: p.stem)
    if not files:
        raise MissingFile(f"{path} is missing, and {release} holds no <photo>.txt")
    for file in files:
        if file.stem not in photos:
            raise UserError(f"the photo of {file} is missing: no {file.stem}.jpg or .png below {release}")
        for line in read_lines(file):
            yield photos[file.stem], *_cells(line, 2, file)


def _cells(line: str, number: int, path: Path) -> tuple[str, ...]:
    cells = tuple(line.split("\t"))
    if len(cells) != number:
        raise UserError(f"{path} is malformed: {line!r:.100} has {len(cells)} fields between tabs, not {number}")
    return cells


def _photo(table: str, photo: str, data_dir: Path) -> Path:
    release = data_dir / "mme" / "MME_Benchmark_release_version" / table
    sorted_away = release / "images" / photo
    return sorted_away if sorted_away.is_file() else release / photo


def read_questions(data_dir: Path) -> list[Question]:
    """The rows of the 14 tables, all of which must be there."""
    questions = []
    for table in (table for tables in TABLES.values() for table in tables):
        rows = list(_rows(table, data_dir))
        photos = [photo for photo, _, _ in rows]
        if photos[::2] != photos[1::2]:
            raise UserError(f"MME table {table} is malformed: each photo must have two consecutive rows")
        for number, (photo, text, truth) in enumerate(rows, 1):
            record = {"table": table, "photo": photo, "truth": truth.strip()}
            image = _photo(table, photo, data_dir)
            questions.append(Question(f"{table}/{photo}#{number}", image, f"{text}{VQA_INSTRUCTION}", record))
    return questions


def score(answers: list[Answer], data_dir: Path) -> Scores:
    """Perception and cognition (sums over tables) and their sum, and every table with acc and acc+."""
    tables, totals, summary = {}, {}, {"total (points of 2800)": 0.0}
    for part, names in TABLES.items():
        for name in names:
            rows = [
                (clean_reply(answer.reply), answer.question.record["truth"])
                for answer in answers
                if answer.question.record["table"] == name
            ]
            tables[name] = table_scores(rows)
        totals[part] = sum(tables[name]["score"] for name in names)
        summary[f"{part.lower()} (points of {200 * len(names)})"] = totals[part]
    summary["total (points of 2800)"] = sum(totals.values())
    summary |= {f"{name} (points of 200)": scores["score"] for name, scores in tables.items()}
    skipped = sum(scores["rows_skipped"] for scores in tables.values())
    notes = [f"{skipped} replies hold a tab; the official scorer skips such rows"] if skipped else []
    return Scores(summary, {"totals": totals, "tables": tables}, notes)


def export(answers: list[Answer], folder: Path, model: str) -> None:
    """`mme/<table>.txt` with lines photo, question, truth, cleaned reply: what InternVL's `calculation.py` reads."""
    lines: dict[str, list[str]] = {}
    for question, reply in answers:
        record = question.record
        row = (record["photo"], question.prompt, record["truth"], clean_reply(reply))
        lines.setdefault(record["table"], []).append("\t".join(row))
    for table, rows in lines.items():
        write_text(folder / "mme" / f"{table}.txt", "\n".join(rows) + "\n")


BENCHMARKS = {"mme": VQABenchmark(questions=read_questions, max_new_tokens=20, metric=score, export=export)}
