"""self1e/data/sets/custom.py: own data as COCO-style JSON or CSV, for training and evaluation."""

import json

import numpy as np
import pytest
from custom_trees import AREA, OTHER, annotation, coco_set, mask, split, table, targets, train, unit_areas
from PIL import Image
from pycocotools import mask as coco
from trees import SQUARE, H, W, photo, write_json

from self1e.data.paths import require_paths
from self1e.data.samples import SampleError
from self1e.data.sets.custom import CustomData
from self1e.errors import UserError
from self1e.model import inference, prompts


# ------------------------------------------------------------------------------------------ COCO style
def test_captions_phrases_and_category_names(tmp_path):
    source = coco_set(
        tmp_path,
        [
            annotation(1, captions=[" The Left one ", "Which one is square?"]),
            annotation(2, 1, OTHER, phrases="it", captions="that"),
            annotation(3, 1, OTHER, category_id=2),
            annotation(4, 1, SQUARE, phrases=[]),
        ],
    )
    (image,) = split(source)
    assert unit_areas(image) == {
        "The Left one": AREA,
        "Which one is square?": AREA,
        "that": 24,
        "it": 24,
        "cat": 24,
        "Dog": AREA,
    }
    assert image.image_id == "a.jpg" and len(set(image.unit_ids)) == 6
    asked = dict(zip(image.sentences, image.prompts))
    assert asked["The Left one"].startswith("<image>\n What is the left one in this image?")
    assert asked["Which one is square?"].startswith("<image>\n Which one is square? Please")


def test_alike_sentences_of_a_photo_mean_all_their_annotations(tmp_path):
    source = coco_set(
        tmp_path,
        [
            annotation(1),
            annotation(2, 1, OTHER),
            annotation(3, 1, OTHER, phrases=["DOG ", "the big one"]),
            annotation(4, 2, phrases=["dog"]),
        ],
        images=[(1, "a.jpg"), (2, "b.jpg")],
    )
    first, second = split(source)
    assert unit_areas(first) == {"Dog": AREA + 24, "the big one": 24} and unit_areas(second) == {"dog": AREA}


def test_training_sample(tmp_path):
    texts = ["one", "two", "Three three.", "four"]
    source = coco_set(tmp_path, [annotation(k, phrases=[text]) for k, text in enumerate(texts)])
    data = train(source, conversations=3)
    sample = data.read(0, np.random.default_rng(0))
    assert sample.id == f"custom|{source}/a.jpg" and sample.image.size == (W, H)
    assert [m.shape for m in sample.masks] == [(1, H, W)] * 3 and all(m.dtype == np.uint8 for m in sample.masks)
    assert [answer.count("[SEG]") for _, answer in sample.conversations] == [1] * 3
    drawn = {tuple(map(tuple, data.read(0, np.random.default_rng(seed)).conversations)) for seed in range(9)}
    assert len(drawn) > 1 and all(len({question for question, _ in rows}) == 3 for rows in drawn)
    assert data.read(0, np.random.default_rng(0)).conversations == sample.conversations
    questions_ = {q for rows in drawn for q, _ in rows if "Three" in q}
    assert questions_ <= {template.format("Three three.") for template in prompts.LONG_QUESTIONS}


def test_what_a_sentence_is_agrees_with_segment():
    for text in ("the ball", "Which one?", "Look at it. ", "哪一个？", "no. 7", ""):
        assert prompts.looks_like_sentence(text) == inference.looks_like_sentence(text)


def test_parts_of_the_file_in_any_order_and_ids_of_any_kind(tmp_path):
    whole = json.loads(coco_set(tmp_path, [annotation(1, "p", phrases="x"), annotation(2, "p")]).read_text())
    whole["images"][0]["id"] = "p"
    del whole["categories"][0]
    whole["annotations"][1]["category_id"] = 2
    source = write_json(tmp_path / "turned.json", {key: whole[key] for key in ("annotations", "categories", "images")})
    assert unit_areas(split(source)[0]) == {"x": AREA, "cat": AREA}


