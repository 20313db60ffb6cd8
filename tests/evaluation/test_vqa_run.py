"""VQA evaluation: readers, batched generation, resuming, scoring from disk, the command, several processes."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, SHARED, needs_shared
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.evaluation.vqa import benchmarks as registry
from self1e.evaluation.vqa import generation, metrics
from self1e.evaluation.vqa import run as program
from self1e.evaluation.vqa.benchmarks import VQA_BENCHMARKS, Answer, Benchmark, Scores
from self1e.synthetic.tiny_internvl import make_tiny_internvl

ASK = "Answer the question using a single word or phrase."
PHOTO_SIZES = [(40, 30), (90, 30), (30, 60)]


def photo(seed: int) -> Image.Image:
    width, height = PHOTO_SIZES[seed % len(PHOTO_SIZES)]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    for category in registry.POPE_CATEGORIES:
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
    for i, table in enumerate(t for tables in metrics.MME_TABLES.values() for t in tables):
        folder = data / "mme" / "MME_Benchmark_release_version" / table
        sorted_away = i % 2 == 0
        save_photo(folder / ("images" if sorted_away else "") / "p.jpg", i)
        text = folder / ("questions_answers_YN" if sorted_away else "") / "p.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n")


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model with 4 image tokens a tile, small enough for a 100 token reply in a fraction of a second."""
    small = {"image_size": 56, "width": 32, "layers": 2, "vision_width": 32, "vision_layers": 1, "vocab_size": 600}
    return make_tiny_internvl(tmp_path_factory.mktemp("tiny") / "base", **small)


def run(tmp_path: Path, version: Path | str, *flags: str, datasets: str = "vqa-vqav2-val") -> int:
    return program.main([
        "--version", str(version), "--exp_name", "e", "--log_base_dir", str(tmp_path / "runs"), "--device", "cpu",
        "--data_dir", str(tmp_path / "data"), "--datasets", datasets, "--workers", "0", *flags,
    ])  # fmt: skip


