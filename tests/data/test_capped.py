"""Capped sets: each pass of an epoch draws its own samples, the same on any number of ranks and after a resume."""

import numpy as np
import pytest
from streams import Numbers, epoch_batches, ids
from trees import label_map, photo, reference, referring_set

from self1e.data.families import DataConfig
from self1e.data.loader import build_mixture
from self1e.data.mixture import Group, Mixture, unpack
from self1e.data.sets.semantic import COCOStuff

RECIPE = {"sem_seg": 6, "refer_seg": 20, "reason_seg": 6, "vqa": 1}  # the SEG version
SIZES = {
    "sem_seg": {"ade20k": 20_210, "cocostuff": 118_287, "pascal_part": 4_366, "paco_lvis": 45_790},
    "refer_seg": {"refclef": 17_978, "refcoco": 16_994, "refcoco+": 16_992, "refcocog": 21_899},
    "reason_seg": {"ReasonSeg": 239},
    "vqa": {"llava": 157_712},
    "questions": {"vqav2": 443_757, "okvqa": 9_009, "textvqa": 34_602, "vizwiz": 20_523, "gqa": 943_000},
}
CAPS = {"cocostuff": 30_000, "paco_lvis": 30_000, **dict.fromkeys(SIZES["questions"], 100_000)}


def recipe(shrink=1, mode="published", batch_size=5):
    """The mixture of the SEG version at the sizes of the real sets, divided by `shrink`."""
    groups = []
    for family, sizes in SIZES.items():
        sets = [
            Numbers(name, max(1, n // shrink), cap=CAPS[name] // shrink if name in CAPS else None)
            for name, n in sizes.items()
        ]
        kind = family not in ("vqa", "questions")
        groups.append(Group(sets, RECIPE.get(family, 1), kind, redraw=family in ("reason_seg", "vqa")))
    return Mixture(groups, batch_size=batch_size, seed=42, mode=mode)


def distinct(mixture, name, epoch=0):
    """Distinct samples of a set in an epoch."""
    places = np.concatenate(mixture.micro_batches(epoch, rank=0, world_size=1))
    number = [records.data.name for records in mixture.sets].index(name)
    numbers, items = (places >> 46) & 31, (places >> 24) & ((1 << 22) - 1)
    assert unpack(places[0])[1:3] == (numbers[0], items[0])
    return len(np.unique(items[numbers == number]))


def test_an_epoch_of_the_recipe_sees_most_of_a_capped_set():
    mixture = recipe(shrink=100)
    expected = 1182 * (1 - (1 - 300 / 1182) ** 6)  # six independent passes of 300
    assert abs(distinct(recipe(shrink=100, batch_size=1), "cocostuff") - expected) < 30
    assert 0.9 * expected < distinct(mixture, "cocostuff") < expected  # every fifth place goes to another sample
    assert mixture.sizes["cocostuff"] == 300 and mixture.sizes["gqa"] == 1000


def capped(world=1, epoch=0, seed=0, rate=2.5):
    mixture = Mixture([Group([Numbers("a", 50, cap=10), Numbers("b", 7)], rate, True, False)], batch_size=1, seed=seed)
    return sorted(map(int, np.concatenate(epoch_batches(mixture, world, epoch)))), mixture


@pytest.mark.parametrize("world", [2, 5])
def test_the_subset_does_not_depend_on_ranks_and_changes_with_pass_epoch_and_seed(world):
    places, mixture = capped()
    assert set(places) == set(capped(world)[0])
    passes = [{item for _, number, item, draw in map(unpack, places) if (number, draw) == (0, k)} for k in range(3)]
    assert [len(items) for items in passes[:2]] == [10, 10] and passes[0] != passes[1] and len(passes[2]) <= 10
    names = ids(mixture, places)
    assert [names.count(f"b/{k}") >= 2 for k in range(7)] == [True] * 7
    assert ids(mixture, places) != ids(mixture, capped(epoch=1)[0]) != ids(mixture, capped(seed=1)[0])
    assert capped()[0] == places  # as after a resume


def test_excluded_photos_never_come_back_through_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(COCOStuff, "cap", 3)
    for number in range(1, 7):
        photo(tmp_path / f"coco/train2017/{number:012d}.jpg")
        label_map(tmp_path / f"cocostuff/train2017/{number:012d}.png", [0])
    square = {"id": 1, "image_id": 2, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    referring_set(tmp_path, "refcoco", [reference(1, 2, 1, "val", "x")], [square])
    flags = {"dataset": "sem_seg", "sem_seg_data": "cocostuff", "sample_rates": "40", "exclude_val": True}
    config = DataConfig.parse(dataset_dir=tmp_path, data_dir=tmp_path, **flags)
    mixture = build_mixture(config, batch_size=4, seed=0)
    seen = {mixture[place].id for batch in epoch_batches(mixture) for place in batch}
    assert mixture.sizes == {"cocostuff": 3}
    assert seen == {f"cocostuff/{number:012d}.jpg" for number in (1, 3, 4, 5, 6)}
