"""The VQA program: results, continuing, scoring from disk, models side by side, faulty data, several processes."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import ROOT, read_json
from vqa_trees import (
    lines,
    load_model,
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

from self1e.evaluation.vqa.run import VQA_BENCHMARKS

LFS = "version https://git-lfs.github.com/spec/v1\n"


def test_run_writes_replies_scores_and_official_files(tiny, tmp_path, capsys):
    for write in (write_vqav2, write_pope, write_mme_release, write_mmbench, write_gqa):
        write(tmp_path / "data")
    names = "vqa-vqav2-val vqa-gqa-testdev pope mme mmbench-dev-en"
    assert run(tmp_path, tiny, "--dynamic", datasets=names) == 0
    folder = results(tmp_path)
    replies = lines(folder / "vqa-vqav2-val.jsonl")
    assert [reply["question_id"] for reply in replies] == [70, 71, 72, 73, 74] and not list(folder.glob("*.rank*"))
    official = read_json(folder / "official" / "vqav2_val.json")
    assert [(o["question_id"], o["answer"]) for o in official] == [(r["question_id"], r["answer"]) for r in replies]
    assert set(read_json(folder / "official" / "testdev_balanced_predictions.json")[0]) == {"questionId", "prediction"}
    pope_keys = {"question_id", "text", "text_orig", "model_id", "metadata"}
    assert set(read_json(folder / "official" / "pope.json")[0]) == pope_keys
    table = (folder / "official" / "mme" / "OCR.txt").read_text().split("\n")
    assert len(table) == 3 and table[0].split("\t")[0] == "p.jpg" and table[0].split("\t")[2] == "Yes"
    sheet = pd.read_excel(folder / "official" / "mmbench_dev_20230712.xlsx")
    assert list(sheet) == ["index", "question", "A", "B", "C", "prediction", "answer", "split"] and len(sheet) == 2
    scores = read_json(folder / "vqa-vqav2-val.scores.json")
    assert scores["n"] == scores["details"]["n"] == 5
    summary = read_json(folder / "summary.json")
    assert list(summary["figures"]) == names.split() and summary["failures"] == {}
    printed, written = capsys.readouterr().out, (folder / "summary.md").read_text()
    assert printed.startswith(f"evaluating {tiny}")
    assert all(f"{name} " in printed for name in names.split())
    assert "OCR" in written and "OCR" not in printed  # one headline per benchmark
    # A later evaluation of one benchmark keeps the others.
    assert run(tmp_path, tiny, "--dynamic", "--overwrite_eval", datasets="pope") == 0
    assert read_json(folder / "summary.json") == summary and (folder / "summary.md").read_text() == written


def test_an_interrupted_run_continues(tiny, tmp_path):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    whole = lines(path)
    earlier = [whole[0] | {"answer": "kept"}, whole[3] | {"answer": "kept, too"}]
    path.write_text(json.dumps(earlier[0]) + "\n")
    torn = '{"index": 4, "question_id": 74, "ans'
    path.with_name("vqa-vqav2-val.rank1.jsonl").write_text(json.dumps(earlier[1]) + "\n" + torn)
    assert run(tmp_path, tiny, "--batch_size", "2") == 0
    assert lines(path) == [earlier[0], whole[1], whole[2], earlier[1], whole[4]]
    assert [p.name for p in path.parent.glob("*.jsonl")] == [path.name]


def test_replies_of_other_settings_or_questions_are_refused(tiny, tmp_path, capsys):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    before = path.read_text()
    for flags in (["--dynamic"], ["--precision", "bf16"], ["--rope_precision", "bf16"]):
        assert run(tmp_path, tiny, *flags) == 1
        assert "--overwrite_eval" in (message := capsys.readouterr().err), message
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    assert run(tmp_path, other) == 0  # the same model in another place
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000] + bytes(5000))
    assert run(tmp_path, other) == 1 and path.read_text() == before
    write_vqav2(tmp_path / "data", 4)  # now an answer too many
    assert run(tmp_path, tiny) == 1
    assert run(tmp_path, tiny, "--overwrite_eval", "--dynamic") == 0 and len(lines(path)) == 4
    assert read_json(results(tmp_path) / "settings.json")["max_tiles"] == 6


def test_generation_settings_of_a_checkpoint_do_not_count(tiny, tmp_path):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    plain = path.read_text()
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "generation_config.json").write_text('{"repetition_penalty": 9.0, "min_length": 900}')
    assert run(tmp_path, other, "--overwrite_eval") == 0 and path.read_text() == plain


def test_score_only_needs_neither_model_nor_photos(tmp_path, capsys):
    data = tmp_path / "data"
    for write in (write_vqav2, write_pope):
        write(data)
    folder = results(tmp_path)
    for name in ("vqa-vqav2-val", "pope"):
        questions = VQA_BENCHMARKS[name].questions(data)
        records = [{"index": i, "question_id": q.id, "prompt": q.prompt} for i, q in enumerate(questions)]
        write_lines(folder / f"{name}.jsonl", [record | {"answer": "Dog"} for record in records])
    for picture in data.rglob("*.jpg"):
        picture.unlink()
    for questions in data.glob("*/*.jsonl"):
        questions.write_text(questions.read_text(), encoding="utf-8-sig")
    assert run(tmp_path, "nowhere", "--score_only", datasets="vqa-vqav2-val pope") == 0
    figures = read_json(folder / "summary.json")["figures"]
    # One of ten annotators says dog: nine leave-one-outs find one match (1/3), the tenth none.
    assert figures["vqa-vqav2-val"]["accuracy (InternVL eval script)"] == pytest.approx(30, abs=1e-9)
    assert figures["pope"]["recall (overall)"] == 100  # everything but a plain no is yes
    write_lines(folder / "pope.jsonl", lines(folder / "pope.jsonl")[:-1])
    assert run(tmp_path, "nowhere", "--score_only", datasets="pope") == 1
    assert "answers 5 of 6 questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, culprit",
    [
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").unlink(), "llava_pope_test.jsonl"),
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").write_text("{}\n"), "llava_pope_test.jsonl"),
        (lambda data: (data / "pope" / "val2014" / "1.jpg").unlink(), "1.jpg"),
        (lambda data: (data / "pope" / "coco" / "coco_pope_random.json").write_text("{}\n"), "coco_pope_random.json"),
        (lambda data: (data / "pope" / "llava_pope_test.jsonl").write_text(LFS), "Git LFS"),
    ],
)
def test_faulty_files_of_one_benchmark_do_not_stop_the_others(tiny, tmp_path, capsys, spoil, culprit):
    write_vqav2(tmp_path / "data")
    write_pope(tmp_path / "data")
    spoil(tmp_path / "data")
    assert run(tmp_path, tiny, datasets="pope vqa-vqav2-val") == 1
    assert culprit in capsys.readouterr().err
    summary = read_json(results(tmp_path) / "summary.json")
    assert list(summary["figures"]) == ["vqa-vqav2-val"] and list(summary["failures"]) == ["pope"]
    assert run(tmp_path, tiny, datasets="pope") == 1
    assert f"nothing was evaluated: no benchmark has its files in {tmp_path / 'data'}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["data/../secret.jpg", "{outside}/secret.jpg"])
def test_photos_stay_in_the_data_folder_unless_allowed(tiny, tmp_path, capsys, name):
    write_vqav2(tmp_path / "data", 1)
    save_photo(tmp_path / "secret.jpg", 0)
    record = {"image": name.format(outside=tmp_path), "question": "What is this?", "question_id": 70}
    write_lines(tmp_path / "data/vqav2/vqav2_val.jsonl", [record])
    assert run(tmp_path, tiny) == 1
    message = capsys.readouterr().err
    assert "question 70: " in message and "leads out of" in message and "--allow_outside" in message
    assert run(tmp_path, tiny, "--allow_outside") == 0


@pytest.mark.parametrize("token", ["[SEG]", "<|im_end|>", "<IMG_CONTEXT>", "<image> and <image>"])
def test_a_question_cannot_hold_control_tokens(tiny, tmp_path, capsys, token):
    write_vqav2(tmp_path / "data", 1)
    path = tmp_path / "data/vqav2/vqav2_val.jsonl"
    path.write_text(path.read_text().replace("What is", f"What is {token}"))
    assert run(tmp_path, tiny) == 1
    assert "question 70: " in (message := capsys.readouterr().err) and "holds the reserved token" in message


def test_the_weights_of_the_run_are_taken(tiny, tmp_path):
    write_vqav2(tmp_path / "data")
    assert run(tmp_path, tiny) == 0
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    base = path.read_text()
    assert run(tmp_path, None) == 1  # no model of its own
    model, processor = load_model(tiny)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    tuned = tmp_path / "runs" / "e" / "ckpt_model"
    model.save_pretrained(tuned)
    processor.save_pretrained(tuned)
    assert run(tmp_path, None, "--overwrite_eval") == 0 and path.read_text() != base
    tuned_answers = path.read_text()
    assert run(tmp_path, tiny, "--overwrite_eval") == 0 and path.read_text() == tuned_answers


def test_two_processes_answer_what_one_answers(tiny, tmp_path):
    """torchrun and gloo, five questions on two ranks, from another working directory."""
    write_vqav2(tmp_path / "data")
    write_pope(tmp_path / "data")
    command = ["bash", str(ROOT / "eval_vqas.sh"), "--version", str(tiny), "--exp_name", "e", "--device", "cpu"]
    command += ["--datasets", "pope vqa-vqav2-val", "--num_processes", "2", "--workers", "0"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(results(tmp_path).glob("*.rank*"))
    together = [lines(results(tmp_path) / f"{name}.jsonl") for name in ("pope", "vqa-vqav2-val")]
    assert run(tmp_path, tiny, "--overwrite_eval", datasets="pope vqa-vqav2-val") == 0
    assert [lines(results(tmp_path) / f"{name}.jsonl") for name in ("pope", "vqa-vqav2-val")] == together
