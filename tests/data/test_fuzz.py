"""Mutated annotations and pictures: every input is read as it says or refused by one message that names it.

Each test draws a few dozen inputs, the same in every run; `python scripts/fuzz.py --inputs 10000` draws more. An input
takes a whole file, in which a value is replaced, removed or doubled, or a byte is cut or flipped, and reads it as
training and evaluation do. Allowed are ValueError, OSError and SampleError with the name of the file, set or photo.
"""

import csv
import io
import json
import pickle
import resource
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import changes, damage, fuzz, no_hang, refused_by_name, to_json, to_pickle
from pycocotools import mask as coco
from trees import (
    SQUARE,
    H,
    W,
    instances,
    label_map,
    photo,
    questions,
    reasoning_photo,
    reference,
    referring_set,
    write_json,
)

from self1e.data.families import FAMILIES
from self1e.data.masks import decode_segmentation, paint_shapes
from self1e.data.splits import load_split


@pytest.fixture(autouse=True)
def bounded():
    """No input may take all memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 1_500, f"{grown:.0f} MB"


# ------------------------------------------------------------------------------------------------ segmentations
numbers = st.one_of(
    st.integers(-9, 40), st.floats(-30, 60), st.sampled_from([1e5, -1e5, 1e300, float("nan"), True, None, "3", [1]])
)


@fuzz
@given(st.lists(st.lists(numbers, max_size=12), max_size=4))
def test_polygons(parts):
    sound = [part for part in parts if len(part) >= 6 and len(part) % 2 == 0]
    with no_hang():
        try:
            mask = decode_segmentation(parts, H, W)
        except ValueError:
            return
    expected = np.zeros((H, W), np.uint8)
    for part in sound:
        expected |= coco.decode(coco.frPyObjects([[float(number) for number in part]], H, W))[..., 0]
    assert (mask == expected).all()


def decode_runs(counts):
    """The mask of compressed runs, number by number, as the format's description says; None when it is unsound."""
    runs, place = [], 0
    while place < len(counts):
        value = shift = 0
        while True:
            if place == len(counts):
                return None
            digit = counts[place] - 48
            if not 0 <= digit < 64:
                return None
            place, value, shift = place + 1, value | (digit & 31) << shift, shift + 5
            if not digit & 32:
                break
        value -= (1 << shift) if digit & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    if not runs or min(runs) < 0 or sum(runs) != H * W:
        return None
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(W, H).T


@fuzz
@given(st.lists(st.integers(0, 80), min_size=1, max_size=8), st.integers(0, 40), st.integers(0, 255), st.booleans())
def test_compressed_runs(runs, place, byte, cut):
    runs = np.cumsum([0, *runs])
    runs = np.diff(np.append(runs[runs < H * W], H * W)).tolist()
    raw = bytearray(coco.frPyObjects({"size": [H, W], "counts": runs}, H, W)["counts"])
    if place < len(raw):
        raw = raw[:place] if cut else raw[:place] + bytes([byte]) + raw[place + 1 :]
    expected = decode_runs(raw)
    try:
        mask = decode_segmentation({"size": [H, W], "counts": bytes(raw)}, H, W)
    except ValueError:
        assert expected is None
    else:
        assert (mask == expected).all()


@fuzz
@given(st.lists(st.one_of(st.integers(-5, 300), st.sampled_from([1 << 70, 0.5, True, None, "3"])), max_size=6))
def test_uncompressed_runs(runs):
    try:
        mask = decode_segmentation({"size": [H, W], "counts": runs}, H, W)
    except ValueError:
        return
    assert (mask == np.repeat(np.arange(len(runs)) % 2, runs).reshape(W, H).T).all()


@fuzz
@given(st.lists(st.lists(st.lists(numbers, max_size=3), max_size=5), max_size=3), st.sampled_from(["x", "ignore", 3]))
def test_shapes(polygons, label):
    with no_hang():
        try:
            mask = paint_shapes([{"label": label, "points": points} for points in polygons], H, W)
        except ValueError:
            return
    assert set(np.unique(mask)) <= {0, 255 if label == "ignore" else 1}


