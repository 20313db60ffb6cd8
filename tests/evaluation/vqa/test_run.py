"""The VQA program: results, scoring from disk, models side by side, faulty data, the command, several processes."""

import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from helpers import ROOT
from vqa_trees import (
    lines,
    load,
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

from self1e.evaluation.vqa import run as program
from self1e.evaluation.vqa.arguments import list_candidates
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS


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
    assert ("pope" in load(results(tmp_path) / "settings.json")) == late  # all else is seen before the first question


@pytest.mark.parametrize(
    "name", ["data/../secret.jpg", "{outside}/secret.jpg", "data/vqav2/val2014/../../../secret.jpg"]
)
def test_photos_stay_in_the_data_folder_unless_allowed(tiny, tmp_path, capsys, name):
    write_vqav2(tmp_path / "data", 1)
    save_photo(tmp_path / "secret.jpg", 0)
    row = {"image": name.format(outside=tmp_path), "question": "What is this?", "question_id": 7}
    write_lines(tmp_path / "data/vqav2/vqav2_val.jsonl", [row])
    (tmp_path / "data/vqav2/v2_mscoco_val2014_annotations.json").write_text(
        (tmp_path / "data/vqav2/v2_mscoco_val2014_annotations.json").read_text().replace(": 70", ": 7")
    )
    assert run(tmp_path, tiny) == 1
    message = capsys.readouterr().err
    assert "question 7: " in message and "leads out of" in message and "--allow_outside" in message
    assert run(tmp_path, tiny, "--allow_outside") == 0


@pytest.mark.parametrize("token", ["[SEG]", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "<image> and <image>"])
def test_a_question_cannot_forge_tokens(tiny, tmp_path, capsys, token):
    write_vqav2(tmp_path / "data", 1)
    path = tmp_path / "data/vqav2/vqav2_val.jsonl"
    path.write_text(path.read_text().replace("What is", f"What is {token}"))
    assert run(tmp_path, tiny) == 1
    assert "question 70: " in (message := capsys.readouterr().err) and "holds the reserved token" in message


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
    answers = [lines(folder / name / "vqa-vqav2-val.jsonl") for name in (tiny.name, "e_ckpt_model")]
    assert [row["answer"] for row in answers[0]] != [row["answer"] for row in answers[1]]
    table = (folder / "summary.md").read_text()
    assert "last - first" in table and tiny.name in table and "e_ckpt_model" in table
    # Alone, the experiment's weights are taken, and the answers are the same.
    assert run(tmp_path, tiny) == 0
    assert lines(folder / "vqa-vqav2-val.jsonl") == answers[1]
    capsys.readouterr()


def test_pairing_of_versions_and_weights(tmp_path):
    def pairs(versions, weights):
        return [(c.version, c.weights) for c in list_candidates(versions, weights, tmp_path, "e")]

    assert pairs(["v"], []) == [("v", None)]
    (tmp_path / "e" / "ckpt_model").mkdir(parents=True)
    assert pairs(["v"], []) == [("v", str(tmp_path / "e" / "ckpt_model"))]
    assert pairs(["v"], ["none"]) == [("v", None)]
    assert pairs(["v"], ["none", "w"]) == [("v", None), ("v", "w")]
    assert pairs(["u", "v"], []) == [("u", None), ("v", None)]
    assert pairs(["u", "v"], ["none", "w"]) == [("u", None), ("v", "w")]
    with pytest.raises(ValueError, match="none"):
        pairs(["u", "v"], ["w"])
    same = list_candidates(["a/v", "b/v"], [], tmp_path, "e")
    assert len({candidate.folder for candidate in same}) == 2


def shell(*args: str, timeout: float = 300, **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "eval_vqas.sh"), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, **kwargs)


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
        "--num_processes", "2", "--workers", "0", cwd=tmp_path, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1 and "1.jpg" in done.stderr, done.stderr
    path = results(tmp_path) / "vqa-vqav2-val.jsonl"
    assert not list(path.parent.glob("vqa-vqav2-val.rank*"))
    together = lines(path)
    assert [row["index"] for row in together] == list(range(5))
    path.unlink()
    assert run(tmp_path, tiny) == 0
    assert lines(path) == together
