"""Own data as COCO-style JSON, CSV or JSONL, for training and evaluation."""

import json
import unicodedata

import numpy as np
import pytest
from custom_trees import AREA, COLUMNS, OTHER, annotation, coco_set, mask, split, table, targets, train, unit_areas
from PIL import Image
from pycocotools import mask as coco
from trees import SQUARE, H, W, photo, write_json

from self1e.data.samples import SampleError
from self1e.errors import UserError
from self1e.model import prompts


def read(data, index=0, seed=0):
    return data.read(index, np.random.default_rng(seed))


# ------------------------------------------------------------------------------------------ COCO style
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
    asked = dict(zip(image.sentences, image.prompts))
    assert asked["The Left one"].startswith("<image>\n What is the left one in this image?")
    assert asked["Which one is square?"].startswith("<image>\n Which one is square? Please")


def test_a_sentence_on_several_masks_of_a_photo_means_all_of_them(tmp_path):
    annotations = [annotation(1), annotation(2, 1, OTHER), annotation(3, 1, OTHER, phrases=["DOG ", "the big one"])]
    images = [(1, "a.jpg"), (2, "b.jpg")]
    first, second = split(coco_set(tmp_path / "json", [*annotations, annotation(4, 2, phrases=["dog"])], images))
    assert unit_areas(first) == {"Dog": AREA + 24, "the big one": 24} and unit_areas(second) == {"dog": AREA}
    photo(tmp_path / "a.jpg")
    for name, columns in ("left", [1, 0]), ("right", [0, 1]):
        mask(tmp_path / f"{name}.png", columns)
    source = table(tmp_path, [("a.jpg", "left.png", "half"), ("a.jpg", "right.png", "HALF")])
    assert unit_areas(split(source)[0]) == {"half": H * W}


def test_training_sample(tmp_path):
    texts = ["one", "two", "Three three.", "four"]
    source = coco_set(tmp_path, [annotation(k, phrases=[text]) for k, text in enumerate(texts)])
    data = train(source, conversations=3)
    sample = read(data)
    assert sample.id == "custom|train.json/a.jpg" and sample.image.size == (W, H)
    assert [m.shape for m in sample.masks] == [(1, H, W)] * 3 and all(m.dtype == np.uint8 for m in sample.masks)
    assert [answer.count("[SEG]") for _, answer in sample.conversations] == [1] * 3
    drawn = {tuple(map(tuple, read(data, seed=seed).conversations)) for seed in range(9)}
    assert len(drawn) > 1 and all(len({question for question, _ in each}) == 3 for each in drawn)
    asked = {question for each in drawn for question, _ in each if "Three" in question}
    assert asked <= {template.format("Three three.") for template in prompts.LONG_QUESTIONS}


def test_lists_of_the_file_in_any_order_and_ids_of_any_kind(tmp_path):
    whole = json.loads(coco_set(tmp_path, [annotation(1, "p", phrases="x"), annotation(2, "p")]).read_text())
    whole["images"][0]["id"] = "p"
    whole["annotations"][1]["category_id"] = 2
    source = write_json(tmp_path / "turned.json", {key: whole[key] for key in ("annotations", "categories", "images")})
    assert unit_areas(split(source)[0]) == {"x": AREA, "cat": AREA}


def test_segmentations_of_every_kind(tmp_path):
    rle = coco.frPyObjects([SQUARE], H, W)[0]
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, coco.decode(rle).ravel("F"), 2])), prepend=0).tolist()
    kinds = {
        "polygons": [SQUARE, OTHER],
        "flat": SQUARE,
        "compressed": {"size": [H, W], "counts": rle["counts"].decode()},
        "runs": {"size": [H, W], "counts": runs},
        "none": [],
        "broken": [[1, 2]],
    }
    annotations = [annotation(k, phrases=name) | {"segmentation": kinds[name]} for k, name in enumerate(kinds)]
    source = coco_set(tmp_path, annotations[:-1])
    assert list(unit_areas(split(source)[0]).values()) == [AREA + 24, AREA, AREA, AREA, 0]
    with pytest.raises(SampleError, match=r"a\.jpg: annotations\[5\]: malformed segmentation"):
        split(coco_set(tmp_path / "broken", annotations))[0].load()


