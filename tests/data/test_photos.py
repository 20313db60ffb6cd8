"""self1e/model/photos.py and the photos of samples.py: whatever users call a photo."""

import logging
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from self1e.data.samples import image_key
from self1e.errors import UserError
from self1e.model.photos import orientation, photo_of


def grey(path, values, dtype):
    array = np.zeros((4, 5), dtype)
    array[:, : len(values)] = values
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        ([0, 256, 32768, 65535], np.uint16, [0, 1, 128, 255]),
        ([0, 16, 2048, 4095], np.uint16, [0, 1, 128, 255]),  # 12 bits
        ([0, 256, 65535], np.int32, [0, 1, 255]),
        ([0, 128, 255], np.int32, [0, 128, 255]),
    ],
)
def test_deep_greys_are_scaled(tmp_path, values, dtype, expected):
    image = photo_of(grey(tmp_path / "deep.tif", values, dtype))
    assert image.mode == "RGB" and np.asarray(image)[0, : len(expected), 0].tolist() == expected


@pytest.mark.parametrize("values, dtype", [([0, 0.5, 1], np.float32), ([0, 70_000], np.int32), ([-1, 9], np.int32)])
def test_deeper_greys_are_refused_by_name(tmp_path, values, dtype):
    path = grey(tmp_path / "deep.tif", values, dtype)
    with pytest.raises(UserError, match="deep.tif: .*16 bits"):
        photo_of(path)
    with pytest.raises(UserError), Image.open(path) as image:
        photo_of(image)


def test_palettes_with_transparency_become_rgb_without_a_warning(tmp_path):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=b"\0\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert photo_of(tmp_path / "p.png").getpixel((0, 0)) == (200, 100, 50)


def test_metadata_is_read_for_the_orientation_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "a.jpg", "a.png", "a.tif":
        Image.new("RGB", (5, 4)).save(tmp_path / name, exif=exif)
        image = photo_of(tmp_path / name)
        assert image.size == photo_of(image).size == photo_of(Image.open(tmp_path / name)).size == (4, 5)
        assert image.info == {"orientation": 6}
    Image.new("RGB", (5, 4)).save(tmp_path / "b.jpg", exif=b"Exif\0\0" + b"no TIFF header at all")
    assert photo_of(tmp_path / "b.jpg").size == (5, 4)

    class Torn(Image.Image):
        def getexif(self):
            raise ZeroDivisionError

    assert orientation(Torn()) == 1


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 48), (0, 255, 0))).save(tmp_path / "a.heic")
    image = photo_of(tmp_path / "a.heic")
    assert image.size == (64, 48) and np.asarray(image)[9, 9, 1] > 200


def test_broken_photos_are_named(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:800])
    Image.fromarray(noise).save(tmp_path / "flipped.png")
    flipped = bytearray((tmp_path / "flipped.png").read_bytes())
    flipped[60] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(flipped)
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n")
    causes = {"pointer.jpg": "Git LFS", "absent.jpg": "No such file", "eps.jpg": "no picture"}
    with caplog.at_level(logging.WARNING):
        for name in "cut.jpg", "flipped.png", "text.jpg", *causes:
            with pytest.raises(UserError, match=rf"{name}.*{causes.get(name, '')}"):
                photo_of(tmp_path / name)


def test_whatever_a_decoder_raises_makes_the_photo_unreadable(tmp_path, monkeypatch):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")

    def torn(*_):
        raise AttributeError("a fault of the decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", torn)
    with pytest.raises(UserError, match="a.png: a fault of the decoder"):
        photo_of(tmp_path / "a.png")


def test_a_fault_of_our_own_is_no_fault_of_the_photo(tmp_path, monkeypatch):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("self1e.model.photos.UPRIGHT", None)
    monkeypatch.setattr("self1e.model.photos.orientation", lambda image: 6)
    with pytest.raises(TypeError, match="subscriptable"):
        photo_of(tmp_path / "a.png")


def test_one_photo_has_one_key_under_all_its_names():
    names = "000000000042.jpg", "COCO_train2014_000000000042.jpg", "data/vqav2/val2014/COCO_val2014_000000000042.jpg"
    assert {image_key(name) for name in names} == {42}
    others = image_key("10/images/450.jpg"), image_key("36/images/450.jpg"), image_key("VizWiz_train_00000003.jpg")
    assert len(set(others)) == 3 and max(others) < 0