# ------------------------------------------------------------------------------------------------ files
def read_set(family, name, **options):
    def read(root):
        data = FAMILIES[family].sets[name](root, root / "data", rows=9, **options)
        data.keys()
        for index in range(len(data)):
            with refused_by_name(name):
                sample = data.sample(index, np.random.default_rng(0))
                for row, masks in zip(sample.conversations, sample.masks, strict=True):
                    assert sum(text.count("[SEG]") for text in row) == len(masks)
                    assert masks.dtype == np.uint8 and masks.max(initial=0) <= 1

    return read


def read_split(name):
    def read(root):
        split = load_split(name.format(root=root), root)
        split.keys()
        for index in range(len(split)):
            with refused_by_name(split.name.split("|")[0], ".jpg"):
                unit = split[index]
                image, masks = unit.load()
                assert len(masks) == len(unit.sentences) and set(np.unique(masks)) <= {0, 1, 255}

    return read


def own_source(root, name):
    """Own data that is refused is not read; what is accepted is."""
    FAMILIES["custom"].choose("--custom_data", str(root / name))[0].open(root, root, rows=9)
    read_split(f"custom|{{root}}/{name}")(root)


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
RLE = {"size": [H, W], "counts": coco.frPyObjects({"size": [H, W], "counts": [5, 30, 205]}, H, W)["counts"].decode()}
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "segmentation": [SQUARE, [1, 2]]},
    {"id": 2, "image_id": 7, "segmentation": RLE},
    {"id": 3, "image_id": 8, "segmentation": {"size": [H, W], "counts": [5, 30, 205]}},
]
REFS = [reference(1, 7, 1, "train", "a Cat"), reference(2, 8, 3, "train", "x", "y"), reference(3, 7, 2, "val", "z")]
GREFS = [reference(1, 7, [1, 2], "train", "cats"), reference(2, 8, [-1], "val", "none")]
PACO_FILE = "vlpart/paco/annotations/paco_lvis_v1_train.json"
REASON = "reason_seg/ReasonSeg"
ROWS = [
    ["image", "mask", "prompt", "value"],
    ["coco/train2017/a.jpg", "m.png", "it", "1"],
    ["x.jpg", "m.png", "Why?", ""],
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tree with every kind of file, sound."""
    root = tmp_path_factory.mktemp("sound")
    referring_set(root, "refcoco", REFS, ANNOTATIONS)
    referring_set(root, "grefcoco", GREFS, ANNOTATIONS)
    for name in "a", f"{7:012d}", f"{8:012d}":
        photo(root / f"coco/train2017/{name}.jpg")
    paco = instances([(7, f"train2017/{7:012d}.jpg"), (8, f"train2017/{8:012d}.jpg")], ANNOTATIONS, ["mug_(x):Handle"])
    write_json(root / PACO_FILE, paco)
    for split in "train", "val":
        reasoning_photo(root, split, "a", ["Which one?"], is_sentence=True)
    write_json(root / REASON / "explanatory/train.json", [{"image": "a.jpg", "query": "q", "outputs": "because"}])
    conversation = {"id": "1", "image": "a.jpg", "conversations": TURNS}
    write_json(root / "llava_dataset/llava_instruct_150k.json", [conversation, conversation])
    questions(root / "data", "gqa/train_balanced.jsonl", 2)
    for name in "a", "b":
        photo(root / f"ade20k/images/training/{name}.jpg")
        label_map(root / f"ade20k/annotations/training/{name}.png", [0, 1])
    label_map(root / "m.png", [0, 1])
    photo(root / "x.jpg")
    own = instances(
        [(7, "x.jpg"), (8, "coco/train2017/a.jpg")], [a | {"phrases": ["it", "Why?"]} for a in ANNOTATIONS]
    )
    write_json(root / "own.json", own)
    return root


def read_mutated(base, file: str, raw: bytes, *readers) -> None:
    """Put `raw` in the place of a file of the tree, read it with an empty cache, and put the file back."""
    path = base / file
    sound = path.read_bytes() if path.exists() else None
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch, no_hang():
        patch.setenv("SELF1E_CACHE", cache)
        path.write_bytes(raw)
        try:
            for read in readers:
                with refused_by_name(path.name):
                    read(base)
        finally:
            path.unlink() if sound is None else path.write_bytes(sound)


REFCOCO = [read_set("refer_seg", "refcoco"), read_split("refcoco|unc|val")]
GREFCOCO = [read_set("refer_seg", "grefcoco"), read_split("grefcoco|unc|val")]
EXPLAINED = [read_set("reason_seg", "ReasonSeg", explanatory=0.5)]
FILES = {
    "instances": ("refer_seg/refcoco/instances.json", to_json, REFCOCO),
    "refs": ("refer_seg/refcoco/refs(unc).p", to_pickle, REFCOCO),
    "grefs": ("refer_seg/grefcoco/grefs(unc).json", to_json, GREFCOCO),
    "paco": (PACO_FILE, to_json, [read_set("sem_seg", "paco_lvis")]),
    "reasoning": (f"{REASON}/train/a.json", to_json, [read_set("reason_seg", "ReasonSeg")]),
    "unit": (f"{REASON}/val/a.json", to_json, [read_split("ReasonSeg|val")]),
    "explanations": (f"{REASON}/explanatory/train.json", to_json, EXPLAINED),
    "llava": ("llava_dataset/llava_instruct_150k.json", to_json, [read_set("vqa", "llava_instruct_150k")]),
    "own": ("own.json", to_json, [lambda root: own_source(root, "own.json")]),
}  # fmt: skip


def value_of(base, name):
    path = base / FILES[name][0]
    return pickle.loads(path.read_bytes()) if path.suffix == ".p" else json.loads(path.read_bytes())


@pytest.mark.parametrize("name", FILES)
def test_the_sound_tree_is_read(base, name, monkeypatch, tmp_path):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path))
    for read in FILES[name][2]:
        read(base)


@fuzz
@given(st.data())
def test_values_of_referring_files(base, data):
    name = data.draw(st.sampled_from(["instances", "refs", "grefs"]))
    file, dump, readers = FILES[name]
    read_mutated(base, file, dump(data.draw(changes(value_of(base, name)))), *readers)


@fuzz
@given(st.data())
def test_values_of_part_annotations(base, data):
    file, dump, readers = FILES["paco"]
    read_mutated(base, file, dump(data.draw(changes(value_of(base, "paco")))), *readers)


@fuzz
@given(st.data())
def test_values_of_reasoning_files(base, data):
    name = data.draw(st.sampled_from(["reasoning", "unit", "explanations"]))
    file, dump, readers = FILES[name]
    read_mutated(base, file, dump(data.draw(changes(value_of(base, name)))), *readers)


@fuzz
@given(st.data())
def test_values_of_conversations(base, data):
    file, dump, readers = FILES["llava"]
    read_mutated(base, file, dump(data.draw(changes(value_of(base, "llava")))), *readers)


@fuzz
@given(st.data())
def test_values_of_questions(base, data):
    file = "data/gqa/train_balanced.jsonl"
    lines = [json.loads(line) for line in (base / file).read_text().splitlines()]
    raw = b"\n".join(map(to_json, data.draw(changes(lines))))
    read_mutated(base, file, raw, read_set("vqa", "gqa"))


@fuzz
@given(st.data())
def test_values_of_own_json(base, data):
    file, dump, readers = FILES["own"]
    read_mutated(base, file, dump(data.draw(changes(value_of(base, "own")))), *readers)


@fuzz
@given(st.data())
def test_cells_of_own_csv(base, data):
    rows = data.draw(changes(ROWS))
    text = io.StringIO()
    rows = [row for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    csv.writer(text, escapechar="\\").writerows(rows)
    read_mutated(
        base, "own.csv", text.getvalue().encode("utf-8", "surrogatepass"), lambda root: own_source(root, "own.csv")
    )


@fuzz
@given(st.data())
def test_bytes_of_annotation_files(base, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    file, _, readers = FILES[name]
    read_mutated(base, file, data.draw(damage((base / file).read_bytes())), *readers)


@fuzz
@given(st.data())
def test_bytes_of_pickles(base, data):
    file, _, readers = FILES["refs"]
    read_mutated(base, file, data.draw(damage(data.draw(damage((base / file).read_bytes())))), *readers)


@fuzz
@given(st.data())
def test_bytes_of_pictures(base, data):
    file = data.draw(st.sampled_from(["ade20k/images/training/a.jpg", "ade20k/annotations/training/a.png", "m.png"]))
    readers = read_set("sem_seg", "ade20k"), lambda root: own_source(root, "own2.csv")
    (base / "own2.csv").write_text("image,mask,prompt\nx.jpg,m.png,it\n")
    read_mutated(base, file, data.draw(damage((base / file).read_bytes())), *readers)
