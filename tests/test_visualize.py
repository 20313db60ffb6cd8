"""Pictures are checked by their pixels and sizes; how they look is for the eye."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageChops

from self1e import visualize
from self1e.visualize import FONTS, PALETTE, compare, enlarge, grid, overlay, panel, safe_name, save_worst_first


def photo(width=120, height=80, color=(40, 40, 40)):
    return Image.new("RGB", (width, height), color)


def square(height=80, width=120, start=20, stop=60, value=1):
    mask = np.zeros((height, width), np.uint8)
    mask[start:stop, start:stop] = value
    return mask


def test_overlay_mixes_inside_and_leaves_the_rest():
    painted = np.array(overlay(photo(), square(), [(240, 0, 0)], alpha=0.25))
    assert painted[40, 40].tolist() == [90, 30, 30]  # 0.75 * 40 + 0.25 * colour
    assert painted[5, 5].tolist() == painted[75, 110].tolist() == [40, 40, 40]
    assert painted[20, 40, 0] > 200 and painted[20, 40, 1:].max() < 80  # the outline, antialiased


def test_overlay_takes_many_masks_bool_and_ignored_pixels():
    masks = np.stack([square(stop=40), square(start=50, stop=70)])
    painted = np.array(overlay(photo(), masks.astype(bool), alpha=1.0))
    assert (tuple(painted[30, 30]), tuple(painted[60, 60])) == PALETTE[:2]
    ignored = np.array(overlay(photo(), square(value=255), alpha=1.0))
    assert len(set(ignored[40, 40].tolist()[:2])) == 1 and ignored[40, 40, 0] > 100  # grey, not a colour


def test_overlay_of_nothing_is_the_photo():
    empty = np.zeros((80, 120), np.uint8)
    assert ImageChops.difference(overlay(photo(), empty), photo()).getbbox() is None
    assert ImageChops.difference(overlay(photo(), np.zeros((0, 80, 120), bool)), photo()).getbbox() is None


def test_a_small_photo_is_enlarged_so_that_outlines_leave_its_masks_to_be_seen():
    mask = square(start=20, stop=28)  # the white of an outline is three pixels wide, where both sides need six
    small, large = (np.array(overlay(photo(), mask, [(240, 0, 0)], alpha=1, enlarged=it)) for it in (False, True))
    assert (small.shape, large.shape) == ((80, 120, 3), (320, 480, 3))
    filled = [(picture == (240, 0, 0)).all(axis=2).mean() for picture in (small, large)]
    assert filled[0] < 0.5 * filled[1] < mask.mean() < 1.5 * filled[1]
    assert enlarge(photo(4, 2)).size == (448, 224) and enlarge(photo(448, 200)).size == (448, 200)


def test_overlay_refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"\(120, 80\).*\(80, 120\)"):
        overlay(photo(), square().T)


@pytest.mark.parametrize("caption", ["a dog", "soirée 日本語 Привет", "word " * 80, "x" * 500, "two\nlines", ""])
def test_panel_holds_any_caption(caption):
    short = panel({"photo": photo()}, "a dog", "IoU 0.50", width=600)
    picture = panel({"photo": photo()}, caption, "IoU 0.50", width=600)
    assert picture.width == 600
    assert picture.height >= short.height
    assert (picture.height > short.height) == (len(caption) > 50)
    margin = np.array(picture)[:, -5:]  # nothing is written past the margin
    assert (margin == 255).all()


@pytest.mark.parametrize("fonts, boxes", [(FONTS, False), (("DejaVuSans.ttf",), True), ((), True)])
def test_every_script_is_drawn_or_its_boxes_are_explained(monkeypatch, fonts, boxes):
    """With a font for it, Japanese is drawn; without, a line says what the boxes are; Latin needs no such line."""
    monkeypatch.setattr(visualize, "FONTS", fonts)
    monkeypatch.setattr(visualize, "_font_of", lambda letter, size: [])  # fontconfig is asked in a test of its own
    visualize._fonts.cache_clear()
    if fonts == FONTS and not any(visualize._holds(font, "日") for font in visualize._fonts(20)):
        boxes = True  # no font for it on this machine
    panels = {text: panel({"photo": photo()}, text, width=600) for text in ("a dog", "日本語")}
    visualize._fonts.cache_clear()
    assert (panels["日本語"].height > panels["a dog"].height) == boxes


def test_letters_that_a_font_lacks_are_known():
    font = visualize._fonts(20)[-1]  # Pillow's own
    assert visualize._holds(font, "a") and not visualize._holds(font, "日")


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="fontconfig is not installed")
def test_fontconfig_is_asked_for_letters_that_no_listed_font_holds(monkeypatch, tmp_path):
    """An installed font of any name draws its script: here one that holds a single letter of Thai."""
    letter = "\N{THAI CHARACTER KO KAI}"
    pen = TTGlyphPen(None)
    for point, place in enumerate([(50, 0), (50, 700), (300, 350)]):
        (pen.lineTo if point else pen.moveTo)(place)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "thai"])
    font.setupCharacterMap({ord(letter): "thai"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "thai": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (500, 0), "thai": (400, 50)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "One letter", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    (tmp_path / "fonts").mkdir()
    font.save(tmp_path / "fonts/one.ttf")
    configuration = f"<fontconfig><dir>{tmp_path}/fonts</dir><cachedir>{tmp_path}</cachedir></fontconfig>"
    (tmp_path / "fonts.conf").write_text(configuration)
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    visualize._font_of.cache_clear()
    found, whole = visualize._font(20, letter * 3)
    assert whole and Path(found.path).name == "one.ttf"
    assert visualize._font(20, "\N{DEVANAGARI LETTER A}")[1] is False
    monkeypatch.setenv("PATH", str(tmp_path))  # without fontconfig
    visualize._font_of.cache_clear()
    assert visualize._font(20, letter)[1] is False


def test_panel_shows_tall_and_wide_photos_whole():
    tall, wide = panel({"a": photo(20, 900)}), panel({"a": photo(900, 20), "b": photo(900, 20)})
    assert tall.width == wide.width == 1200
    assert tall.height < 1200


def test_compare_says_when_there_is_nothing():
    nothing = np.zeros((80, 120), np.uint8)
    full, empty = compare(photo(), square(), square(), "a", 1.0), compare(photo(), nothing, nothing, "a", 1.0)
    assert full.size == empty.size
    assert ImageChops.difference(full, empty).getbbox() is not None
    assert any(g > 1.2 * r and g > 1.2 * b for _, (r, g, b) in full.getcolors(2**24))  # the green of the ground truth
    assert not any(g > 1.2 * r and g > 1.2 * b for _, (r, g, b) in empty.getcolors(2**24))


def test_grid_fills_rows_and_shrinks_to_fewer_pictures():
    assert grid([photo()] * 3, columns=2, cell=60, margin=0).size == (120, 80)  # cells of 60 x 40
    assert grid([photo()], columns=4, cell=60, margin=0).size == (60, 40)


def test_safe_names():
    assert safe_name("refcoco|unc|val/a é:*?.jpg") == "refcoco_unc_val_a"
    assert safe_name("../..") == "unnamed"
    assert len(safe_name("x" * 500)) == 80


def test_worst_come_first_and_old_pictures_go(tmp_path):
    (tmp_path / "0007_iou0.10_old.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    drawn = []

    def draw(index):
        drawn.append(index)
        return photo()

    overview = save_worst_first(tmp_path, [0.5, 0.0, 1.0, 0.25], ["a", "b|b", "c", "d"], draw, most=3, worst=1, best=1)
    files = sorted(path.name for path in tmp_path.glob("*.jpg"))
    assert files == ["0001_iou0.00_b_b.jpg", "0002_iou0.25_d.jpg", "0003_iou0.50_a.jpg"]
    assert drawn == [1, 3, 0, 1, 2]
    assert (tmp_path / "notes.txt").exists()
    with Image.open(overview) as sheet:
        assert sheet.width > 1800  # two columns