def results(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "e" / "eval_vqa"


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reply_all(name: str, data: Path, reply) -> list[Answer]:
    return [Answer(question, reply(question)) for question in VQA_BENCHMARKS[name].questions(data)]


# --- readers ---------------------------------------------------------------------------------------------------------


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


def test_mme_tables_go_before_the_release(tmp_path):
    write_mme_release(tmp_path)
    table = tmp_path / "mme" / "Your_Results" / "OCR.txt"
    table.parent.mkdir()
    table.write_text("p.jpg\tFirst?\tYes\np.jpg\tSecond?\tNo\n")
    prompts = [q.prompt for q in VQA_BENCHMARKS["mme"].questions(tmp_path) if q.record["table"] == "OCR"]
    assert prompts == [f"First? {ASK}", f"Second? {ASK}"]
    table.write_text("p.jpg\tFirst?\tYes\nq.jpg\tSecond?\tNo\n")
    with pytest.raises(ValueError, match="OCR"):
        VQA_BENCHMARKS["mme"].questions(tmp_path)


@needs_shared
def test_right_replies_score_full_marks():
    """Every benchmark in its real format, answered from its own references."""
    data = SHARED / "minidata" / "data"
    for name in ("vqa-vqav2-val", "vqa-textvqa-val", "vqa-vizwiz-val", "vqa-okvqa-val"):
        entry = VQA_BENCHMARKS[name]
        annotations = load(data / entry.metric.keywords["annotations"])["annotations"]
        commonest = {e["question_id"]: pd.Series([a["answer"] for a in e["answers"]]).mode()[0] for e in annotations}
        scores = entry.metric(reply_all(name, data, lambda q: commonest[q.id]), data)  # noqa: B023
        assert min(scores.summary.values()) > 85, name
    labels = {
        category: iter(registry.read_jsonl(data / "pope" / "coco" / f"coco_pope_{category}.json"))
        for category in registry.POPE_CATEGORIES
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


# --- generation ------------------------------------------------------------------------------------------------------


def replies(model, processor, questions, **options) -> list[str]:
    found = {}
    for asked, texts in generation.answer_questions(model, processor, questions, range(len(questions)), **options):
        found.update(zip(asked, texts))
    assert len(found) == len(questions)
    return [found[index] for index in range(len(questions))]


def load_model(version: Path):
    model = Self1EForSegmentation.from_pretrained(str(version), dtype=torch.float32).eval()
    return model, Self1EProcessor.from_pretrained(str(version))


@pytest.mark.parametrize("max_tiles", [1, 6])
def test_a_batch_answers_what_single_questions_answer(tiny, tmp_path, max_tiles):
    write_vqav2(tmp_path, 7)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    model, processor = load_model(tiny)
    options = {"max_new_tokens": 8, "max_tiles": max_tiles}
    single = replies(model, processor, questions, batch_size=1, **options)
    assert len(set(single)) > 1
    for size in (2, 7):
        assert replies(model, processor, questions, batch_size=size, **options) == single
    assert replies(model, processor, questions, batch_size=3, workers=1, **options) == single


@needs_shared
def test_a_batch_answers_what_single_questions_answer_with_the_real_tokenizer():
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(SHARED / "minidata" / "data")[:4]
    model, processor = load_model(SHARED / "golden" / "model" / "base_internvl_chat")
    single = replies(model, processor, questions, batch_size=1, max_new_tokens=4)
    assert len(set(single)) > 1
    assert replies(model, processor, questions, batch_size=4, max_new_tokens=4) == single


def test_generation_is_greedy_and_encodes_each_photo_once(tiny, tmp_path):
    """Against an independent decoder: no cache, no padding, the whole row anew for each token."""
    write_vqav2(tmp_path, 3)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    model, processor = load_model(tiny)
    tiles = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, out: tiles.append(len(out[0])))
    found = replies(model, processor, questions * 2, batch_size=6, max_new_tokens=6)
    hook.remove()
    assert tiles == [3]  # three photos, six questions, one pass
    stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for question, reply in zip(questions, found):
        row = processor([question.open_image()], [[[f"<image>\n{question.prompt}"]]])
        del row["labels"]
        new = []
        while len(new) < 6:
            ids = torch.cat([row["input_ids"], torch.tensor([new], dtype=torch.long)], 1)
            inputs = dict(row) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            if not new:
                logits[stop] = -torch.inf
            new.append(int(logits.argmax()))
            if new[-1] == stop:
                break
        assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == reply


def test_batches_keep_questions_of_a_photo_together(tmp_path):
    write_vqav2(tmp_path, 7)
    questions = VQA_BENCHMARKS["vqa-vqav2-val"].questions(tmp_path)
    assert generation.make_batches(questions, range(7), 3) == [[0, 3, 6], [1, 4, 2], [5]]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_run_writes_predictions_scores_and_official_files(tiny, tmp_path, capsys):
    for write in (write_vqav2, write_pope, write_mme_release, write_mmbench, write_gqa):
        write(tmp_path / "data")
    names = "vqa-vqav2-val pope mme mmbench-dev-en vqa-gqa-testdev"
    assert run(tmp_path, tiny, "--dynamic", datasets=names) == 0
    folder = results(tmp_path)
    rows = lines(folder / "vqa-vqav2-val.jsonl")
    assert [row["question_id"] for row in rows] == [70, 71, 72, 73, 74] and not list(folder.glob("*.rank*"))
    official = load(folder / "official" / "vqav2_val.json")
    assert [(r["question_id"], r["answer"]) for r in official] == [(r["question_id"], r["answer"]) for r in rows]
    assert set(load(folder / "official" / "testdev_balanced_predictions.json")[0]) == {"questionId", "prediction"}
    pope_keys = {"question_id", "text", "text_orig", "model_id", "metadata"}
    assert set(load(folder / "official" / "pope.json")[0]) == pope_keys
    table = (folder / "official" / "mme" / "OCR.txt").read_text().split("\n")
    assert len(table) == 3 and table[0].split("\t")[0] == "p.jpg" and table[0].split("\t")[2] == "Yes"
    sheet = pd.read_excel(folder / "official" / "mmbench_dev_20230712.xlsx")
    assert list(sheet) == ["index", "question", "A", "B", "C", "prediction", "answer", "split"] and len(sheet) == 2
    scores = load(folder / "vqa-vqav2-val.scores.json")
    assert scores["n"] == scores["details"]["n"] == 5
    summary = load(folder / "summary.json")
    assert list(summary["figures"]) == names.split() and summary["failures"] == {}
    assert (folder / "summary.md").read_text() in capsys.readouterr().out


def test_interrupted_run_continues(tiny, tmp_path):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    whole = lines(path)
    kept = [whole[0] | {"answer": "kept"}, whole[3] | {"answer": "kept, too"}]
    path.write_text(json.dumps(kept[0]) + "\n")
    torn = '{"index": 4, "question_id": 74, "ans'
    path.with_name("vqa-vqav2-val.rank1.jsonl").write_text(json.dumps(kept[1]) + "\n" + torn)
    assert run(tmp_path, tiny, "--batch_size", "2") == 0
    assert lines(path) == [kept[0], whole[1], whole[2], kept[1], whole[4]]
    assert [p.name for p in path.parent.glob("*.jsonl")] == [path.name]
    path.write_text('{"index": 0, "ques\n' + json.dumps(whole[1]) + "\n")  # torn, but not at the end
    assert run(tmp_path, tiny) == 1


def test_predictions_of_other_settings_or_questions_are_refused(tiny, tmp_path, capsys):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    before = path.read_text()
    for flags in (["--dynamic"], ["--precision", "bf16"]):
        assert run(tmp_path, tiny, *flags) == 1
        message = capsys.readouterr().err
        assert str(path) in message and "delete" in message
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    assert run(tmp_path, other) == 0  # the same model in another place
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000] + bytes(5000))
    assert run(tmp_path, other) == 1 and path.read_text() == before
    (results(tmp_path) / "vqa-vqav2-val.settings.json").unlink()
    assert run(tmp_path, tiny) == 1
    path.unlink()
    assert run(tmp_path, tiny) == 0
    write_vqav2(tmp_path / "data", 4)  # now an answer too many
    assert run(tmp_path, tiny) == 1


