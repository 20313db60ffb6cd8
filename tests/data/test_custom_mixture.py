"""Own data as a family of the mixture and as evaluation splits: flags, names, exclusion."""

import pytest
from custom_trees import annotation, coco_set, mask, split, table
from trees import photo, questions

from self1e.data.families import DataConfig
from self1e.data.loader import build_mixture
from self1e.data.mixture import unpack
from self1e.data.splits import DEFAULT_SPLITS, file_stem, get_splits, load_split
from self1e.errors import UserError


def build(*, batch_size=1, mode="published", **flags):
    return build_mixture(DataConfig.parse(**flags), batch_size=batch_size, seed=0, mode=mode)


def small(root, count):
    for k in range(count):
        photo(root / f"{k}.jpg")
        mask(root / f"{k}.png", [0, 1])
    return table(root, [(f"{k}.jpg", f"{k}.png", "it") for k in range(count)])


def test_a_family_of_several_sources_mixed_by_rate(tmp_path):
    sources = [small(tmp_path / "a", 3), small(tmp_path / "b", 2)]
    questions(tmp_path / "data", "vqav2/vqav2_train.jsonl", 4)
    arguments = {"dataset_dir": tmp_path, "data_dir": tmp_path / "data", "batch_size": 4, "vqa_data": "vqav2"}
    arguments["custom_data"] = "||".join(map(str, sources))
    mixture = build(dataset="vqa||custom", sample_rates="1,2.2", mode="exact", **arguments)
    assert mixture.sizes == {"vqav2": 4, "custom|train.csv": 3, "custom|train.csv #1": 2}
    assert mixture.epoch_size == 4 + 11 and mixture.segmentation == [False, True, True]
    batches = mixture.micro_batches(0, rank=0, world_size=1)
    assert all(any(mixture.segmentation[unpack(place)[1]] for place in batch) for batch in batches)
    alone = build(dataset="custom", **arguments)
    places = [place for batch in alone.micro_batches(0, rank=0, world_size=1) for place in batch]
    assert {alone[place].id.rsplit("/", 1)[1] for place in places} <= {f"{k}.jpg" for k in range(3)}


def test_selection_errors_name_flags_and_files(tmp_path):
    arguments = {"dataset_dir": tmp_path, "data_dir": tmp_path, "dataset": "custom"}
    with pytest.raises(UserError, match="--dataset custom needs --custom_data"):
        build(**arguments)
    with pytest.raises(UserError, match=r"gone\.csv   \(custom.*\n.*lost   \(custom"):
        build(custom_data=f"{tmp_path / 'gone.csv'}||{tmp_path / 'lost'}", **arguments)
    with pytest.raises(UserError, match="should hold one .csv, found none"):
        build(custom_data=str(tmp_path), **arguments)
    for name in "a.csv", "b.csv":
        table(tmp_path, [], name=name)
    with pytest.raises(UserError, match="found a.csv, b.csv"):
        load_split(f"custom|{tmp_path}", tmp_path)


def test_exclude_val_knows_coco_photos_by_number_and_others_by_place(tmp_path):
    for folder in "a", "b":
        coco_set(tmp_path / folder, [annotation(1, 1), annotation(2, 2)], images=[(1, "x.jpg"), (2, f"{7:012d}.jpg")])
    (ax, a7), (bx, b7) = (split(tmp_path / folder / "train.json").image_keys() for folder in "ab")
    assert a7 == b7 == 7 and ax != bx


def test_splits_of_own_data():
    names = ["custom|own/val.csv", "refcoco|unc|val", "custom|/data/own/val.json"]
    entries = get_splits(names)
    assert list(entries) == names and entries[names[0]].protocol == "lisa"
    assert not entries[names[0]].published and not set(names[::2]) & set(DEFAULT_SPLITS)
    assert file_stem(names[1]) == "refcoco_unc_val" and file_stem(names[0]).startswith("custom_own_val_csv_")
    assert len({file_stem(f"custom|{path}") for path in ("own/val.csv", "own_val.csv", "own/val_csv", "x" * 300)}) == 4
    assert len(file_stem("custom|" + "x" * 300)) < 100
