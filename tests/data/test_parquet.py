"""Parquet sets, written on the spot: the forms of masks, photos and splits, ready entries, faults, an evaluation."""

import io
import json

import numpy as np
import pyarrow
import pytest
import yaml
from helpers import noise
from PIL import Image
from pyarrow import parquet

from self1e.data.samples import SampleError
from self1e.data.sets.parquet import READY, describe, find_files, of_split, read_mask
from self1e.data.splits import get_splits, load_split
from self1e.evaluation.segmentation.report import summary_table
from self1e.evaluation.segmentation.run import evaluate_splits

WIDTH, HEIGHT = 30, 20
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[4:10, 5:25] = True


def png(array) -> bytes:
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def photo(number: int = 0) -> dict:
    return {"bytes": png(noise(WIDTH, HEIGHT, number)), "path": None}


def write(folder, rows, name="data/test-00000-of-00001.parquet", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def runs() -> list[int]:
    """MASK as the runs of an uncompressed RLE, column by column, background first."""
    flat = MASK.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *edges, flat.size]).tolist()


POLYGON = [5.0, 4.0, 25.0, 4.0, 25.0, 10.0, 5.0, 10.0]
PARTS = [MASK & (np.arange(WIDTH) < 15), MASK & (np.arange(WIDTH) >= 12)]  # overlapping


@pytest.mark.parametrize(
    "cell",
    [
        MASK.tolist(),
        (MASK * 255).tolist(),
        png(MASK.astype(np.uint8) * 255),
        {"bytes": png(MASK), "path": "mask.png"},
        {"size": [HEIGHT, WIDTH], "counts": runs()},
        POLYGON,
        [POLYGON],
        [[int(x) for x in POLYGON]],
        [part.tolist() for part in PARTS],
        [png(part) for part in PARTS],
        [{"size": [HEIGHT, WIDTH], "counts": runs()}] * 2,
    ],
)
def test_every_form_of_a_mask_is_the_same_mask(tmp_path, cell):
    assert np.array_equal(read_mask(cell, HEIGHT, WIDTH), MASK)
    write(tmp_path, [{"image": photo(), "text": "the bar", "mask": cell}])
    split = load_split(f"parquet|{tmp_path}|test", "nowhere")
    image, masks = split[0].load()
    assert image.size == (WIDTH, HEIGHT) and masks.dtype == np.uint8 and np.array_equal(masks, MASK[None])


@pytest.mark.parametrize("cell", [None, []])
def test_no_mask_is_an_empty_one(cell):
    assert read_mask(cell, HEIGHT, WIDTH).sum() == 0 and read_mask(cell, HEIGHT, WIDTH).shape == MASK.shape


@pytest.mark.parametrize(
    "cell",
    ["x", [1.0, 2.0], [[True], [True, False]], {"size": [2, 2], "counts": [9]}, {"counts": "1"}, b"no picture",
     [["a"]], [[[True]], [[True, True]]], np.zeros((2, 2, 3))],
)  # fmt: skip
def test_anything_else_is_refused_with_its_row(tmp_path, cell):
    with pytest.raises((ValueError, TypeError, OSError)):
        read_mask(cell, HEIGHT, WIDTH)
    if not isinstance(cell, np.ndarray):
        write(tmp_path, [{"image": photo(), "text": "it", "mask": cell}])
        with pytest.raises(SampleError, match="row 0: malformed mask"):
            load_split(f"parquet|{tmp_path}|test", "nowhere")[0].load()


def test_rows_of_one_photo_are_together_and_columns_have_any_name(tmp_path):
    rows = [
        {"picture": photo(k % 2), "question": text, "target": MASK.tolist(), "image_id": 7 + k % 2, "ann_id": [k, 9]}
        for k, text in enumerate(["Which one rolls?", "a bar", "the Bar"])
    ]
    write(tmp_path, rows[:2], "test/0.parquet", row_group_size=1)
    write(tmp_path, rows[2:], "test/1.parquet")
    write(tmp_path, rows, "train/0.parquet")
    columns = {"image": "picture", "text": "question", "mask": "target", "photo": "image_id", "id": "ann_id"}
    description = tmp_path / "set.yaml"
    description.write_text(json.dumps({"source": str(tmp_path), "columns": columns, "note": "mine"}))
    split = load_split(f"parquet|{description}|test", "nowhere")
    assert [image.image_id for image in split] == ["7", "8"] and split.note == "mine" and len(split.keys()) == 2
    assert split[0].unit_ids == ["7/0_9", "7/2_9"] and split[0].load()[1].shape == (2, HEIGHT, WIDTH)
    assert split[0].prompts == [
        "<image>\n Which one rolls? Please output segmentation mask.",
        "<image>\n What is the Bar in this image? Please output segmentation mask.",
    ]
    description.write_text(json.dumps({"source": str(tmp_path), "columns": columns, "query": "sentence"}))
    assert load_split(f"parquet|{description}|test", "nowhere")[1].is_sentence == [True]


