"""The maker of synthetic trees: real formats, exact masks, unambiguous words, seeded."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import files, read_json, splits_of
from PIL import Image
from pycocotools import mask as coco_mask

from self1e.data.families import FAMILIES
from self1e.data.splits import load_split
from self1e.errors import UserError
from self1e.evaluation.vqa.base import Answer
from self1e.evaluation.vqa.run import VQA_BENCHMARKS
from self1e.synthetic.annotations import annotation_id
from self1e.synthetic.scenes import CATEGORY, COLOURS, draw_scene
from self1e.synthetic.semantic import ADE20K, COCOSTUFF
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.synthetic.words import RIDDLES, phrases

UNITS = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p", "refclef": "refs(unc).p"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=3, size=96)


def refer(tree: Path, name: str) -> tuple[list, dict]:
    folder = tree / "dataset/refer_seg" / name
    path = folder / UNITS.get(name, "grefs(unc).json")
    # Safe here: this test wrote the file. Data code reads such files without running anything.
    refs = pickle.loads(path.read_bytes()) if path.suffix == ".p" else read_json(path)
    return refs, read_json(folder / "instances.json")


def decode(segmentation, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation)


def test_instances_decode_to_the_drawn_shapes(tree):
    _, instances = refer(tree, "refcoco")
    annotations = {entry["id"]: entry for entry in instances["annotations"]}
    formats = set()
    for image in instances["images"]:
        scene = draw_scene(image["id"], seed=0, size=96)
        assert (scene.height, scene.width) == (image["height"], image["width"])
        covered = np.zeros((scene.height, scene.width), int)
        for shape in scene.shapes:
            entry = annotations[annotation_id(scene, shape)]
            mask = decode(entry["segmentation"], scene.height, scene.width)
            assert np.array_equal(mask, shape.mask) and mask.sum() == entry["area"] > 0
            assert entry["category_id"] == CATEGORY[shape.kind]
            covered += mask
            kind = entry["segmentation"]
            formats.add(len(kind) if isinstance(kind, list) else type(kind["counts"]).__name__)
        assert covered.max() == 1  # annotations are what is visible
    assert formats == {1, 2, "str", "list"}


def test_masks_are_where_the_colour_is(tree):
    _, instances = refer(tree, "refcoco")
    errors = []
    for image in instances["images"]:
        scene = draw_scene(image["id"], seed=0, size=96)
        photo = np.asarray(Image.open(tree / "dataset/refer_seg/images/mscoco/images/train2014" / image["file_name"]))
        for shape in scene.shapes:
            inner = cv2.erode(shape.mask, np.ones((5, 5), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
            if inner.any():
                errors.append(np.abs(photo[inner].mean(0) - COLOURS[shape.colour]).max())
    assert len(errors) > 20
    # Colour jitter 12, shading 12% of 240 and chroma subsampling of thin shapes; any other colour is further away.
    assert max(errors) < 60


def test_held_out_photos_are_in_no_training_set(tree):
    photos = {path.read_bytes() for path in tree.glob("dataset/refer_seg/images/mscoco/**/*.jpg")}
    split_of = {}
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        for ref in refer(tree, name)[0]:
            kind = "train" if ref["split"] == "train" else "held out"
            assert split_of.setdefault(ref["image_id"], kind) == kind
    assert sorted(split_of.values()) == ["held out"] * 9 + ["train"] * 8 and len(photos) == 17
    training = {draw_scene(i, seed=0, size=96).jpeg for i, kind in split_of.items() if kind == "train"}
    for pattern in (
        "dataset/coco/**/*.jpg",
        "dataset/ade20k/**/*.jpg",
        "dataset/**/train/*.jpg",
        "data/*/train2014/*",
    ):
        found = {path.read_bytes() for path in tree.glob(pattern)}
        assert found and found <= training, pattern


def test_references_are_unambiguous(tree):
    for name in UNITS:
        refs, instances = refer(tree, name)
        annotations = {entry["id"] for entry in instances["annotations"]}
        spoken = {}
        for ref in refs:
            assert ref["ann_id"] in annotations
            assert ref["sent_ids"] == [entry["sent_id"] for entry in ref["sentences"]]
            for entry in ref["sentences"]:
                assert entry["tokens"] == entry["sent"].split() and entry["sent"] == entry["raw"].lower().rstrip(".")
                assert spoken.setdefault((ref["image_id"], entry["sent"]), ref["ann_id"]) == ref["ann_id"]
        sentence_ids = [i for ref in refs for i in ref["sent_ids"]]
        assert len(set(sentence_ids)) == len(sentence_ids)


def test_expressions_hold_for_one_shape_only():
    for scene_id in range(1, 40):
        scene = draw_scene(scene_id, seed=3, size=96)
        meant = {}
        for shape in scene.shapes:
            for text in sum(phrases(scene, shape), []):
                assert meant.setdefault(text, shape) is shape, (scene_id, text)


def test_grefcoco_has_one_many_and_no_targets(tree):
    refs, _ = refer(tree, "grefcoco")
    none = [ref for ref in refs if ref["no_target"]]
    assert none and all(ref["ann_id"] == [-1] and ref["category_id"] == [-1] for ref in none)
    assert {min(len(ref["ann_id"]), 2) for ref in refs if not ref["no_target"]} == {1, 2}
    for ref in none:
        scene = draw_scene(ref["image_id"], seed=0, size=96)
        assert ref["sentences"][0]["sent"] not in {shape.name for shape in scene.shapes}


def test_semantic_labels(tree):
    root = tree / "dataset"
    maps = sorted((root / "ade20k/annotations/training").glob("*.png"))
    assert len(maps) == len(list((root / "ade20k/images/training").glob("*.jpg"))) == 2
    for path in maps:
        scene = draw_scene(int(path.stem.split("_")[-1]), seed=0, size=96)
        labels = np.asarray(Image.open(path))
        assert labels.dtype == np.uint8 and labels.shape == (scene.height, scene.width)
        assert set(np.unique(labels)) <= {0, 1} | {ADE20K[shape.kind] + 1 for shape in scene.shapes}
        stuff = np.asarray(Image.open(root / f"cocostuff/train2017/{scene.id:012d}.png"))
        assert (root / f"coco/train2017/{scene.id:012d}.jpg").is_file()
        for shape in scene.shapes:
            inner = (shape.mask > 0) & (labels != 0)
            assert set(np.unique(labels[inner])) == {ADE20K[shape.kind] + 1}
            assert set(np.unique(stuff[inner])) == {COCOSTUFF[shape.colour]}
    paints = read_json(root / "mapillary/config_v2.0.json")["labels"]
    for path in (root / "mapillary/training/v2.0/labels").glob("*.png"):
        assert np.asarray(Image.open(path)).max() < len(paints)


def test_reasonseg_polygons_paint_the_shapes(tree):
    root = tree / "dataset/reason_seg/ReasonSeg"
    for split in ("train", "val", "test"):
        records = sorted((root / split).glob("*.json"))
        assert records
        for path in records:
            record = read_json(path)
            scene = draw_scene(int(path.stem.split("_")[0]), seed=0, size=96)
            assert path.with_suffix(".jpg").is_file() and len(record["text"]) == 1
            painted = np.zeros((scene.height, scene.width), np.uint8)
            for entry in record["shapes"]:
                if entry["label"] == "target":
                    cv2.fillPoly(painted, [np.array(entry["points"], np.int32)], 1)
            (kind,) = [kind for kind, riddle in RIDDLES.items() if record["text"][0] in riddle]
            drawn = np.any([shape.mask for shape in scene.shapes if shape.kind == kind], axis=0)
            # Integer points and cv2's inclusive outline move the edge by a pixel, of shapes some 20 pixels wide.
            assert (painted & drawn).sum() / (painted | drawn).sum() > 0.6
    for entry in read_json(root / "explanatory/train.json"):
        assert (root / "train" / entry["image"]).is_file()
        assert read_json(root / "train" / entry["json"])["text"] == [entry["query"]]


def test_every_training_set_and_split_reads_the_tree(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path))
    dataset, photos = tree / "dataset", tree / "data"
    for family in FAMILIES.values():
        for own, training_set in family.items():
            data = training_set(own, dataset, photos, explanatory=0.5)
            if not data.paths()[0].exists():  # a set of the reader's own
                continue
            data.opened()
            for i in range(len(data)):
                sample = data.sample(i, np.random.default_rng(i))
                for row, masks in zip(sample.conversations, sample.masks, strict=True):
                    assert len(masks) == sum(text.count("[SEG]") for text in row), sample.id
                    assert not data.segmentation or masks.shape[1:] == sample.image.size[::-1]
    for name in splits_of(dataset):
        split = load_split(name, dataset)
        assert len(split) >= 2
        for image in split:
            photo, masks = image.load()
            assert masks.shape == (len(image.expressions), *photo.size[::-1])
            assert [not (mask == 1).any() for mask in masks] == [each.no_target for each in image.expressions]
    read = []
    for name, benchmark in VQA_BENCHMARKS.items():
        try:
            questions = benchmark.questions(photos)
        except (UserError, FileNotFoundError):  # a benchmark of the reader's own
            continue
        read.append(name)
        assert questions and all(question.open_image().size for question in questions), name
        if benchmark.metric:
            # Half of the yes/no questions are answered so; a wrong pairing of files would raise.
            assert benchmark.metric([Answer(question, "yes") for question in questions], photos).summary
    assert len(read) >= 11, read


def test_dataset_is_seeded(tmp_path, tree):
    again = make_shapes_dataset(tmp_path / "again", train=8, val=3, size=96)
    assert files(again) == files(tree)
    with pytest.raises(UserError, match="not empty"):  # its held-out photos would become training photos
        make_shapes_dataset(again, train=9, val=2, size=96)
    assert draw_scene(1, seed=1, size=96).jpeg != draw_scene(1, seed=0, size=96).jpeg
