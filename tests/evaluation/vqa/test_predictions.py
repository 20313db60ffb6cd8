"""Replies on disk are taken up again, and never mixed with those of other settings or questions."""

import json
import shutil

from vqa_trees import lines, load, results, run, write_pope, write_vqav2

from self1e.evaluation.vqa import generation


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
        assert "vqa-vqav2-val" in message and "--overwrite_eval" in message
        change = "max_tiles was 1 and is 6" if "--dynamic" in flags else 'precision was "fp32" and is "bf16"'
        assert change in message
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    assert run(tmp_path, other) == 0  # the same model in another place
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000] + bytes(5000))
    assert run(tmp_path, other) == 1 and path.read_text() == before
    (results(tmp_path) / "settings.json").unlink()
    assert run(tmp_path, tiny) == 1
    assert run(tmp_path, tiny, "--overwrite_eval", "--dynamic") == 0 and path.read_text() != before
    settings = load(results(tmp_path) / "settings.json")["vqa-vqav2-val"]
    assert settings["figures"]["max_tiles"] == 6 and settings["run"]["processes"] == 1
    path.unlink()
    assert run(tmp_path, tiny) == 0
    write_vqav2(tmp_path / "data", 4)  # now an answer too many
    assert run(tmp_path, tiny) == 1


def test_rounded_rotary_frequencies_are_another_setting(tiny, tmp_path, monkeypatch, capsys):
    write_vqav2(tmp_path / "data")
    frequencies = []

    def watch(model, *args, generate=generation.generate_replies):
        frequencies.append(model.model.language_model.rotary_emb.inv_freq)
        return generate(model, *args)

    monkeypatch.setattr(generation, "generate_replies", watch)
    assert run(tmp_path, tiny) == 0
    settings = results(tmp_path) / "settings.json"
    assert (
        "rope_precision" not in load(settings)["vqa-vqav2-val"]["figures"]
    )  # the checkpoint's, whose digest is there
    assert run(tmp_path, tiny, "--rope_precision", "bf16") == 1
    assert 'rope_precision was null and is "bf16"' in capsys.readouterr().err
    assert run(tmp_path, tiny, "--rope_precision", "bf16", "--overwrite_eval") == 0
    assert load(settings)["vqa-vqav2-val"]["figures"]["rope_precision"] == "bf16"
    exact, rounded = frequencies[0], frequencies[-1]
    assert not exact.equal(rounded) and exact.bfloat16().float().equal(rounded)


def test_ctrl_c_says_what_is_answered_and_continues(tiny, tmp_path, monkeypatch, capsys):
    write_pope(tmp_path / "data")
    write_vqav2(tmp_path / "data")
    batches = []

    def interrupt(*args, generate=generation.generate_replies):
        batches.append(1)
        if len(batches) == 5:  # pope has three batches
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(generation, "generate_replies", interrupt)
    flags = {"datasets": "pope vqa-vqav2-val"}
    assert run(tmp_path, tiny, "--batch_size", "2", **flags) == 130
    message = capsys.readouterr().err
    assert f"done: pope ({tiny.name}); 2 of 5 questions of vqa-vqav2-val" in message and "Traceback" not in message
    assert run(tmp_path, tiny, "--batch_size", "2", **flags) == 0 and len(batches) == 7
