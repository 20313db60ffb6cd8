"""MMBench: multiple choice, every question with every rotation of its options.

InternVL turns replies into predictions and scores nothing: its Excel file goes to the MMBench server. The local scores
of the dev tables are VLMEvalKit's exact matching, without a judge model.
"""

import base64
import io
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from self1e.evaluation.vqa.base import Answer, Question, Scores, VQABenchmark, require
from self1e.files import check_fetched

OPTIONS = "ABCDE"
CIRCULAR_STEP = 1_000_000  # a copy with the options rotated by k has the index of its question plus k times this
_REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
ABILITIES = {
    "coarse_perception": "CP", "logic_reasoning": "LR", "relation_reasoning": "RR", "attribute_reasoning": "AR",
    "finegrained_perception (instance-level)": "FP-S", "finegrained_perception (cross-instance)": "FP-C",
}  # fmt: skip


def options_of(record: Mapping) -> dict[str, str]:
    """Letter -> text of the options that are present in a record of an MMBench table."""
    return {letter: str(record[letter]) for letter in OPTIONS if letter in record and not pd.isna(record[letter])}


def read_prediction(reply: str, options: Mapping[str, str]) -> str:
    """What InternVL writes to the submission for a reply.

    An option's letter that it begins with (`Blue` is B), else that of the first option whose text it holds, else all.
    """
    reply = reply.strip()
    if len(reply) < 2 or reply[0] in options:
        return reply[:1]
    return next((letter for letter, text in options.items() if text in reply), reply)


def read_choice(prediction: str, options: Mapping[str, str]) -> str | None:
    """What VLMEvalKit's exact matching reads from a prediction: a letter, `Z` for a refusal, None for nothing."""
    if any(refusal in prediction for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) >= len(words) - 4:
        return present[0]
    if not present and "Z" in words:
        return "Z"
    stated = re.search(r"(?:correct )?answer is\s*\**\s*([A-D])\b", prediction, re.IGNORECASE)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    texts = {letter: text.lower() for letter, text in options.items()}
    if len(prediction) > 2 * sum(map(len, texts.values())):
        return None
    named = [letter for letter, text in texts.items() if text in prediction.lower()]
    return named[0] if len(named) == 1 else None


def to_xlsx(submission: pd.DataFrame) -> bytes:
    """An Excel file of a submission table; control characters, which the format cannot hold, are left out."""
    clean = submission.map(lambda cell: ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell)
    buffer = io.BytesIO()
    clean.to_excel(buffer, index=False, engine="openpyxl")
    return buffer.getvalue()


def read_choices(table: pd.DataFrame) -> list[str | None]:
    """`read_choice` of every record of a table with `index`, the option columns and `prediction`, by way of Excel.

    The official scorer reads Excel, too, and pandas turns some cells into others (`None` to nan, digits to numbers).
    """
    read = pd.read_excel(io.BytesIO(to_xlsx(table)), engine="openpyxl")
    return [
        read_choice(str(record["prediction"]), options_of(record)) if given else None
        for record, given in zip(read.to_dict("records"), table["prediction"])
    ]


def accuracy(table: pd.DataFrame) -> dict:
    """Local scores of an MMBench dev table, VLMEvalKit's protocol with exact matching; fractions 0..1.

    `table` columns: `index, A, B, C, D, prediction, answer, category, l2-category, split`.

    Returns {`circular`, `plain_all_rows`, `plain_main_rows_only`} -> split -> {`Overall`, ability (CP, FP-S, FP-C, LR,
    RR, AR), category} -> score. Circular: a question is right when all its rotations are. Main rows: index < 1000000.
    """

    def by_group(part: pd.DataFrame) -> dict[str, float]:
        groups = {"Overall": float(part["hit"].mean())}
        for column in ("ability", "category"):
            groups |= {str(name): float(hit) for name, hit in part.groupby(column)["hit"].mean().items()}
        return groups

    choices = read_choices(table[["index", *(c for c in OPTIONS if c in table), "prediction"]])
    hits = table.assign(hit=[choice == answer for choice, answer in zip(choices, table["answer"])])
    hits["ability"] = hits["l2-category"].map(lambda name: ABILITIES.get(name, name))
    main = hits[hits["index"] < CIRCULAR_STEP]
    all_rotations = hits.groupby(hits["index"] % CIRCULAR_STEP)["hit"].all()
    circular = main.assign(hit=main["index"].map(all_rotations))
    kinds = {"circular": circular, "plain_all_rows": hits, "plain_main_rows_only": main}
    return {kind: {split: by_group(part) for split, part in table.groupby("split")} for kind, table in kinds.items()}


_SUBMITTED = ("index", "question", *OPTIONS, "prediction", "answer", "split")
_LETTER_ONLY = {"en": "Answer with the option's letter from the given choices directly.", "cn": "请直接回答选项字母。"}


def read_questions(data_dir: Path, *, key: str, instruction: str) -> list[Question]:
    """The table, circular copies included, read with pandas' defaults (so an option `None` counts as absent)."""
    path = data_dir / "mmbench" / f"{key}.tsv"
    check_fetched(path)
    table = pd.read_csv(path, sep="\t")
    columns = ("index", "question", "A", "split", "hint", "category", "source", "image", "comment", "l2-category")
    records = table.to_dict("records")
    require(path, records[:1], *columns)
    questions, decode = [], lru_cache(None)(base64.b64decode)  # circular copies share their photo
    for record in records:
        image = decode(record.pop("image"))
        hint = "" if pd.isna(record["hint"]) else f"{record['hint']}\n"
        options = "".join(f"\n{letter}. {text}" for letter, text in options_of(record).items())
        prompt = f"{hint}{record['question']}{options}\n{instruction}"
        questions.append(Question(record["index"], image, prompt, record))
    return questions


def _table(answers: list[Answer]) -> pd.DataFrame:
    records = (q.record | {"prediction": read_prediction(reply, options_of(q.record))} for q, reply in answers)
    return pd.DataFrame(records)


def score(answers: list[Answer], data_dir: Path) -> Scores:
    """Circular and plain accuracy by VLMEvalKit's exact matching: local scores, the server may read more replies."""
    details = accuracy(_table(answers))
    names = {"circular": "circular", "plain_all_rows": "plain", "plain_main_rows_only": "plain, unrotated rows only"}
    summary = {}
    for kind, splits in details.items():
        for split, groups in splits.items():
            figure = f"{names[kind]}, {split}" if len(splits) > 1 else names[kind]
            summary[figure] = 100 * groups["Overall"]
            if kind == "circular":
                summary |= {f"{figure}, {g}": 100 * value for g, value in groups.items() if g in ABILITIES.values()}
    return Scores(summary, details)


def export(answers: list[Answer], folder: Path, *, key: str) -> None:
    """The Excel file that the MMBench server takes."""
    table = _table(answers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key}.xlsx").write_bytes(to_xlsx(table[[column for column in _SUBMITTED if column in table]]))


_KEYS = {
    "dev-en": "mmbench_dev_20230712", "dev-cn": "mmbench_dev_cn_20231003",
    "test-en": "mmbench_test_en_20231003", "test-cn": "mmbench_test_cn_20231003",
}  # fmt: skip
BENCHMARKS = {
    f"mmbench-{name}": VQABenchmark(
        questions=partial(read_questions, key=key, instruction=_LETTER_ONLY[name[-2:]]),
        max_new_tokens=100,
        metric=score if name.startswith("dev") else None,
        export=partial(export, key=key),
    )
    for name, key in _KEYS.items()
}
