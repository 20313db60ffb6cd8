"""self1e/data/masks.py and sample.py: segmentations, painting, label maps, EXIF frames, broken photos."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from self1e.data.masks import (
    ORIENT,
    annotation_mask,
    decode_segmentation,
    load_label_map,
    orient,
    paint_shapes,
)
from self1e.data.samples import SampleError, image_key, load_image, load_oriented

H, W = 12, 20
SQUARE = [2, 3, 8, 3, 8, 9, 2, 9]  # x 2..8, y 3..9
OVERLAP = [6, 3, 12, 3, 12, 9, 6, 9]  # shares x 6..8


def rectangle(x0, x1, y0=3, y1=9):
    mask = np.zeros((H, W), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def test_polygons_one_and_several_parts():
    assert (decode_segmentation([SQUARE], H, W) == rectangle(2, 8)).all()
    union = decode_segmentation([SQUARE, OVERLAP], H, W)
    assert union.dtype == np.uint8 and union.max() == 1
    assert (union == rectangle(2, 12)).all()


def test_run_lengths_of_every_kind_agree():
    mask = rectangle(2, 8)
    compressed = coco.encode(np.asfortranarray(mask))
    column_major = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], column_major]))).tolist()
    runs = np.diff([0, *edges, len(column_major)]).tolist()
    text = {"size": [H, W], "counts": compressed["counts"].decode()}
    for kind in compressed, text, {"size": [H, W], "counts": runs}, [text], [text, compressed]:
        assert (decode_segmentation(kind, H, W) == mask).all()


@pytest.mark.parametrize("short", [[], [1, 2], [1, 2, 3, 4], SQUARE[:-1], [3.5] * 5])
def test_a_part_that_is_no_area_counts_as_empty_beside_a_good_one(short):
    for parts in [SQUARE, short], [short, SQUARE], [short, SQUARE, short]:
        assert (decode_segmentation(parts, H, W) == rectangle(2, 8)).all()
    with pytest.raises(ValueError, match="at least three"):
        decode_segmentation([short, short], H, W)


def compress(numbers):
    """COCO's compressed RLE of runs, written independently: differences of every second number, 5 bits a character."""
    text = ""
    for k, number in enumerate(numbers):
        number -= numbers[k - 2] if k > 2 else 0
        more = True
        while more:
            digit, number = number & 31, number >> 5
            more = number != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return text


def test_runs_are_checked_before_they_are_decoded():
    assert (
        compress([5, 30, 205]) == coco.frPyObjects({"size": [H, W], "counts": [5, 30, 205]}, H, W)["counts"].decode()
    )
    good = compress([5, 30, 7, 100, 98])
    assert decode_segmentation({"size": [H, W], "counts": good}, H, W).sum() == 130
    cut = [good[:k] for k in range(len(good))]
    wrong = [[5, 30, 206], [5, 30, 204], [5, -30, 265], [1 << 40, 240 - (1 << 40)], [0], []]
    trailing = [good + "o", good + "P", good[:-1] + chr(ord(good[-1]) + 32), good + "0 ", "é" + good, good + "\x7f"]
    for counts in [*cut, *map(compress, wrong), *trailing, good.encode() + b"\xff", "o" * 50, "P" * 50]:
        with pytest.raises(ValueError, match="counts|runs"):
            decode_segmentation({"size": [H, W], "counts": counts}, H, W)
    for counts in [5.0, 235.0], [True, 239], ["5", "235"], [[240]], [1 << 70], [None], None, {}, 240, [240, -1, 1]:
        with pytest.raises(ValueError, match="integers|runs"):
            decode_segmentation({"size": [H, W], "counts": counts}, H, W)


def test_runs_of_random_masks_pass():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 60, 2).tolist()
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        assert (decode_segmentation(coco.encode(np.asfortranarray(mask)), height, width) == mask).all()


@pytest.mark.parametrize("points", [[0, 0, 9e5, 9e5, 0, 9e5] * 20, [True] * 6, ["1"] * 6, [[1, 2]] * 6, [1 << 70] * 6])
def test_polygons_without_end_and_of_other_types_are_refused(points):
    with pytest.raises(ValueError):
        decode_segmentation([points], H, W)


def test_empty_segmentation_is_an_empty_mask():
    mask = decode_segmentation([], H, W)
    assert mask.shape == (H, W) and mask.sum() == 0