def test_generation_settings_of_a_checkpoint_do_not_count(tiny, tmp_path):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    plain = path.read_text()
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "generation_config.json").write_text('{"repetition_penalty": 9.0, "min_length": 900}')
    path.unlink()
    assert run(tmp_path, other) == 0 and path.read_text() == plain


def test_score_only_needs_neither_model_nor_photos(tmp_path, capsys):
    data = tmp_path / "data"
    for write in (write_vqav2, write_pope):
        write(data)
    folder = results(tmp_path)
    for name in ("vqa-vqav2-val", "pope"):
        questions = VQA_BENCHMARKS[name].questions(data)
        rows = [{"index": i, "question_id": q.id, "prompt": q.prompt} for i, q in enumerate(questions)]
        write_lines(folder / f"{name}.jsonl", [row | {"answer": "Dog"} for row in rows])
    for picture in data.rglob("*.jpg"):
        picture.unlink()
    assert run(tmp_path, "nowhere", "--score_only", datasets="vqa-vqav2-val pope") == 0
    figures = load(folder / "summary.json")["figures"]
    # One of ten annotators says dog: nine leave-one-outs find one match (1/3), the tenth none.
    assert figures["vqa-vqav2-val"]["nowhere"]["accuracy (InternVL eval script)"] == pytest.approx(30, abs=1e-9)
    assert figures["pope"]["nowhere"]["recall (overall)"] == 100  # everything but a plain no is yes
    rows = lines(folder / "pope.jsonl")
    write_lines(folder / "pope.jsonl", [row | {"answer": "no"} for row in rows])
    assert run(tmp_path, "nowhere", "--score_only", datasets="pope") == 0
    assert "nothing answered yes, precision is given as 0" in capsys.readouterr().out
    write_lines(folder / "pope.jsonl", rows[:-1])
    assert run(tmp_path, "nowhere", "--score_only", datasets="pope") == 1
    assert "answers 5 of 6 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, culprit",
    [
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").unlink(), "llava_pope_test.jsonl"),
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").write_text("{}\n"), "llava_pope_test.jsonl"),
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").write_text("{\n"), "llava_pope_test.jsonl"),
        (lambda data: (data / "pope" / "val2014" / "1.jpg").unlink(), "1.jpg"),
        (lambda data: (data / "pope" / "val2014" / "1.jpg").write_bytes(b"no photo"), "1.jpg"),
        (lambda data: (data / "pope" / "coco" / "coco_pope_random.json").unlink(), "coco_pope_random.json"),
        (lambda data: (data / "pope" / "coco" / "coco_pope_random.json").write_text("{}\n"), "coco_pope_random.json"),
    ],
)
def test_one_broken_benchmark_does_not_stop_the_others(tiny, tmp_path, capsys, spoil, culprit):
    write_vqav2(tmp_path / "data")
    write_pope(tmp_path / "data")
    spoil(tmp_path / "data")
    assert run(tmp_path, tiny, datasets="pope vqa-vqav2-val") == 1
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert "pope" in message and culprit in message and "docs/vqa.md, section Benchmarks" in message
    summary = load(results(tmp_path) / "summary.json")
    assert summary["figures"]["vqa-vqav2-val"] and not summary["figures"]["pope"] and len(summary["failures"]) == 1
    assert "failed" in (results(tmp_path) / "summary.md").read_text()
    late = culprit == "1.jpg" and (tmp_path / "data" / "pope" / "val2014" / culprit).exists()
    assert (results(tmp_path) / "pope.jsonl").exists() == late  # all else is seen before the first question


