"""Pictures are checked by their pixels and sizes; how they look is for the eye."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from self1e.visualize import MARGIN, PALETTE, grid, overlay, panel


def photo(width=120, height=80, color=(140, 60, 200)):
    return Image.new("RGB", (width, height), color)


def square(height=80, width=120, start=20, stop=60, value=1):
    mask = np.zeros((height, width), np.uint8)
    mask[start:stop, start:stop] = value
    return mask


def test_overlay_keeps_the_object_and_darkens_the_rest():
    painted = np.array(overlay(photo(), square(), [(240, 0, 0)]))
    inside = painted[20:60, 20:60].reshape(-1, 3)
    assert (inside == (140, 60, 200)).all()  # no tint: a purple triangle looks purple
    assert painted[5, 110].tolist() == [56, 24, 80]
    assert painted[19, 40, 0] > 200 and painted[19, 40, 1:].max() < 60  # the outline, beside the object


def test_overlay_of_many_masks_and_of_ignored_pixels():
    masks = np.stack([square(stop=40), square(start=50, stop=70)])
    painted = np.array(overlay(photo(), masks.astype(bool)))
    assert (painted[30, 30] == painted[60, 60]).all() and painted[30, 30].tolist() == [140, 60, 200]
    for (row, column), color in zip([(19, 30), (49, 60)], PALETTE):
        assert np.abs(painted[row, column].astype(int) - color).max() < 60
    ignored = np.array(overlay(photo(), square(value=255)))
    assert ignored[40, 40].min() > 150 and ignored[5, 5].tolist() == [140, 60, 200]


@pytest.mark.parametrize("masks", [np.zeros((80, 120), np.uint8), np.zeros((0, 80, 120), bool)])
def test_overlay_of_nothing_is_the_photo(masks):
    assert ImageChops.difference(overlay(photo(), masks), photo()).getbbox() is None


def test_overlay_takes_a_photo_stored_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "photo.jpg", exif=exif)
    assert overlay(Image.open(tmp_path / "photo.jpg"), square().T).size == (80, 120)
    assert overlay(tmp_path / "photo.jpg", square().T).size == overlay(np.asarray(photo()), square()).size[::-1]
    with pytest.raises(ValueError, match=r"\(80, 120\).*\(120, 80\)"):
        overlay(Image.open(tmp_path / "photo.jpg"), square())


@pytest.mark.parametrize("caption", ["a dog", "soirée 日本語 Привет", "word " * 80, "x" * 500, "two\nlines", ""])
def test_panel_holds_any_caption(caption):
    short = panel({"photo": photo()}, "a dog", "IoU 0.50", width=600)
    picture = panel({"photo": photo()}, caption, "IoU 0.50", width=600)
    assert picture.width == 600 and (picture.height > short.height) == (len(caption) > 50)
    assert (np.array(picture)[:, -5:] == 255).all()  # nothing is written past the margin


def test_panel_shows_tall_and_wide_photos_whole():
    tall, wide = panel({"a": photo(20, 900)}, "", ""), panel({"a": photo(900, 20), "b": photo(900, 20)}, "", "")
    assert tall.width == wide.width == 1200 and tall.height < 1200


def test_grid_fills_rows_and_shrinks_to_fewer_pictures():
    assert grid([photo()] * 3, columns=2, cell=60).size == (2 * 60 + 3 * MARGIN, 2 * 40 + 3 * MARGIN)
    assert grid([photo()], columns=4, cell=60).size == (60 + 2 * MARGIN, 40 + 2 * MARGIN)
