"""Own data as COCO-style JSON, CSV or JSONL, for training and evaluation, as a family and as splits."""

import json

import numpy as np
import pytest
from custom_trees import (
    AREA,
    COLUMNS,
    OTHER,
    annotation,
    coco_set,
    sentences,
    split,
    table,
    targets,
    train,
    unit_areas,
)
from PIL import Image
from trees import SQUARE, H, W, label_map, photo, questions, write_json

from self1e.data.families import select
from self1e.data.mixture import Mixture
from self1e.data.samples import require_paths
from self1e.data.splits import DEFAULT_SPLITS, get_splits, load_split
from self1e.errors import UserError
from self1e.evaluation.results import file_stem


def read(data, index=0, seed=0):
    return data.sample(index, np.random.default_rng(seed))


def test_captions_phrases_and_category_names(tmp_path):
    source = coco_set(
        tmp_path,
        [
            annotation(1, captions=[" The Left one ", "Which one is square?"]),
            annotation(2, 1, OTHER, phrase="it", captions="that"),
            annotation(3, 1, OTHER, category_id=2),
            annotation(4, 1, SQUARE, phrases=[]),
        ],
    )
    (image,) = split(source)
    assert unit_areas(image) == {
        "The Left one": AREA, "Which one is square?": AREA, "that": 24, "it": 24, "cat": 24, "Dog": AREA,
    }  # fmt: skip
    assert image.image_id == "a.jpg" and len(set(image.unit_ids)) == 6
    asked = dict(zip(sentences(image), image.prompts))
    assert asked["The Left one"].startswith("<image>\n What is the left one in this image?")
    assert asked["Which one is square?"].startswith("<image>\n Which one is square? Please")


def test_a_sentence_on_several_masks_of_a_photo_means_all_of_them(tmp_path):
    annotations = [annotation(1), annotation(2, 1, OTHER), annotation(3, 1, OTHER, phrases=["DOG ", "the big one"])]
    images = [(1, "a.jpg"), (2, "b.jpg")]
    first, second = split(coco_set(tmp_path / "json", [*annotations, annotation(4, 2, phrases=["dog"])], images))
    assert unit_areas(first) == {"Dog": AREA + 24, "the big one": 24} and unit_areas(second) == {"dog": AREA}
    photo(tmp_path / "a.jpg")
    for name, columns in ("left", [1, 0]), ("right", [0, 1]):
        label_map(tmp_path / f"{name}.png", columns)
    source = table(tmp_path, [("a.jpg", "left.png", "half"), ("a.jpg", "right.png", "HALF")])
    assert unit_areas(split(source)[0]) == {"half": H * W}


def test_lists_of_the_file_in_any_order_and_ids_of_any_kind(tmp_path):
    whole = json.loads(coco_set(tmp_path, [annotation(1, "p", phrases="x"), annotation(2, "p")]).read_text())
    whole["images"][0]["id"] = "p"
    whole["annotations"][1]["category_id"] = 2
    source = write_json(tmp_path / "turned.json", {key: whole[key] for key in ("annotations", "categories", "images")})
    assert unit_areas(split(source)[0]) == {"x": AREA, "cat": AREA}


def test_photos_are_turned_with_their_mask_and_of_its_size(tmp_path):
    source = coco_set(tmp_path, [annotation(1, phrases="x")], images=[(1, "deep/a.jpg")])
    photo(tmp_path / "images/deep/a.jpg", orientation=6)
    image, masks = split(source)[0].load()
    assert image.size == (H, W) and masks.shape == (1, W, H) and masks.sum() == AREA
    Image.new("RGB", (40, 24)).save(tmp_path / "images/deep/a.jpg")
    with pytest.raises(UserError, match=r"annotations\[0\]: the mask's size is 20 x 12, the photo 40 x 24"):
        read(train(source))