def test_photos_are_turned_with_their_mask_and_of_its_size(tmp_path):
    source = coco_set(tmp_path, [annotation(1, phrases="x")], images=[(1, "deep/a.jpg")])
    photo(tmp_path / "images/deep/a.jpg", orientation=6)
    image, masks = split(source)[0].load()
    assert image.size == (H, W) and masks.shape == (1, W, H) and masks.sum() == AREA
    Image.new("RGB", (40, 24)).save(tmp_path / "images/deep/a.jpg")
    with pytest.raises(SampleError, match=r"annotations\[0\]: the mask's size is 20 x 12, the photo 40 x 24"):
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
    ]
    source = coco_set(tmp_path, annotations, images=[(1, "a.jpg"), (2, "gone.jpg"), (2, "b.jpg")])
    (tmp_path / "images/gone.jpg").unlink()
    with pytest.raises(UserError) as error:
        train(source)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "images[2]", *(f"annotations[{k}]" for k in (0, 1, 2, 3, 4, 6, 5)),
    ]  # fmt: skip
    for words in "id 2 occurs twice", "image_id 5 is not", "it has no segmentation", "bbox", "gone.jpg is neither in":
        assert words in str(error.value)
    with pytest.raises(UserError, match="problems: 8"):
        split(source)


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "has no images or no annotations"),
        ({"images": [], "annotations": []}, "has no images or no annotations"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": "9"}], "annotations": [3]}, "has no h.*width is '9'"),
    ],
)
def test_other_json(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        train(write_json(tmp_path / "x.json", content))


def test_what_contradicts_itself_is_said_at_the_start(tmp_path):
    far = annotation(1, phrases="x") | {"bbox": [0, 0, 2, 2]}
    unit = annotation(2, phrases="y") | {"segmentation": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]}
    problems = "\n".join(train(coco_set(tmp_path, [far, unit])).problems)
    assert "bbox" in problems and "from 0 to 1" in problems and "annotations[0]" in problems


# ------------------------------------------------------------------------------------------ CSV and JSONL
@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_table_of_prompts(tmp_path, name, encoding):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "images/b.jpg")
    mask(tmp_path / "masks/ids.png", [0, 7, 3, 3])
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
    assert unit_areas(second) == {'Is it "thin"?': H} and second.is_sentence == [True]
    assert sorted(targets(read(train(source))).values()) == [column, 2 * column, 3 * column]


@pytest.mark.parametrize("header", ["image, mask, prompt", "Image,Mask,PROMPT", '"image", "mask", "prompt"'])
def test_headers_with_blanks_and_capitals(tmp_path, header):
    photo(tmp_path / "a.jpg")
    mask(tmp_path / "a.png", [1])
    (tmp_path / "t.csv").write_text(f'{header}\na.jpg, a.png, "the red box, left"\n')
    assert unit_areas(split(tmp_path)[0]) == {"the red box, left": H * W}  # the folder's one CSV


def test_names_with_accents_in_either_form(tmp_path):
    name = "Küche-é"
    photo(tmp_path / f"{unicodedata.normalize('NFD', name)}.jpg")
    mask(tmp_path / f"masks/{unicodedata.normalize('NFC', name)}.png", [1])
    for form in "NFC", "NFD":
        written = unicodedata.normalize(form, name)
        assert split(table(tmp_path, [(f"{written}.jpg", f"{written}.png", "it")]))[0].load()[1].sum() == H * W


def test_a_value_that_the_mask_does_not_hold_is_said_once(tmp_path, caplog):
    photo(tmp_path / "a.jpg")
    mask(tmp_path / "m.png", [0, 3])
    rows = [("a.jpg", "m.png", text, 200) for text in ("x", "y")]
    data = train(table(tmp_path, rows, (*COLUMNS, "value")))
    assert set(targets(read(data)).values()) == {0}
    assert [record.getMessage().split("no pixel")[1] for record in caplog.records] == [" of m.png has the value 200"]


def test_one_error_names_every_faulty_line_and_missing_file(tmp_path):
    photo(tmp_path / "a.jpg")
    mask(tmp_path / "m.png", [1])
    rows = [
        ("a.jpg", "m.png", "fine"),
        ("", "m.png", " "),
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
    for line, words in zip(lines, ("empty, prompt", "'-1'", "quote a", "image: gone", "mask: lost", "backslash")):
        assert words in line


def test_a_long_list_of_problems_is_cut_and_files_that_appear_are_found(tmp_path):
    mask(tmp_path / "m.png", [1])
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
        (b"image,prompt\na,b\n", "t.csv", "line 1: no column mask; found image, prompt"),
        (b"image;mask;prompt\na;b;c\n", "t.csv", "found image;mask;prompt; expected image,mask,prompt"),
        ("image,mask,prompt\n".encode("utf-16"), "t.csv", "no UTF-8 CSV"),
        ("image,mask,prompt\na,b,红\n".encode("gbk"), "t.csv", "no UTF-8 CSV"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "t.csv", "Git LFS"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "t.json", "Git LFS"),
        (b"image,mask,prompt\n", "t.csv", "holds no photo with a sentence"),
        (b"{", "t.jsonl", "no UTF-8 JSONL"),
        (b"", "t.txt", "expected a .json"),
    ],
)
def test_other_files(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    for read_source in train, split:
        with pytest.raises(UserError, match=message):
            read_source(tmp_path / name)


def test_broken_files_are_named(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    mask(tmp_path / "m.png", [1])
    Image.new("RGB", (W, H)).save(tmp_path / "colour.png")
    data = train(table(tmp_path, [("cut.jpg", "m.png", "x"), ("a.jpg", "colour.png", "x")]))
    with pytest.raises(SampleError, match="cannot read .*cut.jpg"):
        read(data)
    with pytest.raises(SampleError, match="colour.png has 3 channels; a mask or label map has one"):
        read(data, 1)
