"""Curves of healthy runs: joined from finished runs, compared with a run's recipe, written for TensorBoard."""

import json

import pytest
from helpers import ROOT, read_json
from runs import curves

from self1e.training.args import parse
from self1e.training.checkpoint import defining_settings
from self1e.training.healthy import HealthyCurves, gather, recipe_of

RECIPE = {"lr": 1e-4, "steps": 20, "sample_rates": None}
COMMITTED = ROOT / "docs/evidence/healthy.json"


def a_run(seed: int, losses: list[float], **recipe) -> dict:
    figures = {"loss": {"steps": [10, 20], "values": losses}, "eval_val_ciou": {"steps": [20], "values": [0.5]}}
    return {"recipe": RECIPE | recipe, "seed": seed, "curves": figures}


@pytest.fixture
def healthy(tmp_path) -> HealthyCurves:
    path = tmp_path / "healthy.json"
    path.write_text(json.dumps(gather([a_run(0, [4, 1]), a_run(1, [2, 1.23456]), a_run(2, [6, 3])])))
    return HealthyCurves(path)


def test_a_band_is_mean_lowest_and_highest_over_the_seeds(healthy):
    assert healthy.seeds == [0, 1, 2] and healthy.band("mask_dice") is None
    band = healthy.band("loss")
    assert (band.steps, band.lowest, band.highest) == ([10, 20], [2, 1], [6, 3])
    assert band.mean == pytest.approx([4, (1 + 1.235 + 3) / 3])  # four digits are kept


def test_runs_that_differ_in_more_than_their_seed_are_not_joined():
    with pytest.raises(ValueError, match="each run needs another one"):
        gather([a_run(0, [4, 1]), a_run(0, [4, 1])])
    with pytest.raises(ValueError, match="the run of seed 1 differs in more than its seed from that of 0"):
        gather([a_run(0, [4, 1]), a_run(1, [4, 1], lr=1e-3)])


def test_a_run_of_another_recipe_is_refused_with_every_difference(healthy):
    healthy.check(RECIPE)
    with pytest.raises(ValueError) as refused:
        healthy.check(RECIPE | {"lr": 1e-3, "precision": "bf16"})
    *_, first, second = str(refused.value).splitlines()
    assert first == "  lr: 0.001, theirs 0.0001" and second == "  precision: 'bf16', theirs None"


def test_ranks_share_the_photos_of_a_recipe():
    one, two = ({"batch_size": 8 // ranks, "ranks": ranks, "seed": ranks, "lr": 1e-4} for ranks in (1, 2))
    assert recipe_of(one, steps=5, parameters=7) == recipe_of(two, steps=5, parameters=7)
    assert recipe_of(one, steps=5, parameters=7) != recipe_of(one | {"batch_size": 4}, steps=5, parameters=7)


def test_tensorboard_gets_three_runs_with_the_tags_of_training(healthy, tmp_path):
    for _ in range(2):  # a run that is continued adds nothing
        healthy.write_events(tmp_path / "run/tensorboard")
    lines = {"mean": [4, 5.235 / 3], "lowest": [2, 1], "highest": [6, 3]}
    for line, losses in lines.items():
        (tmp_path / line).mkdir()
        (tmp_path / "run/tensorboard" / f"healthy_{line}").rename(tmp_path / line / "tensorboard")
        assert curves(tmp_path / line) == {"train/loss": pytest.approx(losses), "eval/val_ciou": [0.5]}


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="other.json: expected recipe, seeds and curves"):
        HealthyCurves(path)


def test_the_committed_runs_are_of_the_recipe_of_the_quickstart():
    args = parse(["--version=V", "--exp_name=E", "--config", str(ROOT / "configs/quickstart.yaml")])
    healthy, samples = HealthyCurves(COMMITTED), {"refcoco": 2000}
    defining = defining_settings(vars(args), ranks=1, zero_stage=0, base=None, samples=samples)
    healthy.check(recipe_of(defining, steps=args.max_steps, parameters=healthy.recipe["parameters"]))
    assert len(healthy.seeds) >= 5 and all(healthy.band(f"eval_{args.val_dataset}_ciou").lowest)
    assert set(read_json(COMMITTED)["curves"]) >= {"loss", "ce", "mask_bce", "mask_dice"}
