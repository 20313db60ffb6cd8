"""self1e/data/masks.py: segmentations, painting, label maps, EXIF frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from trees import SQUARE, H, W

from self1e.data.masks import decode_segmentation, load_label_map, orient
from self1e.data.sets.reasoning import paint_shapes
from self1e.errors import UserError
from self1e.model.photos import photo_of

OVERLAP = [6, 3, 12, 3, 12, 9, 6, 9]  # shares x 6..8 with SQUARE, which is x 2..8, y 3..9


def rectangle(x0, x1, y0=3, y1=9):
    mask = np.zeros((H, W), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def test_polygons_one_and_several_parts():
    for polygon in [SQUARE], SQUARE:  # one part, and a flat list of numbers
        assert (decode_segmentation(polygon, H, W) == rectangle(2, 8)).all()
    union = decode_segmentation([SQUARE, OVERLAP], H, W)
    assert union.dtype == np.uint8 and (union == rectangle(2, 12)).all()
    assert decode_segmentation([], H, W).shape == (H, W) and not decode_segmentation([], H, W).any()


@pytest.mark.parametrize("short", [[], [1, 2], [1, 2, 3, 4], SQUARE[:-1], [3.5] * 5])
def test_a_part_that_is_no_area_counts_as_empty_beside_a_good_one(short):
    for parts in [SQUARE, short], [short, SQUARE], [short, SQUARE, short]:
        assert (decode_segmentation(parts, H, W) == rectangle(2, 8)).all()
    with pytest.raises(UserError, match="at least three"):
        decode_segmentation([short, short], H, W)


def runs_of(mask):
    """Lengths of equal pixels, column by column, zeros first."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return np.diff([0, *edges, len(flat)]).tolist()


def compress(runs):
    """COCO's compressed RLE of runs, written independently: differences of every second, 5 bits a character."""
    text = ""
    for k, number in enumerate(runs):
        number -= runs[k - 2] if k > 2 else 0
        more = True
        while more:
            digit, number = number & 31, number >> 5
            more = number != (-1 if digit & 16 else 0)
            text += chr(48 + digit + 32 * more)
    return text


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1 << 30))
def test_run_lengths_of_every_kind_agree(height, width, share, seed):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    compressed, size = coco.encode(np.asfortranarray(mask)), [height, width]
    text = {"size": size, "counts": compressed["counts"].decode()}
    assert compress(runs_of(mask)) == text["counts"]
    for kind in compressed, text, {"size": size, "counts": runs_of(mask)}, [text], [text, compressed]:
        assert (decode_segmentation(kind, height, width) == mask).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-5, H * W + 5), max_size=6), st.integers(0, 12), st.integers(32, 126))
def test_runs_that_do_not_fill_the_image_are_refused_before_they_are_decoded(runs, index, byte):
    """The library would read and write outside its memory."""
    for counts in runs, compress(runs), compress(runs)[:index] + chr(byte) + compress(runs)[index + 1 :]:
        try:
            mask = decode_segmentation({"size": [H, W], "counts": counts}, H, W)
        except UserError:
            continue
        back = coco.encode(np.asfortranarray(mask))
        assert coco.area(back) == mask.sum() and mask.max(initial=0) <= 1
        if counts is runs:
            assert sum(runs) == H * W and min(runs) >= 0


@pytest.mark.parametrize(
    "broken",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, float("inf")]],
        [["a", "b", "c", "d", "e", "f"]],
        [[[1, 2], [3, 4], [5, 6]]],
        None,
        {"size": [H, W]},
        {"size": [W, H], "counts": [H * W]},
        {"size": [H, W], "counts": [H * W + 1]},
        {"size": [H, W], "counts": [-1, H * W + 1]},
        {"size": [H, W], "counts": [5.0, 235.0]},
        {"size": [H, W], "counts": "o" * 50},
        {"size": [H, W], "counts": "zzzzzzzzzzzz"},
        {"size": 3, "counts": "1"},
    ],
)
def test_a_malformed_segmentation_is_refused(broken):
    with pytest.raises(UserError, match="malformed segmentation"):
        decode_segmentation(broken, H, W)


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
        {"label": "target", "points": [[1, 2], [9, 9]], "shape_type": "rectangle"},
    ],
)
def test_broken_shapes(broken):
    with pytest.raises(UserError, match=r"shapes\[0\]"):
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
    image = photo_of(tmp_path / "photo.png")
    turned = orient(stored[:, :, 0] // 255, image)
    assert image.info == {"orientation": orientation}
    assert (turned * 255 == np.asarray(image)[:, :, 0]).all()
    # A mask that was drawn on the turned photo stays; for half turns and mirrors the two cannot be told apart.
    if orientation >= 5:
        assert (orient(turned, image) == turned).all()


def test_square_masks_count_as_stored(tmp_path):
    stored = np.triu(np.ones((H, H), np.uint8))
    save_turned(tmp_path / "photo.png", 6, np.repeat(stored[:, :, None] * 255, 3, 2))
    image = photo_of(tmp_path / "photo.png")
    assert (orient(stored, image) == stored.T[:, ::-1]).all()


def test_label_maps_keep_their_values(tmp_path):
    labels = np.arange(H * W, dtype=np.uint8).reshape(H, W)
    palette = Image.fromarray(labels, mode="P")
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "labels.png")
    assert (load_label_map(tmp_path / "labels.png") == labels).all()
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    Image.new("L", (3, 3)).save(tmp_path / "blurred.jpg")
    for name, cause in ("colour.png", "has one"), ("blurred.jpg", "JPEG"), ("absent.png", "No such file"):
        with pytest.raises(UserError, match=f"{name}.*{cause}"):
            load_label_map(tmp_path / name)
