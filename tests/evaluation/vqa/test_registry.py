"""Every benchmark of the registry reads its real format and scores it; the miniature data is answered by itself."""

from functools import partial
from pathlib import Path

import pandas as pd
from helpers import read_json
from vqa_trees import (
    ASK,
    PHOTO_SIZES,
    lines,
    results,
    run,
    save_photo,
    write_gqa,
    write_lines,
    write_mmbench,
    write_mme_release,
    write_pope,
    write_vqav2,
)

from self1e.evaluation.vqa import pope
from self1e.evaluation.vqa.base import Answer, Scores, VQABenchmark, jsonl_questions, mean, read_jsonl
from self1e.evaluation.vqa.run import VQA_BENCHMARKS
from self1e.files import write_json


def reply_all(name: str, data: Path, reply) -> list[Answer]:
    return [Answer(question, reply(question)) for question in VQA_BENCHMARKS[name].questions(data)]


def test_prompts_and_photos(tmp_path):
    for write in (write_vqav2, write_pope, write_mme_release, write_mmbench, write_gqa):
        write(tmp_path)
    first = {
        name: VQA_BENCHMARKS[name].questions(tmp_path)[0]
        for name in ("vqa-vqav2-val", "pope", "mme", "mmbench-dev-en", "vqa-gqa-testdev")
    }
    assert first["vqa-vqav2-val"].prompt == f"What is this? {ASK}"
    assert first["vqa-vqav2-val"].image == tmp_path / "vqav2" / "val2014" / "0.jpg"
    assert first["pope"].prompt == f"Is there thing 0 in the image?\n{ASK}"
    assert first["mme"].prompt == f"Is it? Please answer yes or no. {ASK}" and first["mme"].image.is_file()
    letter = "Answer with the option's letter from the given choices directly."
    assert first["mmbench-dev-en"].prompt == f"Look.\nWhich?\nA. up\nB. down\n{letter}"  # `None` reads as absent
    assert [question.open_image().size for question in first.values()] == [PHOTO_SIZES[i] for i in (0, 0, 0, 0, 1)]
    write_mmbench(tmp_path / "cn", "mmbench_dev_cn_20231003")
    chinese = VQA_BENCHMARKS["mmbench-dev-cn"].questions(tmp_path / "cn")[1]
    assert chinese.prompt == "Which?\nA. down\nB. up\n请直接回答选项字母。"


def test_right_replies_score_full_marks(miniature):
    """Every benchmark in its real format, answered from its own references."""
    data = miniature / "data"
    for name in ("vqa-vqav2-val", "vqa-textvqa-val", "vqa-vizwiz-val", "vqa-okvqa-val"):
        entry = VQA_BENCHMARKS[name]
        annotations = read_json(data / entry.metric.keywords["annotations"])["annotations"]
        commonest = {e["question_id"]: pd.Series([a["answer"] for a in e["answers"]]).mode()[0] for e in annotations}
        scores = entry.metric(reply_all(name, data, lambda q: commonest[q.id]), data)  # noqa: B023
        assert min(scores.summary.values()) > 85, name
    labels = {
        category: iter(read_jsonl(data / "pope" / "coco" / f"coco_pope_{category}.json"))
        for category in pope.CATEGORIES
    }
    right = {
        "vqa-gqa-testdev": lambda q: q.record["answer"] + ".",
        "pope": lambda q: next(labels[q.record["category"]])["label"],
        "mme": lambda q: q.record["truth"],
        "mmbench-dev-en": lambda q: q.record["answer"],
        "mmbench-dev-cn": lambda q: q.record["answer"],
    }
    figures = {name: VQA_BENCHMARKS[name].metric(reply_all(name, data, reply), data) for name, reply in right.items()}
    assert all(figures["vqa-gqa-testdev"].summary[kind] == 100 for kind in ("accuracy", "open", "binary"))
    assert figures["pope"].details["overall_f1_printed_percent"] == 100
    assert figures["mme"].details["totals"] == {"Perception": 2000, "Cognition": 800}
    assert set(figures["mmbench-dev-en"].summary.values()) == set(figures["mmbench-dev-cn"].summary.values()) == {100}
    for name in ("mmbench-test-en", "mmbench-test-cn"):
        questions = VQA_BENCHMARKS[name].questions(data)
        assert questions and VQA_BENCHMARKS[name].metric is None
        assert [question.open_image().mode for question in questions] == ["RGB"] * len(questions)


def test_a_new_benchmark_is_an_entry(tiny_version, tmp_path, monkeypatch):
    def score(answers, data_dir):
        return Scores({"mean length (characters)": mean(len(answer.reply) for answer in answers)}, {})

    mine = VQABenchmark(
        questions=partial(jsonl_questions, file="mine/q.jsonl", instruction=" Be brief."),
        max_new_tokens=3,
        metric=score,
        export=lambda answers, folder: write_json(folder / "mine.json", [answer.reply for answer in answers]),
    )
    monkeypatch.setitem(VQA_BENCHMARKS, "mine", mine)
    write_lines(tmp_path / "data/mine/q.jsonl", [{"image": "data/mine/p.jpg", "question": "Eh?", "question_id": "a"}])
    save_photo(tmp_path / "data/mine/p.jpg", 2)
    assert run(tmp_path, tiny_version, datasets="mine") == 0
    reply = lines(results(tmp_path) / "mine.jsonl")[0]
    assert reply["prompt"] == "Eh? Be brief."
    assert read_json(results(tmp_path) / "official/mine.json") == [reply["answer"]]
    assert read_json(results(tmp_path) / "summary.json")["figures"]["mine"] == {
        "mean length (characters)": len(reply["answer"])
    }
