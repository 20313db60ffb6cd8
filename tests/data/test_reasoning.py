"""self1e/data/sets/reasoning.py: ReasonSeg with and without explanations."""

import json
from collections import Counter

import numpy as np
import pytest
from custom_trees import sentences
from helpers import SHARED, needs_shared
from trees import H, W, photo, reasoning_photo, write_json

from self1e.data.sets.reasoning import ReasonSeg
from self1e.data.splits import load_split
from self1e.errors import UserError

AREA = 8 * 7
LFS = "version https://git-lfs.github.com/spec/v1\n"


def train(root, splits="train", **arguments):
    return ReasonSeg(f"ReasonSeg|{splits}", root, **arguments).opened()


def explain(root, **outputs):
    records = [{"image": f"{stem}.jpg", "query": "q", "outputs": text} for stem, text in outputs.items()]
    write_json(root / "reason_seg/ReasonSeg/explanatory/train.json", records)


def test_phrases_are_lower_cased_and_sentences_kept_in_either_encoding(tmp_path):
    reasoning_photo(tmp_path, "train", "a", ["Une Soirée à Café"], encoding="cp1252")
    reasoning_photo(tmp_path, "train", "b", ["Whose Café?"], is_sentence=True)
    (short,), (long,) = (train(tmp_path).sample(i, np.random.default_rng(0)).conversations for i in (0, 1))
    assert "une soirée à café in this image" in short[0] or "the une soirée à café" in short[0]
    assert long[0].startswith("<image>\nWhose Café? Please ")


def test_training_masks_are_binary_one_a_sentence(tmp_path):
    shapes = [
        {"label": "target", "points": [[2, 2], [9, 2], [9, 8], [2, 8]]},
        {"label": "ignore", "points": [[2, 2], [3, 2], [3, 8], [2, 8]]},
    ]
    reasoning_photo(tmp_path, "train", "a", ["x", "y"], shapes=shapes)
    sample = train(tmp_path).sample(0, np.random.default_rng(0))
    assert sample.id == "ReasonSeg/a.jpg"
    assert [mask.shape for mask in sample.masks] == [(1, H, W)] * 2
    assert all(mask.max() == 1 and mask.sum() == AREA - 2 * 7 for mask in sample.masks)


def test_evaluation_takes_the_first_text_and_keeps_ignored_pixels(tmp_path):
    shapes = [{"label": "Ignore", "points": [[2, 2], [9, 2], [9, 8], [2, 8]]}]
    reasoning_photo(tmp_path, "val", "b", ["First", "second"], shapes=shapes)
    reasoning_photo(tmp_path, "val", "a", ["Why?"], is_sentence=True)
    first, second = load_split("ReasonSeg|val", tmp_path)
    assert (first.image_id, second.image_id) == ("a.jpg", "b.jpg")
    assert first.prompts == ["<image>\n Why? Please output segmentation mask."]
    assert sentences(second) == ["First"] and "What is First in" in second.prompts[0]
    _, masks = second.load()
    assert masks.shape == (1, H, W) and (masks == 255).sum() == AREA and (masks == 1).sum() == 0


def test_polygons_are_drawn_on_the_turned_photo(tmp_path):
    reasoning_photo(tmp_path, "val", "a", ["x"])
    photo(tmp_path / "reason_seg/ReasonSeg/val/a.jpg", orientation=8)
    image, masks = load_split("ReasonSeg|val", tmp_path)[0].load()
    assert image.size == (H, W) and masks[0, 2:9, 2:10].all() and masks.sum() == AREA


def test_splits_join_and_photos_without_text_are_skipped(tmp_path):
    reasoning_photo(tmp_path, "train", "a", [])
    reasoning_photo(tmp_path, "val", "b", ["x"])
    data = train(tmp_path, splits="train_val")
    assert len(data) == 2 and data.sample(1, np.random.default_rng(0)).id == "ReasonSeg/b.jpg"
    assert data.sample(0, np.random.default_rng(0)) is None
    with pytest.raises(UserError, match="unknown ReasonSeg split 'dev'; known: train, val, test"):
        train(tmp_path, splits="train_dev")


def kinds(data, draws):
    counts = Counter()
    for seed in range(draws):
        sample = data.sample(0, np.random.default_rng(seed))
        (question, answer), mask = sample.conversations[0], sample.masks[0]
        assert len(mask) == answer.count("[SEG]") and mask.shape[1:] == (H, W)
        kind = "text" if answer == "because" else "both" if answer.endswith("[SEG]. because") else "mask"
        assert kind != "text" or question == "<image>\nWhy?"
        assert (kind == "both") == ("expla" in question or "explain" in question)
        counts[kind] += 1
    return counts


def test_explanations(tmp_path):
    reasoning_photo(tmp_path, "train", "a", ["Why?"], is_sentence=True)
    explain(tmp_path, a="because", z="other")
    assert kinds(train(tmp_path), 20) == {"mask": 20}
    assert kinds(train(tmp_path, explanatory=1), 20) == {"text": 20}
    # 600 draws: three standard deviations of a share of 1/3 are 0.058.
    counts = kinds(train(tmp_path, explanatory=1 / 3), 600)
    assert all(abs(counts[kind] / 600 - 1 / 3) < 0.06 for kind in ("text", "both", "mask"))


@pytest.mark.parametrize(
    "record",
    [
        "{",
        LFS,
        '{"text": [null], "is_sentence": false, "shapes": []}',
        '{"text": ["x"]}',
        '["x"]',
        '{"text": ["x"], "is_sentence": false, "shapes": [{"label": "target"}]}',
    ],
)
def test_broken_records_are_sample_errors(tmp_path, record):
    reasoning_photo(tmp_path, "train", "a", ["x"])
    (tmp_path / "reason_seg/ReasonSeg/train/a.json").write_text(record)
    with pytest.raises(UserError, match="ReasonSeg/a.jpg: "):
        train(tmp_path).sample(0, np.random.default_rng(0))


@needs_shared
@pytest.mark.parametrize("explanatory", ["-1", "0.1", "1.0"])
def test_counts_equal_the_published_loaders(explanatory):
    counts = json.loads((SHARED / "golden" / "val_splits.json").read_text())["_counts"]
    counts = counts[f"ReasonSegDataset|train|explanatory={explanatory}"]
    data = train(SHARED / "minidata" / "dataset", explanatory=float(explanatory))
    explained = sum(photo.name in data.explanations for photo in data.photos)
    assert (len(data), explained) == (counts["samples"], counts["explained"])
    draws = Counter()
    for index in range(len(data)):
        for seed in range(12):
            sample = data.sample(index, np.random.default_rng(seed))
            draws["with_mask" if sum(map(len, sample.masks)) else "text_only"] += 1
    assert sum(draws.values()) == sum(counts["draws"].values())
    if explanatory != "0.1":  # the share itself is random there
        assert draws == counts["draws"]
