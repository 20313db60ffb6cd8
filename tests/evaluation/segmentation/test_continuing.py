"""An evaluation that was killed or stopped continues to the same digits, and never one of other settings."""

import pytest
from helpers import files, read_json
from segmentation_trees import GREF, REASON, evaluate

from self1e.errors import UserError
from self1e.evaluation.segmentation import run as module
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.stop import Stopped

SPLITS = [REASON, GREF]  # two photos, three photos


@pytest.fixture
def predicted(monkeypatch):
    """The photos that are predicted from here on, one entry each."""
    photos = []

    def count(*args, predict=module.masks_of, **options):
        photos.append(1)
        return predict(*args, **options)

    monkeypatch.setattr(module, "masks_of", count)
    return photos


@pytest.fixture
def run(tiny, dataset, tmp_path, one_thread):
    """Evaluate in this process, with the settings of the program that `evaluate` starts."""

    def run(folder="out", splits=SPLITS, **options):
        options = {"workers": 0, "conversations_per_forward": 2, "visualize": True, **options}
        options = {"weights": {"weights": "tiny"}, **options}
        return evaluate_splits(*tiny, splits, dataset_dir=dataset, output_dir=tmp_path / folder, **options)

    return run


@pytest.mark.parametrize("killed_on, continued_on", [(1, 2), (2, 1)])
def test_a_killed_evaluation_ends_with_the_same_digits(
    tiny_version, dataset, tmp_path, run, predicted, killed_on, continued_on
):
    arguments = [tiny_version, dataset, tmp_path / "out"]
    assert evaluate(tmp_path, killed_on, *arguments, killed_on - 1, *SPLITS).returncode != 0
    assert read_json(tmp_path / "out/ReasonSeg_val.json")["n"] == 2
    assert list((tmp_path / "out").glob("grefcoco_unc_val.rank*.jsonl"))
    if continued_on == 1:
        run()
        assert len(predicted) < 3
    else:
        again = evaluate(tmp_path, 2, *arguments, "none", *SPLITS)
        assert again.returncode == 0, again.stderr[-3000:]
    run("whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_request_to_stop_is_heard_before_the_next_photo(run, predicted):
    with pytest.raises(Stopped):
        run(asked_to_stop=lambda: len(predicted) == 4)
    assert len(predicted) == 4
    run()
    assert len(predicted) == 5


def test_finished_splits_are_kept_only_with_the_same_settings(run, tmp_path, predicted):
    first = run()
    before = files(tmp_path / "out")
    assert run() == first and len(predicted) == 5 and files(tmp_path / "out") == before
    for change in ({"weights": {"weights": "other"}}, {"high_res": True, "model_max_length": 2048}):
        with pytest.raises(UserError, match="--overwrite_eval"):
            run(**change)
    assert files(tmp_path / "out") == before
    assert run(splits=[GREF], overwrite=True)[GREF] == first[GREF] and len(predicted) == 8
    assert list(read_json(tmp_path / "out/summary.json")) == SPLITS  # the other split is still there
    run(splits=[GREF], overwrite=True, weights={"weights": "other"})
    assert list(read_json(tmp_path / "out/summary.json")) == [GREF]  # that of other weights is gone
    assert read_json(tmp_path / "out/settings.json")["weights"] == "other" and len(predicted) == 11
    run(splits=[GREF], weights=None)  # nothing is known of these weights
    assert len(predicted) == 14
