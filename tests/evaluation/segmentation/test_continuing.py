"""An interrupted evaluation continues to the same digits, refuses other settings, and says where it stopped."""

import json
import os
import signal
from dataclasses import replace

import pytest
from segmentation_trees import GREF, REASON, SECOND, contents, evaluate

from self1e.data.samples import SampleError
from self1e.data.sets.referring import ReferringSplit
from self1e.evaluation.segmentation import run as program
from self1e.evaluation.segmentation.run import evaluate_splits

SPLITS = [REASON, GREF]
CHECKPOINT = {"version": "tiny"}


@pytest.fixture
def predicted(monkeypatch):
    """The number of rows of each photo that is predicted from here on."""
    rows = []

    def count(model, batch, *args, predict=program.predict_photo, **options):
        rows.append(len(batch["input_ids"]))
        return predict(model, batch, *args, **options)

    monkeypatch.setattr(program, "predict_photo", count)
    return rows


@pytest.fixture
def run(tiny, dataset, tmp_path, one_thread):
    """Evaluate in this process, with the settings of the program that `evaluate` starts."""

    def run(folder="out", splits=SPLITS, **options):
        options = {"workers": 0, "rows_per_forward": 2, "visualize": True, "checkpoint": CHECKPOINT} | options
        return evaluate_splits(*tiny, splits, dataset_dir=dataset, output_dir=tmp_path / folder, **options)

    return run


@pytest.fixture
def fault(monkeypatch):
    """`fault(action)` does something while the photo SECOND is read."""

    def install(action):
        def read(self, item, getitem=ReferringSplit.__getitem__):
            photo = getitem(self, item)
            return replace(photo, load=action) if photo.image_id == SECOND else photo

        monkeypatch.setattr(ReferringSplit, "__getitem__", read)

    return install


@pytest.mark.parametrize("killed_on, continued_on", [(1, 2), (2, 1)])
def test_a_killed_evaluation_ends_with_the_same_digits(
    tiny_version, dataset, tmp_path, run, predicted, killed_on, continued_on
):
    rank = killed_on - 1
    arguments = [tiny_version, dataset, tmp_path / "out"]
    killed = evaluate(tmp_path, killed_on, *arguments, rank, SECOND, "kill", *SPLITS)
    assert killed.returncode != 0
    if killed_on == 2:  # the one that was killed cannot say where
        assert "lost another process; rank 1 was at" in killed.stderr and SECOND in killed.stderr
    assert json.loads((tmp_path / "out/ReasonSeg_val.json").read_text())["n"] == 2
    assert list((tmp_path / "out").glob("grefcoco_unc_val.rank*.jsonl"))
    assert not (tmp_path / "out/grefcoco_unc_val.jsonl").exists()
    if continued_on == 1:
        run()
        assert predicted == [1]  # of five photos, the one that was never finished
    else:
        again = evaluate(tmp_path, 2, *arguments, "none", "none", "none", *SPLITS)
        assert again.returncode == 0, again.stderr[-3000:]
    run("whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_reader_that_raises_in_one_rank_stops_all_with_the_photo(tiny_version, dataset, tmp_path):
    failed = evaluate(tmp_path, 2, tiny_version, dataset, tmp_path / "out", 1, SECOND, "raise", GREF)
    assert failed.returncode != 0
    message = f"error: {GREF} {SECOND}: reading it failed (KeyError: 'a fault of the reader')"
    assert failed.stderr.count(message) == 1
    assert f'{tmp_path / "program.py"}", line' not in failed.stderr  # the launcher's traceback is there, ours is not


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_that_raises_is_named(run, fault, workers):
    def action():
        raise KeyError("a fault of the reader")

    fault(action)
    with pytest.raises(SampleError, match=f"(?s){SECOND}: reading it failed.*a fault of the reader"):
        run(workers=workers, splits=[GREF])


def test_a_dead_worker_is_named(run, fault):
    fault(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises((SampleError, RuntimeError), match=r"COCO_train2014_0+\d\.jpg"):
        run(workers=1, splits=[GREF])


def test_a_photo_that_the_model_fails_at_is_named(run, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(program, "predict_photo", fail)
    with pytest.raises(RuntimeError, match=r"ReasonSeg\|val 0.jpg: out of memory"):
        run()


def test_an_interruption_says_what_is_done(run, tiny, predicted, monkeypatch):
    def interrupt(model, batch, *args, predict=program.predict_photo, **options):
        if len(predicted) == 3:
            raise KeyboardInterrupt
        return predict(model, batch, *args, **options)

    monkeypatch.setattr(program, "predict_photo", interrupt)
    tiny[0].train()
    with pytest.raises(KeyboardInterrupt) as stopped:
        run()
    assert tiny[0].training
    assert f"interrupted at {GREF}" in str(stopped.value) and f"done: {REASON};" in str(stopped.value)
    assert "the same command continues" in str(stopped.value)


def test_finished_splits_are_kept_only_with_the_same_settings(run, tmp_path, predicted):
    first = run()
    assert len(predicted) == 5
    settings = (tmp_path / "out/settings.json").read_text()
    assert run() == first and len(predicted) == 5
    assert (tmp_path / "out/settings.json").read_text() == settings  # still tells of the run that made them
    before = contents(tmp_path / "out")
    changes = {
        'version was "tiny" and is "other"': {"checkpoint": {"version": "other"}},
        "high_res was false and is true": {"high_res": True, "model_max_length": 2048},
    }
    for words, change in changes.items():
        with pytest.raises(ValueError, match=words):
            run(**change)
        assert contents(tmp_path / "out") == before
    run(splits=[GREF], overwrite=True, checkpoint={"version": "other"})
    assert len(predicted) == 8
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert [settings[split]["figures"]["version"] for split in SPLITS] == ["tiny", "other"]
    run(splits=[GREF], checkpoint=None)  # nothing is known of these weights
    assert len(predicted) == 11


def test_other_settings_are_refused_before_the_work_begins(run, tmp_path, predicted):
    run(splits=[GREF])
    assert len(predicted) == 3
    with pytest.raises(ValueError, match="grefcoco.unc.val.*--overwrite_eval"):
        run(splits=[REASON, GREF], checkpoint={"version": "other"})
    assert len(predicted) == 3 and not list((tmp_path / "out").glob("ReasonSeg*"))


def test_units_of_other_data_are_refused(run, tmp_path):
    run(splits=[REASON])
    path = tmp_path / "out/ReasonSeg_val.jsonl"
    path.write_text(path.read_text().replace("Which one is it?", "Which one was it?"))
    with pytest.raises(ValueError, match=r"ReasonSeg_val.jsonl, line 1 is of another sentence.*--overwrite_eval"):
        run(splits=[REASON])
