"""Capped sets: each pass of an epoch draws its own samples, the same on any number of ranks and after a resume."""

import numpy as np
import pytest
from streams import Numbers, epoch_batches, ids
from trees import label_map, photo, reference, referring_set

from self1e.data.families import select
from self1e.data.mixture import Mixture
from self1e.data.sets.semantic import COCOStuff
from self1e.data.splits import evaluation_keys


def capped(world=1, epoch=0, seed=0, rate=2.5):
    mixture = Mixture([([Numbers("a", 50, cap=10), Numbers("b", 7)], rate)], batch_size=1, seed=seed)
    return sorted(map(tuple, np.concatenate(epoch_batches(mixture, world, epoch)).tolist())), mixture


@pytest.mark.parametrize("world", [2, 5])
def test_the_subset_does_not_depend_on_ranks_and_changes_with_pass_epoch_and_seed(world):
    slots, mixture = capped()
    assert set(slots) == set(capped(world)[0])
    passes = [{item for _, number, item, draw in slots if (number, draw) == (0, k)} for k in range(3)]
    assert [len(items) for items in passes[:2]] == [10, 10] and passes[0] != passes[1] and len(passes[2]) <= 10
    names = ids(mixture, slots)
    assert [names.count(f"b/{k}") >= 2 for k in range(7)] == [True] * 7
    assert ids(mixture, slots) != ids(mixture, capped(epoch=1)[0]) != ids(mixture, capped(seed=1)[0])
    assert capped()[0] == slots  # as after a resume


def test_excluded_photos_never_come_back_through_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(COCOStuff, "cap", 3)
    for number in range(1, 7):
        photo(tmp_path / f"coco/train2017/{number:012d}.jpg")
        label_map(tmp_path / f"cocostuff/train2017/{number:012d}.png", [0])
    square = {"id": 1, "image_id": 2, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    referring_set(tmp_path, "refcoco", [reference(1, 2, 1, "val", "x")], [square])
    flags = {"dataset": "sem_seg", "sem_seg_data": "cocostuff", "sample_rates": "40"}
    selection = select(dataset_dir=tmp_path, data_dir=tmp_path, **flags)
    mixture = Mixture(selection, batch_size=4, seed=0, excluded=evaluation_keys(tmp_path))
    seen = {mixture[slot].id for batch in epoch_batches(mixture) for slot in batch}
    assert mixture.sizes == {"cocostuff": 5} and mixture.epoch_size == 40 * 3
    assert seen == {f"cocostuff/{number:012d}.jpg" for number in (1, 3, 4, 5, 6)}
