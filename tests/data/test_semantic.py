"""self1e/data/sets/semantic.py: label maps and part annotations."""

import json

import numpy as np
import pytest
from helpers import SHARED, needs_shared
from trees import SQUARE, H, W, instances, label_map, photo, write_json

from self1e.data.families import FAMILIES
from self1e.data.sets.semantic import class_names
from self1e.errors import UserError

SETS = FAMILIES["sem_seg"]
PUBLISHED = ("ade20k", "cocostuff", "mapillary", "paco_lvis", "pascal_part")


def make(root, name, conversations=3):
    return SETS[name](name, root, num_classes_per_sample=conversations).opened()


def asked_for(question):
    """The text between the words of a template."""
    text = question.removeprefix("<image>\n").split(" in this image")[0]
    for opening in ("Can you segment the ", "Please segment the ", "What is "):
        text = text.removeprefix(opening)
    return text


def asked(data, index=0, draws=40):
    """{what is asked for: mask} over many draws."""
    found = {}
    for seed in range(draws):
        sample = data.sample(index, np.random.default_rng(seed))
        assert len(sample.conversations) == len(sample.masks) <= data.conversations
        for (question, _), mask in zip(sample.conversations, sample.masks):
            assert mask.shape == (1, H, W) and mask.dtype == np.uint8 and mask.max() <= 1
            found[asked_for(question)] = mask[0]
    return found


def ade20k(root, stem, values):
    photo(root / f"ade20k/images/training/{stem}.jpg")
    label_map(root / f"ade20k/annotations/training/{stem}.png", values)


def test_class_lists():
    assert len(class_names("ade20k")) == 150 and class_names("ade20k")[:2] == ["wall", "building"]
    assert len(class_names("cocostuff")) == 182 and class_names("cocostuff")[0] == "person"


def test_ade20k_counts_from_one_and_ignores_other(tmp_path):
    ade20k(tmp_path, "a", [0, 1, 150, 255])
    found = asked(make(tmp_path, "ade20k"))
    assert sorted(found) == ["flag", "wall"]
    assert found["wall"][:, 5:10].all() and found["wall"].sum() == H * 5


def test_rows_are_drawn_without_repetition(tmp_path):
    ade20k(tmp_path, "a", [1, 2, 3, 4, 5])
    for seed in range(10):
        sample = make(tmp_path, "ade20k").sample(0, np.random.default_rng(seed))
        assert len(sample.masks) == 3 and sum(mask.astype(int) for mask in sample.masks).max() == 1


def test_an_image_without_labels_counts_and_has_no_sample(tmp_path):
    for stem, values in ("a", [1]), ("b", [0]), ("c", [255]):
        ade20k(tmp_path, stem, values)
    data = make(tmp_path, "ade20k")
    assert len(data) == 3
    assert [data.sample(i, np.random.default_rng(0)) is None for i in range(3)] == [False, True, True]


def test_labels_without_a_name_and_missing_photos_are_sample_errors(tmp_path):
    ade20k(tmp_path, "a", [151])
    label_map(tmp_path / "ade20k/annotations/training/b.png", [1])
    for index, cause in (0, "holds 151"), (1, "cannot read"):
        with pytest.raises(UserError, match=cause):
            make(tmp_path, "ade20k").sample(index, np.random.default_rng(0))


def test_cocostuff_leaves_out_names_with_a_dash(tmp_path):
    names = class_names("cocostuff")
    dashed = next(k for k, name in enumerate(names) if "-" in name)
    photo(tmp_path / "coco/train2017/000000000001.jpg")
    label_map(tmp_path / "cocostuff/train2017/000000000001.png", [0, dashed, 255, 181])
    assert sorted(asked(make(tmp_path, "cocostuff"))) == ["person", "wood"]


def test_mapillary_names_and_schema(tmp_path):
    photo(tmp_path / "mapillary/training/images/a.jpg")
    label_map(tmp_path / "mapillary/training/v2.0/labels/a.png", [0, 1])
    config = write_json(
        tmp_path / "mapillary/config_v2.0.json", {"labels": [{"readable": "Road"}, {"readable": "Rail Track"}]}
    )
    assert sorted(asked(make(tmp_path, "mapillary"))) == ["rail track", "road"]
    write_json(config, {"labels": [{"name": "Road"}]})
    with pytest.raises(UserError, match="config_v2.0.json: it has no readable"):
        make(tmp_path, "mapillary")


def test_part_names_and_own_masks(tmp_path):
    names = ["mug_(drinking_vessel):Handle", "microwave_oven", "unused"]
    other = [10, 0, 15, 0, 15, 5, 10, 5]
    annotations = [
        {"id": 1, "image_id": 9, "segmentation": [SQUARE]},
        {"id": 2, "image_id": 9, "category_id": 2, "segmentation": [other]},
        {"id": 3, "image_id": 9, "category_id": 2, "segmentation": []},
    ]
    content = instances([(8, "train2017/000000000008.jpg"), (9, "train2017/000000000009.jpg")], annotations, names)
    write_json(tmp_path / "vlpart/paco/annotations/paco_lvis_v1_train.json", content)
    photo(tmp_path / "coco/train2017/000000000009.jpg")
    data = make(tmp_path, "paco_lvis")
    assert len(data) == 2 and data.sample(0, np.random.default_rng(0)) is None  # photo 8 has no annotation
    found = asked(data, 1)
    assert sorted(found) == ["microwave_oven", "mug handle", "the handle of the mug"]
    assert found["mug handle"].sum() == 36
    areas = sorted(int(mask.sum()) for mask in data.sample(1, np.random.default_rng(0)).masks)
    assert areas == [25, 36]  # the empty segmentation is passed over
    assert not data.problems


def test_pascal_part_names_are_raw(tmp_path):
    annotation = {"id": 1, "image_id": 1, "segmentation": [SQUARE]}
    content = instances([(1, "2010_1.jpg")], [annotation], ["tv_(x):front_(y)"])
    write_json(tmp_path / "vlpart/pascal_part/train.json", content)
    photo(tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2010_1.jpg")
    masks = asked(make(tmp_path, "pascal_part"))
    assert sorted(masks) == ["the front_(y) of the tv_(x)", "tv_(x) front_(y)"]
    photo(tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2010_1.jpg", orientation=3)
    for name, mask in asked(make(tmp_path, "pascal_part")).items():
        np.testing.assert_array_equal(mask, masks[name][::-1, ::-1])


def test_label_maps_turn_with_their_photo(tmp_path):
    ade20k(tmp_path, "a", [1, 2])
    photo(tmp_path / "ade20k/images/training/a.jpg", orientation=3)
    found = asked(make(tmp_path, "ade20k"))
    assert found["wall"][:, W // 2 :].all() and found["building"][:, : W // 2].all()
    assert [mask.sum() for mask in found.values()] == [H * W // 2] * 2


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_loaders(name):
    counts = json.loads((SHARED / "golden" / "val_splits.json").read_text())["_counts"][f"SemSegDatasetSeq|{name}"]
    data = make(SHARED / "minidata" / "dataset", name, conversations=100)
    seen = set()
    for index in range(len(data)):
        for seed in range(30):
            sample = data.sample(index, np.random.default_rng(seed))
            if sample is None:  # the next one serves
                continue
            assert all(mask.any() for mask in sample.masks)
            seen |= {asked_for(question) for question, _ in sample.conversations}
    assert len(data) == counts["samples"]
    assert len(seen) >= counts["distinct_class_names_seen"]  # the reference saw what few random draws showed