def test_several_texts_of_a_row_are_several_units(tmp_path):
    path = write(tmp_path, [{"image": photo(), "text": ["one", "two"], "mask": MASK.tolist()}], "one.parquet")
    image = load_split(f"parquet|{path}|any", "nowhere")[0]
    assert image.unit_ids == ["0/0", "0/0#1"] and image.load()[1].shape[0] == 2


def test_photos_are_bytes_or_files_beside_and_turned_with_their_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(WIDTH, HEIGHT).save(tmp_path / "turned.jpg", exif=exif)
    write(tmp_path, [{"image": "turned.jpg", "text": "it", "mask": MASK.tolist()}], "test.parquet")
    image, masks = load_split(f"parquet|{tmp_path}|test", "nowhere")[0].load()
    assert image.size == (HEIGHT, WIDTH) and np.array_equal(masks[0], MASK.T[:, ::-1])
    for place in (b"no photo", "../out.jpg", "/etc/out.jpg"):
        write(tmp_path, [{"image": place, "text": "it", "mask": None}], "val.parquet")
        with pytest.raises(SampleError, match=r"parquet\|.*\|val/0"):
            load_split(f"parquet|{tmp_path}|val", "nowhere")[0].load()


def test_files_of_a_split():
    names = ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet", "testA/0.parquet", "README.md"]
    assert of_split(names, "test") == names[:2] and of_split(names, "testA") == names[2:3]
    with pytest.raises(ValueError, match=r"'val': data/test-0.*testA/0.parquet"):
        of_split(names, "val")


@pytest.mark.parametrize("set_name", yaml.safe_load(READY.read_text()))
def test_ready_sets_are_described(set_name):
    entry = describe(set_name)
    assert entry.source.count("/") == 1 and entry.column("image") == "image"
    assert ("union" in entry.note) == set_name.startswith(("muse", "mmr"))
    assert ("ignored" in entry.note) == set_name.startswith(("reasonseg_val", "reasonseg_test"))


@pytest.mark.parametrize(
    "name, words",
    [
        ("parquet|x", "parquet.SOURCE.SPLIT"),
        ("parquet|nothing|test", "neither a path.*muse_val"),
        ("parquet|{folder}/no.yaml|test", "no.yaml"),
        ("parquet|{folder}/bad.yaml|test", "bad.yaml does not describe.*source, columns, query, note"),
        ("parquet|{folder}/deep.yaml|test", "deep.yaml does not describe"),
        ("parquet|{folder}/list.yaml|test", "list.yaml does not describe.*no text"),
        ("parquet|{folder}/odd.yaml|test", "odd.yaml does not describe.*unknown column 'picture'"),
        ("parquet|{folder}|val", "none of its Parquet files is of the split 'val': broken.parquet, test.parquet"),
        ("parquet|{folder}|test", "test.parquet: no column image, text among mask; name them in a YAML"),
        ("parquet|{folder}/broken.parquet|test", "broken.parquet"),
    ],
)
def test_faults_are_named(tmp_path, name, words):
    write(tmp_path, [{"mask": None}], "test.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.yaml").write_text("- a")
    (tmp_path / "deep.yaml").write_text("source: " + "[" * 100_000)
    (tmp_path / "list.yaml").write_text("source: [[a]]")
    (tmp_path / "odd.yaml").write_text("{source: x, columns: {picture: p}}")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_split(name.format(folder=tmp_path), "nowhere")


def test_what_the_hub_does_not_serve_is_named(monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("self1e.data.sets.parquet.HfApi.list_repo_files", refuse)
    with pytest.raises(FileNotFoundError, match="no folder USER/NAME, and the hub did not serve it: no network"):
        find_files("USER/NAME", "test")


def test_a_parquet_split_is_evaluated_with_its_note(tmp_path, tiny_version, tiny_processor, load_tiny):
    rows = [{"image": photo(k), "text": f"thing {k}", "mask": MASK.tolist()} for k in range(3)]
    write(tmp_path, rows, "set/test.parquet", row_group_size=2)
    (tmp_path / "set.yaml").write_text(json.dumps({"source": str(tmp_path / "set"), "note": "masks are bars"}))
    name = f"parquet|{tmp_path / 'set.yaml'}|test"
    assert name in get_splits([name])
    options = {"dataset_dir": "nowhere", "output_dir": tmp_path / "out", "workers": 2}
    figures = evaluate_splits(load_tiny(), tiny_processor, [name], **options)[name]
    assert figures["n"] == 3 and figures["note"] == "masks are bars" and figures["protocol"] == "lisa"
    assert "masks are bars" in summary_table({name: figures})
