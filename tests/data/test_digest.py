"""The digest of a training set: the same for a copy anywhere, another one for other data of the same size."""

import shutil
from pathlib import Path

import pytest
from custom_trees import table

from self1e.data.families import FAMILIES, DataConfig
from self1e.data.loader import build_mixture
from self1e.synthetic.shapes_dataset import make_shapes_dataset


def digests(root: Path) -> dict[str, str]:
    """Of every set that `make_shapes_dataset` writes, and of own data beside them."""
    names = {family: "||".join(FAMILIES[family].sets) for family in ("sem_seg", "refer_seg", "vqa")}
    config = DataConfig.parse(
        dataset_dir=root / "dataset",
        data_dir=root / "data",
        dataset="||".join(FAMILIES),
        sem_seg_data=names["sem_seg"],
        refer_seg_data=names["refer_seg"],
        vqa_data=names["vqa"],
        explanatory=0.5,
        custom_data=f"{root / 'own'}||{root / 'more'}",
    )
    return build_mixture(config, batch_size=1, seed=0).describe()["data"]


def make(root: Path, seed: int) -> Path:
    make_shapes_dataset(root, train=4, val=2, size=48, seed=seed)
    maps = root / "dataset/ade20k"
    for folder in "own", "more":
        (root / folder).mkdir()
        for kind, source in (("photo.jpg", "images/training/*.jpg"), ("mask.png", "annotations/training/*.png")):
            shutil.copy(sorted(maps.glob(source))[0], root / folder / kind)
        table(root / folder, [("photo.jpg", "mask.png", f"a thing of {folder}")])
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("trees") / "one", seed=0)


def test_a_copy_is_the_same_and_other_data_of_the_same_size_are_not(tree, tmp_path):
    one = digests(tree)
    assert set(one) >= {"ade20k", "paco_lvis", "grefcoco", "ReasonSeg", "llava_instruct_150k", "gqa"}
    labels = [name for name in one if name.startswith("custom|")]
    assert len(labels) == 2 and not any(str(tree) in label for label in labels)
    copy = tmp_path / "elsewhere"
    shutil.copytree(tree, copy, copy_function=shutil.copyfile)  # with new times
    assert digests(copy) == one
    other = digests(make(tmp_path / "other", seed=1))
    assert other.keys() == one.keys() and not set(other.values()) & set(one.values())


CHANGES = {
    "cocostuff": ("dataset/cocostuff/train2017/*.png", b"another label map"),
    "refcoco": ("dataset/refer_seg/images/mscoco/images/train2014/*.jpg", b"another photo"),
    "ReasonSeg": ("dataset/reason_seg/ReasonSeg/train/*.json", b"{}"),
    "custom|train.csv #1": ("more/mask.png", b"another mask"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_beside_the_annotations_count(tree, tmp_path, name):
    root = tmp_path / "changed"
    shutil.copytree(tree, root)
    before = digests(root)
    pattern, content = CHANGES[name]
    sorted(root.glob(pattern))[0].write_bytes(content)
    after = digests(root)
    assert after[name] != before[name]


def test_a_missing_photo_is_no_error_yet(tree, tmp_path):
    """It is a broken sample's, which training names and replaces."""
    root = tmp_path / "changed"
    shutil.copytree(tree, root)
    for photo in (root / "dataset/refer_seg/images/mscoco/images/train2014").glob("*.jpg"):
        photo.unlink()
    assert digests(root)["refcoco"] != digests(tree)["refcoco"]