@pytest.mark.parametrize(
    "broken",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [["a", "b", "c", "d", "e", "f"]],
        "polygon",
        {"size": [H, W]},
        {"size": [W, H], "counts": [H * W]},
        {"size": [H, W], "counts": [H * W + 1]},
        {"size": [H, W], "counts": [-1, H * W + 1]},
        {"size": [H, W], "counts": "zzzzzzzzzzzz"},
        {"size": 3, "counts": "1"},
        None,
    ],
)
def test_malformed_segmentation_names_the_annotation(broken):
    with pytest.raises(SampleError, match="set/photo.jpg: annotation 77: malformed"):
        annotation_mask({"id": 77, "segmentation": broken}, H, W, "set/photo.jpg")


def shape(label, x0, y0, x1, y1):
    return {"label": label, "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}


def test_painting_goes_from_large_to_small_and_draws_the_outline():
    small, large = shape("Target", 5, 5, 7.9, 7), shape("target", 2, 2, 15, 10)
    ignored = shape("IGNORE this", 5, 5, 7, 7)
    assert paint_shapes([large], H, W).sum() == 14 * 9  # both edges included
    assert paint_shapes([small], H, W).sum() == 3 * 3  # 7.9 is cut to 7
    for order in ([ignored, large], [large, ignored]):  # the smaller one wins whatever the order
        mask = paint_shapes(order, H, W)
        assert (mask == 255).sum() == 9 and (mask == 1).sum() == 14 * 9 - 9
    assert (paint_shapes([small, ignored], H, W) == 1).sum() == 9  # equals: the earlier one is painted last
    assert paint_shapes([shape("FLAG", 2, 2, 9, 9)], H, W).sum() == 0
    assert (paint_shapes([shape("flagpole", 5, 5, 7, 7)], H, W) == 1).sum() == 9


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"label": "target"},
        {"label": "target", "points": [[1, 2, 3]]},
        {"label": "target", "points": [[1, float("inf")]]},
        {"label": None, "points": []},
    ],
)
def test_broken_shapes(broken):
    with pytest.raises(ValueError):
        paint_shapes([broken], H, W)


def save_turned(path, orientation, array):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_with_their_photo(tmp_path, orientation):
    stored = np.zeros((H, W, 3), np.uint8)
    stored[1:4, 2:9, :] = 255
    save_turned(tmp_path / "photo.png", orientation, stored)
    image, tag = load_oriented(tmp_path / "photo.png")
    turned = orient(stored[:, :, 0] // 255, image, tag)
    assert tag == orientation
    assert (turned * 255 == np.asarray(image)[:, :, 0]).all()
    # A mask that was drawn on the turned photo stays; for half turns and mirrors the two cannot be told apart.
    if orientation >= 5:
        assert (orient(turned, image, tag) == turned).all()


def test_square_masks_count_as_stored(tmp_path):
    stored = np.triu(np.ones((H, H), np.uint8))
    save_turned(tmp_path / "photo.png", 6, np.repeat(stored[:, :, None] * 255, 3, 2))
    image, tag = load_oriented(tmp_path / "photo.png")
    assert (orient(stored, image, tag) == ORIENT[6](stored)).all()


def test_photos_become_rgb_and_broken_ones_are_named(tmp_path):
    Image.new("LA", (5, 4)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").mode == "RGB"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:800])
    (tmp_path / "text.jpg").write_text("no photo")
    for name in "cut.jpg", "text.jpg", "absent.jpg":
        with pytest.raises(SampleError) as error:
            load_image(tmp_path / name, f"set/{name}")
        assert error.value.id == f"set/{name}" and name in error.value.cause
        assert str(error.value).startswith(f"set/{name}: ")


def test_label_maps_keep_their_values(tmp_path):
    labels = np.arange(H * W, dtype=np.uint8).reshape(H, W)
    palette = Image.fromarray(labels, mode="P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "labels.png")
    assert (load_label_map(tmp_path / "labels.png", "x") == labels).all()
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    with pytest.raises(SampleError, match="a mask or label map has one"):
        load_label_map(tmp_path / "colour.png", "x")


def test_one_photo_has_one_key_under_all_its_names():
    names = "000000000042.jpg", "COCO_train2014_000000000042.jpg", "data/vqav2/val2014/COCO_val2014_000000000042.jpg"
    assert {image_key(name) for name in names} == {42}
    others = image_key("10/images/450.jpg"), image_key("36/images/450.jpg"), image_key("VizWiz_train_00000003.jpg")
    assert len(set(others)) == 3 and max(others) < 0
