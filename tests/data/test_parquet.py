"""Parquet sets, written on the spot: forms of masks and photos, rows of one photo, faults, an evaluation."""

import io

import datasets
import numpy as np
import pyarrow
import pytest
from helpers import noise
from PIL import Image
from pyarrow import parquet

from self1e.data.splits import load_split
from self1e.errors import UserError
from self1e.evaluation.segmentation.run import evaluate_splits

WIDTH, HEIGHT = 30, 20
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[4:10, 5:25] = True


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(picture) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def photo(number: int = 0) -> dict:
    return {"bytes": png(noise(WIDTH, HEIGHT, number)), "path": None}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["rows", "integers", "bytes", "the hub's"])
def test_every_form_of_a_mask_is_the_same_mask(tmp_path, kind):
    cells = MASK.tolist(), (MASK * 255).tolist(), png(MASK.astype(np.uint8) * 255), {"bytes": png(MASK), "path": "m"}
    cell = dict(zip(["rows", "integers", "bytes", "the hub's"], cells))[kind]
    write(tmp_path / "data/test-00000-of-00001.parquet", [{"image": photo(), "text": "the bar", "mask": cell}])
    image, masks = load_split(f"parquet|{tmp_path}/data|test", "nowhere")[0].load()
    assert image.size == (WIDTH, HEIGHT) and masks.dtype == np.uint8 and np.array_equal(masks, MASK[None])


@pytest.mark.parametrize("cell", ["x", [[True], [True, False]], [[True]], b"no picture"])
def test_anything_else_is_refused(tmp_path, cell):
    write(tmp_path / "test.parquet", [{"image": photo(), "text": "it", "mask": cell}])
    with pytest.raises(UserError, match="row 0: "):
        load_split(f"parquet|{tmp_path}/test.parquet|test", "nowhere")[0].load()


def test_rows_of_one_photo_are_together(tmp_path):
    rows = [
        {"image": photo(k % 2), "text": text, "mask": MASK.tolist(), "image_id": 7 + k % 2, "ann_id": k, "size": 3}
        for k, text in enumerate([["Which one rolls?", "it"], ["a bar"], ["the Bar"]])
    ]
    write(tmp_path / "set/test/0.parquet", rows[:2])
    write(tmp_path / "set/test/1.parquet", rows[2:])
    write(tmp_path / "set/train/0.parquet", rows)
    split = load_split(f"parquet|{tmp_path}/set|test", "nowhere")
    assert [image.image_id for image in split] == ["7", "8"] and len(split.image_keys()) == 2
    assert split[0].unit_ids == ["7/0", "7/0#1", "7/2"] and split[0].load()[1].shape == (3, HEIGHT, WIDTH)
    assert [each.is_sentence for each in split[0].expressions] == [True, False, False]


def test_photos_are_turned_with_their_mask(tmp_path):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    noise(WIDTH, HEIGHT).save(buffer, "JPEG", exif=exif)
    write(tmp_path / "set/test.parquet", [{"image": buffer.getvalue(), "text": "it", "mask": MASK.tolist()}])
    image, masks = load_split(f"parquet|{tmp_path}/set|test", "nowhere")[0].load()
    assert image.size == (HEIGHT, WIDTH) and np.array_equal(masks[0], MASK.T[:, ::-1])


@pytest.mark.parametrize(
    "name, words",
    [
        ("parquet|x", "parquet.SOURCE.SPLIT"),
        ("parquet|{folder}/set|val", "split 'val'.*set"),
        ("parquet|{folder}/set|test", "no column 'image', 'text'; known: mask"),
        ("parquet|{folder}/broken.parquet|test", "broken.parquet"),
        ("parquet|USER/NAME|test", "USER/NAME"),
    ],
)
def test_faults_are_named(tmp_path, name, words):
    write(tmp_path / "set/test.parquet", [{"mask": None}])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=words):
        load_split(name.format(folder=tmp_path), "nowhere")


def test_a_set_is_evaluated(tmp_path, tiny_processor, load_tiny):
    rows = [{"image": photo(k), "text": f"thing {k}", "mask": MASK.tolist()} for k in range(3)]
    write(tmp_path / "set/test.parquet", rows)
    name = f"parquet|{tmp_path}/set|test"
    options = {"dataset_dir": "nowhere", "output_dir": tmp_path / "out", "workers": 2}
    figures = evaluate_splits(load_tiny(), tiny_processor, [name], **options)[name]
    assert figures["n"] == 3 and figures["protocol"] == "lisa"