def test_one_error_names_every_faulty_record(tmp_path):
    annotations = [
        annotation(1, 5, phrases="x"),
        annotation(2, phrases=["fine", " "]),
        annotation(3, phrases=7),
        annotation(4, category_id=9),
        {"id": 6, "image_id": 1, "phrases": "no mask"},
        annotation(7, 2, phrases="x"),
        annotation(8, phrases="a box") | {"segmentation": [], "bbox": [2, 3, 6, 6], "area": 36},
        annotation(9, phrases="sound"),
        annotation(10, category_id=[9]),
    ]
    source = coco_set(tmp_path, annotations, images=[(1, "a.jpg"), (2, "gone.jpg"), (2, "b.jpg")])
    (tmp_path / "images/gone.jpg").unlink()
    with pytest.raises(UserError) as error:
        train(source)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "images", *(f"annotations[{k}]" for k in (0, 1, 2, 3, 4, 6, 8, 5)),
    ]  # fmt: skip
    for words in "id 2 occurs twice", "image_id 5 is not", "it has no segmentation", "bbox", "gone.jpg is neither in":
        assert words in str(error.value)
    with pytest.raises(UserError, match="problems: 9"):
        split(source)


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table_of_prompts(tmp_path, name, encoding):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "images/b.jpg")
    label_map(tmp_path / "masks/ids.png", [0, 7, 3, 3])
    Image.fromarray(np.eye(H, W, dtype=bool)).save(tmp_path / "one-bit.png")
    rows = [
        ("a.jpg", "ids.png", "Red, big", "7", "x"),
        ("b.jpg", "one-bit.png", 'Is it "thin"?', "", ""),
        ("a.jpg", "masks/ids.png", "anything", "", ""),
        ("a.jpg", "ids.png", " three ", 3.0, ""),
    ]
    source = table(tmp_path, rows, (*COLUMNS, "value", "remark"), name, encoding=encoding)
    first, second = split(source)
    column = H * W // 4
    assert unit_areas(first) == {"Red, big": column, "anything": 3 * column, "three": 2 * column}
    assert unit_areas(second) == {'Is it "thin"?': H} and second.expressions[0].is_sentence
    assert sorted(targets(read(train(source))).values()) == [column, 2 * column, 3 * column]


@pytest.mark.parametrize("header", ["image, mask, prompt", "Image,Mask,PROMPT", '"image", "mask", "prompt"'])
def test_headers_with_blanks_and_capitals(tmp_path, header):
    photo(tmp_path / "a.jpg")
    label_map(tmp_path / "a.png", [1])
    (tmp_path / "t.csv").write_text(f'{header}\na.jpg, a.png, "the red box, left"\n')
    assert unit_areas(split(tmp_path)[0]) == {"the red box, left": H * W}  # the folder's one CSV
    names = (name.replace('"', "") for name in header.split(","))
    (tmp_path / "t.jsonl").write_text(json.dumps(dict(zip(names, ("a.jpg", "a.png", "it")))))
    assert unit_areas(split(tmp_path / "t.jsonl")[0]) == {"it": H * W}


def test_a_value_that_the_mask_does_not_hold_is_said_once(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    label_map(tmp_path / "m.png", [0, 3])
    rows = [("a.jpg", "m.png", text, 200) for text in ("x", "y")]
    data = train(table(tmp_path, rows, (*COLUMNS, "value")))
    assert set(targets(read(data)).values()) == {0}
    assert [record.getMessage().split("no pixel")[1] for record in caplog.records] == [" of m.png has the value 200"]


def test_one_error_names_every_faulty_line_and_missing_file(tmp_path):
    photo(tmp_path / "a.jpg")
    label_map(tmp_path / "m.png", [1])
    rows = [
        ("a.jpg", "m.png", "fine"),
        ("", "m.png", " \u200b"),
        ("a.jpg", "m.png", "red", "-1"),
        ("a.jpg", "m.png", "the red", "2", " big one"),
        ("gone.jpg", "lost.png", "x"),
        ("gone.jpg", "m.png", "y"),
        ("a\\b.jpg", "m.png", "y"),
    ]
    source = table(tmp_path, rows, (*COLUMNS, "value"))
    with pytest.raises(UserError) as error:
        train(source)
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"line {k}" for k in (3, 4, 5, 6, 6, 8)]
    for line, words in zip(lines, ("empty, prompt", "'-1'", "quote a", "gone.jpg", "lost.png", "backslash")):
        assert words in line