def test_segmentations_of_every_kind(tmp_path):
    rle = coco.frPyObjects([SQUARE], H, W)[0]
    text = {"size": [H, W], "counts": rle["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, coco.decode(rle).ravel("F"), 2])), prepend=0).tolist()
    source = coco_set(
        tmp_path,
        [
            annotation(1, phrases="polygons") | {"segmentation": [SQUARE, OTHER]},
            annotation(2, phrases="compressed") | {"segmentation": text},
            annotation(3, phrases="runs") | {"segmentation": {"size": [H, W], "counts": runs}},
            annotation(4, phrases="none") | {"segmentation": []},
            annotation(5, phrases="broken") | {"segmentation": [[1, 2]]},
        ],
    )
    data = CustomData(source)
    expressions = data.expressions(0)
    _, masks = data.load(0, [each.targets for each in expressions[:4]])
    assert masks.sum((1, 2)).tolist() == [AREA + 24, AREA, AREA, 0]
    with pytest.raises(SampleError, match=r"a\.jpg: annotations\[4\]: malformed segmentation"):
        data.load(0, [expressions[4].targets])


def test_photos_beside_the_file_or_in_images(tmp_path):
    beside = coco_set(tmp_path / "a", [annotation(1)], below="")
    inside = coco_set(tmp_path / "b", [annotation(1)], images=[(1, "deep/a.jpg")])
    assert split(beside)[0].load()[0].size == split(inside)[0].load()[0].size == (W, H)


def test_a_turned_photo_takes_its_mask_along(tmp_path):
    source = coco_set(tmp_path, [annotation(1, phrases="x")])
    photo(tmp_path / "images/a.jpg", orientation=6)
    image, masks = split(source)[0].load()
    assert image.size == (H, W) and masks.shape == (1, W, H) and masks.sum() == AREA


def test_a_mask_of_another_size_is_broken(tmp_path):
    source = coco_set(tmp_path, [annotation(1, phrases="x")])
    Image.new("RGB", (40, 24)).save(tmp_path / "images/a.jpg")
    with pytest.raises(SampleError, match=r"annotations\[0\]: the mask's size is 20 x 12, the photo 40 x 24"):
        train(source).read(0, np.random.default_rng(0))


def test_one_error_names_every_faulty_record(tmp_path):
    source = coco_set(
        tmp_path,
        [
            annotation(1, 5, phrases="x"),
            annotation(2, phrases=["fine", " "]),
            annotation(3, phrases=7),
            annotation(4, category_id=9),
            annotation(4, phrases="twice"),
            {"id": 6, "image_id": 1, "phrases": "no mask"},
            annotation(7, 2, phrases="x"),
            annotation(8, 3, phrases="x"),
            annotation(9, phrases="sound"),
        ],
        images=[(1, "a.jpg"), (2, "gone.jpg"), (2, "b.jpg"), (3, "a.jpg")],
    )
    (tmp_path / "images/gone.jpg").unlink()
    with pytest.raises(UserError) as error:
        train(source)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        f"{source}, 10 problems (docs/data.md, section Own data):",
        "images[2]: id 2 occurs twice",
        "images[3]: file_name 'a.jpg' occurs twice",
        "annotations[1]: phrases holds an empty sentence",
        "annotations[2]: phrases is 7, neither a string nor a list of strings",
        "annotations[4]: id 4 occurs twice",
        "annotations[5]: it has no segmentation",
        "annotations[0]: image_id 5 is not among the images",
        "annotations[3]: neither captions nor phrases, and category 9 has no name",
        "annotations[7]: image_id 3 is not among the images",
        f"images[1]: image gone.jpg is neither in {tmp_path} nor in {tmp_path / 'images'}",
    ]
    with pytest.raises(UserError, match="problems"):
        split(source)


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "has no images and no annotations"),
        ({"images": []}, "has no images and no annotations"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [3]},
            r"images\[0\]: it has no height, it has no w",
        ),
        ({"images": [5], "annotations": [3]}, r"annotations\[0\]: 3 is no object"),
    ],
)
def test_other_json(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        train(write_json(tmp_path / "x.json", content))


# ------------------------------------------------------------------------------------------ CSV
def test_table_of_prompts(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "images/b.jpg")
    mask(tmp_path / "masks/ids.png", [0, 7, 3, 3])
    Image.fromarray(np.eye(H, W, dtype=bool)).save(tmp_path / "one-bit.png")
    table(
        tmp_path,
        [
            ("a.jpg", "ids.png", "Red, big", "7", "x"),
            ("b.jpg", "one-bit.png", 'Is it "thin"?', "", ""),
            ("a.jpg", "masks/ids.png", "anything", "", ""),
            ("a.jpg", "ids.png", " three ", 3, ""),
            ("a.jpg", "ids.png", "absent", 200, ""),
        ],
        header=("image", "mask", "prompt", "value", "remark"),
    )
    first, second = split(tmp_path)  # the folder's one CSV
    column = H * W // 4
    assert unit_areas(first) == {"Red, big": column, "anything": 3 * column, "three": 2 * column, "absent": 0}
    assert unit_areas(second) == {'Is it "thin"?': H} and second.is_sentence == [True]
    sample = train(tmp_path).read(0, np.random.default_rng(0))
    assert sorted(targets(sample).values()) == [0, column, 2 * column, 3 * column]


def test_alike_rows_are_a_union(tmp_path):
    photo(tmp_path / "a.jpg")
    for name, columns in ("left", [1, 0]), ("right", [0, 1]):
        mask(tmp_path / f"{name}.png", columns)
    source = table(tmp_path, [("a.jpg", "left.png", "half"), ("a.jpg", "right.png", "HALF")])
    assert unit_areas(split(source)[0]) == {"half": H * W}


def test_one_error_names_every_faulty_line_and_missing_file(tmp_path):
    photo(tmp_path / "a.jpg")
    mask(tmp_path / "m.png", [1])
    source = table(
        tmp_path,
        [
            ("a.jpg", "m.png", "fine"),
            ("", "m.png", " "),
            ("a.jpg", "m.png", "red", "-1"),
            ("a.jpg", "m.png", "the red", "2", " big one"),
            ("gone.jpg", "lost.png", "x"),
            ("gone.jpg", "m.png", "y"),
        ],
        header=("image", "mask", "prompt", "value"),
    )
    with pytest.raises(UserError) as error:
        train(source)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        f"{source}, 6 problems (docs/data.md, section Own data):",
        "line 3: image is empty",
        "line 3: prompt is empty",
        "line 4: value '-1' is no whole number of a pixel",
        "line 5: more cells than the header's 4; quote a prompt that holds a comma",
        f"line 6: image gone.jpg is neither in {tmp_path} nor in {tmp_path / 'images'}",
        f"line 6: mask lost.png is neither in {tmp_path} nor in {tmp_path / 'masks'}",
    ]


