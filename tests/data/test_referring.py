"""self1e/data/sets/referring.py: training sets and evaluation splits of the five referring sets."""

import json

import numpy as np
import pytest
from custom_trees import AREA, annotation, sentences
from helpers import SHARED, needs_shared, read_json
from trees import SQUARE, H, W, reference, referring_set

from self1e.data.families import FAMILIES
from self1e.data.splits import load_split
from self1e.errors import UserError

OVERLAP = [6, 3, 12, 3, 12, 9, 6, 9]
PUBLISHED = SHARED / "golden" / "val_splits.json"  # what the published loaders read
GOLDEN = read_json(PUBLISHED) if PUBLISHED.is_file() else {"_counts": {}}


def train(root, name, conversations=3):
    return FAMILIES["refer_seg"][name](name, root, num_classes_per_sample=conversations).opened()


def units(split):
    return [(image.image_id, sentence) for image in split for sentence in sentences(image)]


def test_training_sample(tmp_path):
    refs = [
        reference(1, 7, 11, "train", " The LEFT cat ", "cat"),
        reference(2, 7, 12, "train", "rest"),
        reference(3, 7, 12, "val", "unseen"),
    ]
    referring_set(tmp_path, "refcoco", refs, [annotation(11, 7, SQUARE), annotation(12, 7, segmentation=[])])
    data = train(tmp_path, "refcoco")
    sample = data.sample(0, np.random.default_rng(0))
    assert len(data) == 1 and sample.id == "refcoco/COCO_train2014_000000000007.jpg"
    assert [mask.shape for mask in sample.masks] == [(1, H, W)] * 3
    areas = {}
    for (question, answer), mask in zip(sample.conversations, sample.masks):
        assert question.startswith("<image>\n") and answer.count("[SEG]") == 1
        areas |= {phrase: mask.sum() for phrase in ("the left cat ", "rest") if f"{phrase.strip()} in" in question}
    assert areas == {"the left cat ": AREA, "rest": 0}  # stripped, lower-cased; empty = empty mask
    drawn = {
        tuple(q for q, _ in train(tmp_path, "refcoco", 2).sample(0, np.random.default_rng(s)).conversations)
        for s in range(8)
    }
    assert len(drawn) > 1 and all(len(set(rows)) == 2 for rows in drawn)


def test_several_annotations_are_a_union_and_minus_one_is_empty(tmp_path):
    refs = [
        reference(1, 7, [11, 12], "val", "both"),
        reference(2, 7, [-1], "val", "none"),
        reference(3, 7, [11], "val", "one"),
    ]
    referring_set(tmp_path, "grefcoco", refs, [annotation(11, 7, SQUARE), annotation(12, 7, OVERLAP)])
    (image,) = load_split("grefcoco|unc|val", tmp_path)
    _, masks = image.load()
    assert dict(zip(sentences(image), masks.sum((1, 2)).tolist())) == {"both": 10 * 6, "none": 0, "one": AREA}
    assert {each.text: each.no_target for each in image.expressions} == {"both": False, "none": True, "one": False}
    assert masks.max() == 1


def test_split_names(tmp_path):
    splits = ["train", "val", "testA", "testB", "testAB", "test"]
    refs = [reference(k, 1 + k // 2, 11, split, split) for k, split in enumerate(splits)]
    for name in "refcoco", "refclef", "grefcoco":
        referring_set(tmp_path, name, refs, [annotation(11, 1, SQUARE)])

    def asked(split):
        return sorted(sentence for _, sentence in units(load_split(split, tmp_path)))

    assert asked("refcoco|unc|val") == ["val"]
    assert asked("refcoco|unc|testA") == ["testA", "testAB"]
    assert asked("refcoco|unc|testB") == ["testAB", "testB"]
    assert asked("refclef|unc|test") == ["test", "testA", "testAB", "testB"]
    assert asked("grefcoco|unc|testA") == ["testA"]
    split = load_split("refclef|unc|test", tmp_path)
    assert [image.image_id for image in split] == ["2/images/2.jpg", "3/images/3.jpg"]  # merged per image, sorted


def test_unit_ids_are_unique_even_when_the_source_repeats_them(tmp_path):
    refs = [reference(1, 7, 11, "val", "a", "b"), reference(1, 7, 11, "val", "a")]
    referring_set(tmp_path, "refcoco", refs, [annotation(11, 7, SQUARE)])
    (image,) = load_split("refcoco|unc|val", tmp_path)
    assert len(set(image.unit_ids)) == 3
    assert image.prompts[0] == "<image>\n What is a in this image? Please output segmentation mask."


def test_broken_annotations_and_photos_are_sample_errors(tmp_path):
    refs = [reference(1, 7, 11, "train", "a"), reference(2, 8, 99, "train", "b"), reference(3, 9, 11, "train", "c")]
    images = [(7, "a.jpg"), (8, "b.jpg"), (9, "c.jpg")]
    referring_set(tmp_path, "refcoco", refs, [annotation(11, 7, [1, 2, 3])], images)
    (tmp_path / "refer_seg/images/mscoco/images/train2014/c.jpg").write_bytes(b"\xff\xd8\xff")
    data = train(tmp_path, "refcoco")
    for index, cause in enumerate(["annotation 11: malformed", "annotation 99: instances.json", "c.jpg"]):
        with pytest.raises(UserError, match=cause):
            data.sample(index, np.random.default_rng(0))
    referring_set(tmp_path, "refcoco", [*refs, reference(4, 10, 11, "train", "d")], [annotation(11, 7)], images)
    with pytest.raises(UserError, match="no image id 10"):
        train(tmp_path, "refcoco")


@needs_shared
@pytest.mark.parametrize("name", [name for name in GOLDEN if name[0] != "_"])
def test_units_and_masks_equal_the_published_loaders(name):
    ours, ids, images = [], set(), 0
    for image in load_split(name, SHARED / "minidata" / "dataset"):
        images += 1
        ids |= set(image.unit_ids)
        photo, masks = image.load()
        assert masks.shape[1:] == (photo.height, photo.width) and masks.dtype == np.uint8
        for each, mask in zip(image.expressions, masks):
            unit = {"image": image.image_id, "sentence": each.text, "mask_pixels": int((mask == 1).sum())}
            unit |= {"height": mask.shape[0], "width": mask.shape[1]}
            if name.startswith("ReasonSeg"):
                unit |= {"ignore_pixels": int((mask == 255).sum()), "is_sentence": each.is_sentence}
            else:
                unit |= {"no_target": each.no_target}
            ours.append(unit)

    def rows(units):
        return sorted(json.dumps(unit, sort_keys=True) for unit in units)

    assert rows(ours) == rows(GOLDEN[name]) and len(ids) == len(ours)
    counts = GOLDEN["_counts"][f"ValDataset|{name}"]
    assert (images, len(ours)) == (counts["images"], counts["sentences"])


@needs_shared
@pytest.mark.parametrize("name", ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco"))
def test_training_counts_equal_the_published_loaders(name):
    counts = GOLDEN["_counts"][f"ReferSegDatasetSeq|{name}"]
    data = train(SHARED / "minidata" / "dataset", name)
    expressions = [data.expressions(item) for item in range(len(data))]
    assert len(data) == counts["samples"]
    assert sum(map(len, expressions)) == counts["sentences"]
    assert len({each.suffix.split("/")[1] for image in expressions for each in image}) == counts["refs"]