def test_a_long_list_of_problems_is_cut_and_files_that_appear_are_found(tmp_path):
    label_map(tmp_path / "m.png", [1])
    source = table(tmp_path, [(f"{k}.jpg", "m.png", "it") for k in range(80)])
    with pytest.raises(UserError, match="problems: 80") as error:
        train(source)
    assert len(str(error.value).splitlines()) == 52 and str(error.value).endswith("and 30 more")
    for k in range(80):
        photo(tmp_path / f"{k}.jpg")
    assert len(train(source)) == 80


@pytest.mark.parametrize(
    "content, name, message",
    [
        (
            b"image,prompt\na,b\n",
            "t.csv",
            "line 1 should be image,mask,prompt and holds no 'mask'; known: image, prompt",
        ),
        (b"image;mask;prompt\na;b;c\n", "t.csv", "line 1 should be image,mask,prompt.*known: image;mask;prompt"),
        ("image,mask,prompt\n".encode("utf-16"), "t.csv", "no UTF-8 CSV"),
        ("image,mask,prompt\na,b,红\n".encode("gbk"), "t.csv", "no UTF-8 CSV"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "t.csv", "Git LFS"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "t.json", "Git LFS"),
        (b"image,mask,prompt\n", "t.csv", "no photo has a sentence"),
        (b"{", "t.jsonl", "no UTF-8 JSONL"),
        (b'{"image": "a", "mask": "b", "prompt": ["c", "d"]}', "t.jsonl", "line 1: not one value for each column"),
        (b"", "t.txt", "expected a .json"),
        (b'{"images": [], "annotations": []}', "t.json", "no photo has a sentence"),
    ],
)
def test_other_files(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    for read_source in train, split:
        with pytest.raises(UserError, match=message):
            read_source(tmp_path / name)


def build(*, batch_size=1, mode="published", **flags):
    return Mixture(select(**flags), batch_size=batch_size, seed=0, mode=mode)


def small(root, count):
    for k in range(count):
        photo(root / f"{k}.jpg")
        label_map(root / f"{k}.png", [0, 1])
    return table(root, [(f"{k}.jpg", f"{k}.png", "it") for k in range(count)])


def test_a_family_of_several_sources_mixed_by_rate(tmp_path):
    sources = [small(tmp_path / "a", 3), small(tmp_path / "b", 2)]
    questions(tmp_path / "data", "vqav2/vqav2_train.jsonl", 4)
    arguments = {"dataset_dir": tmp_path, "data_dir": tmp_path / "data", "batch_size": 4, "vqa_data": "vqav2"}
    arguments["custom_data"] = "||".join(map(str, sources))
    mixture = build(dataset="vqa||custom", sample_rates="1,2.2", mode="exact", **arguments)
    assert mixture.sizes == {"vqav2": 4, "custom|train.csv": 3 + 2}
    assert mixture.epoch_size == 4 + 11
    batches = mixture.micro_batches(0, rank=0, world_size=1)
    assert all(any(mixture.sets[slot[1]].data.segmentation for slot in batch) for batch in batches)
    alone = build(dataset="custom", **arguments)
    slots = [slot for batch in alone.micro_batches(0, rank=0, world_size=1) for slot in batch]
    assert {alone[slot].id.rsplit("/", 1)[1] for slot in slots} <= {f"{k}.jpg" for k in range(3)}


def test_selection_errors_name_flags_and_files(tmp_path):
    arguments = {"dataset_dir": tmp_path, "data_dir": tmp_path, "dataset": "custom"}
    with pytest.raises(UserError, match="--dataset custom needs --custom_data"):
        build(**arguments)
    with pytest.raises(UserError, match=r"gone\.csv   \(custom.*\n.*lost   \(custom"):
        ((sets, _),) = select(custom_data=f"{tmp_path / 'gone.csv'}||{tmp_path / 'lost'}", **arguments)
        require_paths(sets)
    with pytest.raises(UserError, match="or a folder with one .csv"):
        build(custom_data=str(tmp_path), **arguments)
    for name in "a.csv", "b.csv":
        table(tmp_path, [], name=name)
    with pytest.raises(UserError, match="or a folder with one .csv"):
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