def test_base_and_fine_tuned_side_by_side(tiny, tmp_path, capsys):
    write_vqav2(tmp_path / "data")
    model, processor = load_model(tiny)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    tuned = tmp_path / "runs" / "e" / "ckpt_model"
    model.save_pretrained(tuned)
    processor.save_pretrained(tuned)
    assert run(tmp_path, tiny, "--model_weights", "none", str(tuned)) == 0
    folder = results(tmp_path)
    answers = [lines(folder / name / "vqa-vqav2-val.jsonl") for name in ("base", "e_ckpt_model")]
    assert [row["answer"] for row in answers[0]] != [row["answer"] for row in answers[1]]
    table = (folder / "summary.md").read_text()
    assert "last - first" in table and "base" in table and "e_ckpt_model" in table
    # Alone, the experiment's weights are taken, and the answers are the same.
    assert run(tmp_path, tiny) == 0
    assert lines(folder / "vqa-vqav2-val.jsonl") == answers[1]
    capsys.readouterr()


def test_pairing_of_versions_and_weights(tmp_path):
    def pairs(versions, weights):
        return [(c.version, c.weights) for c in program.list_candidates(versions, weights, tmp_path, "e")]

    assert pairs(["v"], []) == [("v", None)]
    (tmp_path / "e" / "ckpt_model").mkdir(parents=True)
    assert pairs(["v"], []) == [("v", str(tmp_path / "e" / "ckpt_model"))]
    assert pairs(["v"], ["none"]) == [("v", None)]
    assert pairs(["v"], ["none", "w"]) == [("v", None), ("v", "w")]
    assert pairs(["u", "v"], []) == [("u", None), ("v", None)]
    assert pairs(["u", "v"], ["none", "w"]) == [("u", None), ("v", "w")]
    with pytest.raises(ValueError, match="none"):
        pairs(["u", "v"], ["w"])
    same = program.list_candidates(["a/v", "b/v"], [], tmp_path, "e")
    assert len({candidate.folder for candidate in same}) == 2


def test_a_new_benchmark_is_an_entry_and_a_metric(tiny, tmp_path, monkeypatch):
    def length(answers, data_dir):
        return Scores({"mean length (characters)": metrics.mean(len(a.reply) for a in answers)}, {})

    entry = Benchmark(
        questions=lambda data_dir: registry.jsonl_questions(data_dir, file="mine/q.jsonl", instruction="Be brief."),
        max_new_tokens=3,
        metric=length,
        export=lambda answers, folder, model: registry.export_vqa(answers, folder, model, key="mine"),
    )
    monkeypatch.setitem(VQA_BENCHMARKS, "mine", entry)
    row = {"image": "data/mine/p.jpg", "question": "Eh?", "question_id": "a"}
    write_lines(tmp_path / "data" / "mine" / "q.jsonl", [row])
    save_photo(tmp_path / "data" / "mine" / "p.jpg", 2)
    assert run(tmp_path, tiny, datasets="mine") == 0
    assert lines(results(tmp_path) / "mine.jsonl")[0]["prompt"] == "Eh? Be brief."


# --- the command -----------------------------------------------------------------------------------------------------


def shell(*args: str, **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "eval_vqas.sh"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)


def test_bare_command_prints_usage():
    done = shell()
    assert done.returncode == 2 and "usage" in done.stderr and done.stdout == ""


def test_wrong_flags_exit_with_2(capsys):
    for flags in (["--datasets", "nope"], ["--max_num", "0"], ["--version", "w", "--model_weights", "a", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            program.main(["--version", "v", "--exp_name", "e", *flags])
        assert stop.value.code == 2
    assert "known: vqa-vqav2-val" in capsys.readouterr().err


def test_two_processes_answer_every_question_once(tiny, tmp_path):
    """torchrun and gloo, five questions on two ranks, from another working directory; the same as one process."""
    write_vqav2(tmp_path / "data")
    write_pope(tmp_path / "data")
    (tmp_path / "data" / "pope" / "val2014" / "1.jpg").write_bytes(b"no photo")  # must not leave a rank waiting
    done = shell(
        "--version", str(tiny), "--exp_name", "e", "--datasets", "pope vqa-vqav2-val", "--device", "cpu",
        "--num_processes", "2", "--workers", "0", cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "1.jpg" in done.stderr, done.stderr
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    assert not list(path.parent.glob("vqa-vqav2-val.rank*"))
    together = lines(path)
    assert [row["index"] for row in together] == list(range(5))
    path.unlink()
    assert run(tmp_path, tiny) == 0
    assert lines(path) == together
