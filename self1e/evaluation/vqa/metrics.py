"""Scores of the VQA benchmarks, from replies and references alone: no model, no data folder.

Every function gives the number of the official program it names, quirks included, so that figures can be compared with
published ones; only crashes (empty MMBench replies, zero denominators) are not matched. Fractions are 0..1, names that
end in `_percent` are 0..100, MME points are 0..200 a table.

Official programs: InternVL's `internvl_chat/eval` (eval script), the VQA challenge's `vqaEval.py` (VQA official), the
GQA evaluator, VLMEvalKit's exact matching for MMBench.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import pandas as pd
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

# ---------------------------------------------------------------------------------------------------------------------
# VQAv2, OK-VQA, TextVQA, VizWiz: agreement with ten annotators

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
    """VQA accuracy of one question, 0..1, as InternVL's eval script computes it.

    `references`: the answers of the annotators (ten in every benchmark here).
    """
    return _agreement(normalise_answer(answer), [normalise_answer(reference) for reference in references])


def vqa_score_official(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy of one question, 0..1, as the VQA challenge's evaluator computes it.

    Quirk: when all references are the same string nothing is normalised, so `YES` against ten `yes` scores 0.
    """
    answer, references = _one_line(answer), [_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalise_answer_official(answer)
        references = [normalise_answer_official(reference) for reference in references]
    return _agreement(answer, references)


def vqa_accuracy(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    answer_types: Sequence[str],
    question_types: Sequence[str],
) -> dict:
    """Both scorers over one benchmark; types are the annotation's `answer_type` and `question_type`.

    Returns `eval_script_accuracy` (0..1), `vqa_official_overall_percent` and the same per answer and question type,
    percents rounded to two digits as the official evaluator does.
    """
    official = [vqa_score_official(answer, ten) for answer, ten in zip(answers, references)]

    def percent_by(types: Sequence[str]) -> dict[str, float]:
        table = pd.Series(official).groupby(list(types), sort=False)
        return {name: round(100 * sum(scores) / len(scores), 2) for name, scores in table}

    return {
        "n": len(answers),
        "eval_script_accuracy": mean(vqa_score(answer, ten) for answer, ten in zip(answers, references)),
        "vqa_official_overall_percent": round(100 * mean(official), 2),
        "vqa_official_per_answer_type_percent": percent_by(answer_types),
        "vqa_official_per_question_type_percent": percent_by(question_types),
    }


def mean(values: Iterable[float]) -> float:
    """Sum over count; 0 for none."""
    return ratio(sum(values := list(values)), len(values))


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 where the whole is 0 (the official programs stop with ZeroDivisionError there)."""
    return part / whole if whole else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# GQA: exact match


def gqa_prediction(reply: str) -> str:
    """The reply as it enters the GQA evaluator: full stops at the end dropped, then lower case, nothing else."""
    return reply.rstrip(".").lower()


def gqa_accuracy(predictions: Mapping[str, str], questions: Mapping[str, Mapping]) -> dict:
    """The GQA evaluator's accuracy in percent over all balanced questions, over open and over binary ones.

    Args:
        predictions: question id -> `gqa_prediction` of the reply; ids that `questions` lacks are ignored.
        questions: question id -> record with `answer`, `isBalanced` and `types.structural` (`query` = open).

    Raises:
        ValueError: a balanced question has no prediction.
    """
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    missing = [key for key in balanced if key not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} balanced GQA questions have no prediction, the first is {missing[0]}")
    hits = {True: [], False: []}  # by "is an open question"
    for key, question in balanced.items():
        hits[question["types"]["structural"] == "query"].append(predictions[key] == question["answer"])
    return {
        "n": len(balanced), "n_open": len(hits[True]), "n_binary": len(hits[False]),
        "accuracy": 100 * mean(hits[True] + hits[False]),
        "open": 100 * mean(hits[True]),
        "binary": 100 * mean(hits[False]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# POPE: is the object there?


def pope_answer(reply: str) -> str:
    """`no` when `No`, `no` or `not` stands as a word (split at blanks, commas deleted) before the first full stop.

    Everything else is `yes`, as in the official reading: also an empty reply, `NO`, `no!` and `None`.
    """
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> dict:
    """Scores of one POPE category; `yes` is the positive class, `answers` and `labels` (yes/no) pair by position."""
    pairs = list(zip(answers, labels, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    fn, tn = pairs.count(("no", "yes")), pairs.count(("no", "no"))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "samples": len(pairs), "TP": tp, "FP": fp, "TN": tn, "FN": fn,
        "accuracy": ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, len(pairs)),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# MME: pairs of yes/no questions

MME_TABLES = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip


def mme_reply(reply: str) -> str:
    """The reply as InternVL writes it to the result table: one line, yes/no for 是/否 and true/false, no other Han."""
    reply = reply.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    return re.sub("[\u4e00-\u9fa5]", "", reply.lower().replace("true", "yes").replace("false", "no"))


def mme_answer(reply: str) -> str:
    """`yes`, `no` or `other`, read from the first four characters in lower case (`know` is no, `i know` is other)."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_table_scores(rows: Sequence[tuple[str, str]]) -> dict:
    """Scores of one MME table.

    `rows`: (`mme_reply` of the reply, ground truth), each two consecutive rows about one photo. A reply with a tab
    makes a line of five fields, which the official scorer skips: not counted for `acc`, never right for `acc_plus`.

    Returns `score` = 100 acc + 100 acc+ (0..200), `acc` (right / counted rows), `acc_plus` (photos with both right).

    Raises:
        ValueError: odd number of rows.
    """
    if len(rows) % 2:
        raise ValueError(f"an MME table holds two rows a photo, here is an odd number, {len(rows)}")
    right = [None if "\t" in reply else mme_answer(reply) == truth.lower() for reply, truth in rows]
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


# ---------------------------------------------------------------------------------------------------------------------
# MMBench: multiple choice, every rotation of the options

OPTIONS = "ABCDE"
CIRCULAR_STEP = 1_000_000  # a copy with the options rotated by k has the index of its base row plus k times this
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
MMBENCH_ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def mmbench_options(row: Mapping) -> dict[str, str]:
    """Letter -> text of the options that are present in a row of an MMBench table."""
    return {letter: str(row[letter]) for letter in OPTIONS if letter in row and not pd.isna(row[letter])}


def mmbench_prediction(reply: str, options: Mapping[str, str]) -> str:
    """What InternVL writes to the submission for a reply: mostly a letter.

    Any reply that begins with an option's letter gives that letter (`Blue` is B), else the first option whose text
    stands in the reply, else the reply. An empty reply stays empty.
    """
    reply = reply.strip()
    if len(reply) < 2:
        return reply
    if reply[0] in options:
        return reply[0]
    return next((letter for letter, text in options.items() if text in reply), reply)


def mmbench_choice(prediction: str, options: Mapping[str, str]) -> str | None:
    """The option that VLMEvalKit's exact matching (no judge model) reads from a prediction.

    A letter, `Z` for a refusal, None when nothing can be read.
    """
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


def mmbench_xlsx(submission: pd.DataFrame) -> bytes:
    """An Excel file of a submission table; control characters, which the format cannot hold, are left out."""
    clean = submission.map(lambda cell: ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell)
    buffer = io.BytesIO()
    clean.to_excel(buffer, index=False, engine="openpyxl")
    return buffer.getvalue()


def mmbench_choices(table: pd.DataFrame) -> list[str | None]:
    """`mmbench_choice` of every row of a table with `index`, the option columns and `prediction`.

    The official scorer reads the submission from Excel, where pandas turns some cells into others (`None` becomes nan,
    a column of digits numbers); so does this function. An empty prediction is no choice.
    """
    read = pd.read_excel(io.BytesIO(mmbench_xlsx(table)), engine="openpyxl")
    return [
        mmbench_choice(str(row["prediction"]), mmbench_options(row)) if given else None
        for row, given in zip(read.to_dict("records"), table["prediction"])
    ]


def mmbench_scores(table: pd.DataFrame) -> dict:
    """Local scores of an MMBench dev table, VLMEvalKit's protocol with exact matching; fractions 0..1.

    `table` columns: `index, A, B, C, D, prediction, answer, category, l2-category, split`.

    Returns {`circular`, `plain_all_rows`, `plain_main_rows_only`} -> split -> {`Overall`, ability (CP, FP-S, FP-C, LR,
    RR, AR), category} -> score. Circular: a question is right when all its rotations are. Main rows: index < 1000000.
    """
    choices = mmbench_choices(table[["index", *(c for c in OPTIONS if c in table), "prediction"]])
    hits = table.assign(hit=[choice == answer for choice, answer in zip(choices, table["answer"])])
    hits["ability"] = hits["l2-category"].map(lambda name: MMBENCH_ABILITIES.get(name, name))
    main = hits[hits["index"] < CIRCULAR_STEP]
    all_rotations = hits.groupby(hits["index"] % CIRCULAR_STEP)["hit"].all()
    circular = main.assign(hit=main["index"].map(all_rotations))
    kinds = {"circular": circular, "plain_all_rows": hits, "plain_main_rows_only": main}
    return {kind: {split: _by_group(rows) for split, rows in part.groupby("split")} for kind, part in kinds.items()}


def _by_group(rows: pd.DataFrame) -> dict[str, float]:
    groups = {"Overall": float(rows["hit"].mean())}
    for column in ("ability", "category"):
        groups |= {str(name): float(hit) for name, hit in rows.groupby(column)["hit"].mean().items()}
    return groups
