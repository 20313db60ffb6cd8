"""Seams: a set, a family or a split is one class and one entry, and everything works on it."""

import importlib.util
import sys

import pytest
from trees import label_map, photo

from self1e.apps import check_data
from self1e.data.families import DEFAULTS, FAMILIES, select
from self1e.data.mixture import Mixture
from self1e.data.splits import SPLITS, SplitEntry, load_split
from self1e.evaluation.segmentation.run import evaluate_splits
from self1e.training.args import parse

MODULE = '''
import numpy as np

from self1e.data.sets.expressions import Expression, ExpressionSet
from self1e.data.sets.semantic import LabelMapSet


class Toys(LabelMapSet):
    """A semantic set: two folders and two names."""

    files = "toys/labels", "toys/photos"

    def read_names(self):
        return ["Bear", "Ball"]


class Frames(ExpressionSet):
    """A set of another kind, also evaluated: its masks are the left half."""

    files = ("frames",)
    redrawn = True

    def open(self, folder):
        self.folder, self.names = folder, sorted(path.name for path in folder.glob("*.jpg"))

    def __len__(self):
        return len(self.names)

    def file_name(self, index):
        return self.names[index]

    def expressions(self, index):
        return [Expression("left half", [0], "")]

    def mask(self, index, target, image):
        mask = np.zeros((image.height, image.width), np.uint8)
        mask[:, : image.width // 2] = 1
        return mask
'''


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """The module above, its two sets, a family and a split registered."""
    (tmp_path / "extension.py").write_text(MODULE)
    spec = importlib.util.spec_from_file_location("extension", tmp_path / "extension.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "extension", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES["sem_seg"], "toys", module.Toys)
    monkeypatch.setitem(FAMILIES, "video_seg", {"frames": module.Frames})
    monkeypatch.setitem(DEFAULTS, "video_seg", "frames")
    monkeypatch.setitem(SPLITS, "frames|val", SplitEntry(reader=module.Frames, default=False))
    return module


@pytest.fixture
def root(tmp_path):
    for number in range(3):
        photo(tmp_path / f"dataset/frames/{number}.jpg", shade=number)
        photo(tmp_path / f"dataset/toys/photos/{number}.jpg", shade=9 * number)
        label_map(tmp_path / f"dataset/toys/labels/{number}.png", [0, 1])
    return tmp_path / "dataset"


def test_a_new_set_and_a_new_family_are_mixed(extension, root):
    flags = {"dataset": "sem_seg||video_seg", "sem_seg_data": "toys", "sample_rates": "1,2"}
    selection = select(dataset_dir=root, data_dir=root, **flags)
    mixture = Mixture(selection, batch_size=2, seed=0)
    assert mixture.sizes == {"toys": 3, "frames": 3} and mixture.epoch_size == 9
    samples = [mixture[slot] for batch in mixture.micro_batches(0, rank=0, world_size=1) for slot in batch]
    assert {sample.id.split("/")[0] for sample in samples} == {"toys", "frames"}
    assert all(sample.masks[0].sum() == 120 for sample in samples)


def test_a_new_family_has_its_flag(extension):
    needed = ["--version", "v", "--exp_name", "e"]
    assert parse(needed).video_seg_data == "frames"
    args = parse([*needed, "--dataset", "video_seg", "--video_seg_data", "frames||frames"])
    ((family, _),) = select(**vars(args))
    assert [type(data) for data in family] == [extension.Frames] * 2


def test_a_new_split_is_evaluated(extension, root, tmp_path, load_tiny, tiny_processor):
    photo, masks = load_split("frames|val", root)[0].load()
    assert masks.shape == (1, photo.height, photo.width)
    results = evaluate_splits(
        load_tiny(), tiny_processor, ["frames|val"], dataset_dir=root, output_dir=tmp_path / "eval", workers=0
    )
    assert results["frames|val"]["n"] == 3 and (tmp_path / "eval/frames_val.json").is_file()


def test_check_data_knows_the_new_ones(extension, root, tmp_path, capsys):
    assert check_data.main([str(root), "--output", str(tmp_path / "sheet.png")]) == 0
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line[:2] == "| "}
    for name in "toys", "frames", "frames val":
        assert rows[name].split("|")[2].strip() == "3", rows