def test_a_file_that_appears_later_is_found(tmp_path):
    mask(tmp_path / "m.png", [1])
    source = table(tmp_path, [("a.jpg", "m.png", "it")])
    with pytest.raises(UserError, match="line 2: image a.jpg is neither"):
        train(source)
    photo(tmp_path / "a.jpg")
    assert len(train(source)) == 1


def test_a_long_list_of_problems_is_cut(tmp_path):
    source = table(tmp_path, [(f"{k}.jpg", "m.png", "it") for k in range(80)])
    with pytest.raises(UserError, match="81 problems") as error:
        train(source)
    assert len(str(error.value).splitlines()) == 52 and str(error.value).endswith("and 31 more")


@pytest.mark.parametrize(
    "header, delimiter, encoding, message",
    [
        (("image", "prompt"), ",", "utf-8", "line 1: no column mask; found image, prompt"),
        (
            ("image", "mask", "prompt"),
            ";",
            "utf-8",
            "no column image, mask, prompt; found image;mask;prompt; expected",
        ),
        (("image", "mask", "prompt"), ",", "utf-16", "no UTF-8 CSV"),
    ],
)
def test_other_tables(tmp_path, header, delimiter, encoding, message):
    source = table(tmp_path, [("a", "b", "c")], header=header, delimiter=delimiter, encoding=encoding)
    with pytest.raises(UserError, match=message):
        train(source)


def test_an_empty_table(tmp_path):
    with pytest.raises(UserError, match="no training samples"):
        train(table(tmp_path, []))
    with pytest.raises(UserError, match="no sentence to evaluate"):
        split(table(tmp_path, []))


def test_broken_files_are_named(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    mask(tmp_path / "m.png", [1])
    Image.new("RGB", (W, H)).save(tmp_path / "colour.png")
    data = train(table(tmp_path, [("cut.jpg", "m.png", "x"), ("a.jpg", "colour.png", "x")]))
    with pytest.raises(SampleError, match="cannot read .*cut.jpg"):
        data.read(0, np.random.default_rng(0))
    with pytest.raises(SampleError, match="colour.png has 3 channels; a mask or label map has one"):
        data.read(1, np.random.default_rng(0))


def test_a_mistyped_file_is_guessed(tmp_path):
    table(tmp_path, [])
    absent = [tmp_path / name for name in ("trian.csv", "photos.json", "no/train.csv")]
    with pytest.raises(UserError, match="section Own data") as error:
        require_paths([("custom", absent[0]), (f"custom|{absent[1]}", absent[1]), ("custom", absent[2])])
    assert "trian.csv   (custom; did you mean train.csv?)" in str(error.value)
    assert str(error.value).count("did you mean") == 1
