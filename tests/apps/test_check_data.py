"""`self1e check-data`: sound trees pass, each kind of fault is named with its record, and own data is divided."""

import json
import os

import pytest
from custom_trees import COLUMNS, annotation, coco_set, table
from helpers import SHARED, needs_shared, splits_of
from PIL import Image
from trees import H, W, instances, label_map, photo, questions, reasoning_photo, reference, referring_set, write_json

from self1e.apps.check_data import SHEET, main
from self1e.data.families import FAMILIES
from self1e.data.splits import SPLITS, load_split
from self1e.errors import UserError
from self1e.evaluation.results import TOTALS
from self1e.synthetic.shapes_dataset import make_shapes_dataset


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the contact sheet goes below it

    def run(*arguments):
        """Exit code, {set: cells of its row}, and the text before the table."""
        code = main([str(argument) for argument in (*arguments, "--workers", 2)])
        text = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
        return code, {name: cells for name, *cells in lines[2:]}, text

    return run


def problems(text):
    return [line.strip() for line in text.split("\n| set")[0].splitlines() if line.startswith("  ")]


def copy_shapes(root):
    make_shapes_dataset(root, train=4, val=2, size=64)
    return root / "dataset"


def test_every_set_of_a_sound_tree(tmp_path, run, monkeypatch):
    totals = {"refcoco": {"images": 4, "refs": 9_000}, "gqa": {"questions": 1}, "ade20k": {"images": 2}}
    monkeypatch.setattr("self1e.evaluation.results.TOTALS", totals)
    dataset = copy_shapes(tmp_path)
    code, rows, text = run(dataset, "--samples", 1, "--limit", 3, "--output", "sheet.jpg")
    assert code == 0 and problems(text) == []
    assert {"ade20k", "paco_lvis", "refcoco+", "ReasonSeg", "vizwiz"} <= rows.keys()
    assert {split.replace("|", " ") for split in splits_of(dataset)} <= rows.keys()
    assert rows["grefcoco"][:6] == ["3 of 4", "4", "12", "12", "3", "0"] and rows["vqav2"][1:5] == ["2", "3", "0", "0"]
    known = {name: rows[name][-1].split(" of ", 1)[-1] for name in ("ade20k", "cocostuff", "refcoco", "gqa")}
    assert known == {"ade20k": "complete", "cocostuff": "-", "refcoco": "9,000 refs", "gqa": "1 questions"}
    with Image.open("sheet.jpg") as sheet:
        assert sheet.width > 4 * 560 and len(sheet.getcolors(1 << 24)) > 1000


@needs_shared
def test_real_photos(run):
    _, rows, text = run(SHARED / "minidata/dataset", "--limit", 2, "--samples", 0)
    (fault,) = set(problems(text))  # RefCLEF's file holds one box without an outline
    assert "empty segmentation" in fault and len(rows) > 30


def test_the_shipped_totals_are_those_of_sets_and_splits():
    assert set(TOTALS) <= {name for family in FAMILIES.values() for name in family} | set(SPLITS)
    assert TOTALS["refcoco|unc|val"] == {"images": 1500, "refs": 3811, "sentences": 10834}


def test_faults_of_a_tree(tmp_path, run):
    root = tmp_path / "dataset"
    outside = [0, 0, 3 * W, 0, 3 * W, 4]
    for name in "a", "b", "c":
        photo(root / f"ade20k/images/training/{name}.jpg")
        label_map(root / f"ade20k/annotations/training/{name}.png", [1, 2])
    cut = root / "ade20k/images/training/b.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    Image.new("L", (W, H + 1), 3).save(root / "ade20k/annotations/training/c.png")

    squares = [annotation(4, 7), annotation(4, 8), annotation(5, 8, outside), annotation(6, 99)]
    squares += [annotation(7, 7) | {"segmentation": [], "bbox": [1, 1, 5, 5], "area": 25}]
    squares += [annotation(8, 7, [0.1, 0.1, 0.5, 0.1, 0.5, 0.5]), annotation(9, 7) | {"bbox": [15, 0, 4, 2]}]
    refs = [reference(1, 7, 4, "train", "fine", " "), reference(2, 8, 5, "train", "a <image> b")]
    referring_set(root, "refcoco", refs, squares, images=[(7, "7.jpg"), (8, "8.jpg")])
    (root / "refer_seg/refclef").mkdir()

    parts = [annotation(1, 1), annotation(2, 2) | {"category_id": 8}]
    voc = root / "vlpart/pascal_part"
    write_json(voc / "train.json", instances([(1, "gone.jpg"), (2, "2.jpg")], parts))
    photo(voc / "VOCdevkit/VOC2010/JPEGImages/2.jpg")

    box = [{"label": "t", "points": [[0, 0], [5, 5]], "shape_type": "rectangle"}]
    reasoning_photo(root, "train", "one", ["x"], shapes=box)
    reasoning_photo(root, "train", "three", ["\u200b"])
    reasoning_photo(root, "val", "two", [])
    questions(tmp_path / "data", "vqav2/vqav2_train.jsonl", 2)
    with open(tmp_path / "data/vqav2/vqav2_train.jsonl", "a") as file:
        file.write(json.dumps({"image": "data/photos/0.jpg", "question": " ", "answer": ""}) + "\n")
        file.write(json.dumps({"image": "data/photos/9.jpg", "question": "What?", "answer": "x"}) + "\n")
    (tmp_path / "data/okvqa").mkdir()
    (tmp_path / "data/okvqa/okvqa_train.jsonl").write_text('{"image": "data/photos/0.jpg"}\n')

    code, rows, text = run(root)
    found = "\n".join(problems(text))
    for fault in (
        "ade20k/b.jpg: cannot read", "ade20k/c.jpg: the mask's size is 20 x 13, the photo 20 x 12",
        "annotation id that occurs twice (first: 4)", "not among the images (first: annotation 6)",
        "empty segmentation beside a bbox or an area (first: annotation 7)", "outside its image (first: annotation 5)",
        "from 0 to 1; they must be pixels (first: annotation 8)", "far from its bbox (first: annotation 9)",
        "refcoco/7.jpg: a phrase is empty", "holds the reserved token <image>",
        f"{root / 'refer_seg/refclef/refs(unc).p'}   (refclef)",
        "pascal_part/gone.jpg: cannot read", "unknown category 8",
        "shapes[0] is a rectangle", "ReasonSeg/three.jpg: a phrase is empty", "ReasonSeg/two.jpg: it has no sentence",
        "vqav2/2: a phrase is empty", "vqav2/2: an answer is empty", "vqav2/3: cannot read",
        "okvqa_train.jsonl: line 1: it has no question",
    ):  # fmt: skip
        assert fault in found, (fault, found)
    assert code == 1 and rows["ade20k"][:6] == ["3", "3", "3", "3", "0", "2"]
    assert "mapillary" in text.split("not there:")[1]


def test_faulty_files_do_not_hide_the_rest(tmp_path, run):
    copy_shapes(tmp_path)
    data = tmp_path / "data"
    (data / "okvqa/okvqa_train.jsonl").write_text("[]\n")
    (data / "gqa/images").rename(data / "gqa/elsewhere")
    code, rows, text = run(tmp_path / "dataset", "--samples", 0, "--limit", 1)
    found = "\n".join(problems(text))
    for part in "okvqa_train.jsonl: line 1", "gqa/":
        assert part in found, part
    assert code == 1 and rows["refcoco"][5] == "0" and rows["gqa"][5] != "0"


def small(root, rows=(("a.jpg", "half.png", "half"), ("a.jpg", "none.png", "none"), ("b.jpg", "half.png", "Which?"))):
    for name in "ab":
        photo(root / f"images/{name}.jpg")
    label_map(root / "masks/half.png", [0, 1])
    label_map(root / "masks/none.png", [0])
    return table(root, rows, name="own.csv")


def test_own_data(tmp_path, run, monkeypatch):
    source = small(tmp_path)
    code, rows, _ = run(source, "--output", tmp_path / "deep/sheet.jpg")
    assert code == 0 and rows == {str(source): ["2", "2", "3", "3", "1", "0"]}
    with Image.open(tmp_path / "deep/sheet.jpg") as sheet:
        assert sheet.width > 2 * 560
    monkeypatch.setattr("self1e.apps.check_data.IN_WORKERS", 1)
    assert run(tmp_path, "--samples", 0)[1][str(tmp_path)] == ["2", "2", "3", "3", "1", "0"]
    assert not (tmp_path / SHEET).exists()


def test_faults_of_own_data_are_all_listed_once(tmp_path, run):
    for name in "abcd":
        photo(tmp_path / f"{name}.jpg")
    label_map(tmp_path / "half.png", [0, 1])
    Image.new("L", (W + 2, H)).save(tmp_path / "wide.png")
    Image.new("L", (W, H), 255).save(tmp_path / "blurred.jpg")
    (tmp_path / "c.jpg").write_bytes(b"none")
    rows = [
        ("a.jpg", "half.png", "fine"), ("a.jpg", "half.png", ""), ("gone.jpg", "half.png", "x"),
        ("b.jpg", "wide.png", "wide"), ("a.jpg", "half.png", "the absent", "7"), ("c.jpg", "half.png", "x"),
        ("d.jpg", "blurred.jpg", "x"), ("e\\f.jpg", "half.png", "x"),
    ]  # fmt: skip
    code, cells, text = run(table(tmp_path, rows, (*COLUMNS, "value")))
    expected = ("line 3: prompt is empty", "line 4: gone.jpg is neither", "line 5: the mask's size is 22 x 12",
                "a.jpg: line 6: no pixel of half.png has the value 7", "c.jpg: cannot read", "blurred.jpg is a JPEG",
                "line 9: 'e\\\\f.jpg' has backslashes")  # fmt: skip
    found = problems(text)
    assert len(found) == len(expected) and all(any(part in line for line in found) for part in expected), found
    assert code == 1 and list(cells.values())[0] == ["6", "6", "2", "2", "1", "7"]


def test_masks_that_contradict_their_record(tmp_path, run):
    box = annotation(2, 1, phrases="box") | {"segmentation": [], "bbox": [2, 3, 6, 6], "area": 36}
    code, _, text = run(coco_set(tmp_path, [annotation(1, 1, [-30, 0, 5, 0, 5, 5], phrases="far"), box]))
    empty, outside = problems(text)
    assert "annotations[1]: segmentation is empty beside a bbox" in empty and code == 1
    assert "outside its image (first: annotations[0])" in outside


def test_a_record_with_the_size_before_exif(tmp_path, run):
    for orientation, count in (6, 1), (3, 0):
        source = coco_set(tmp_path, [annotation(1, phrases="x")])
        photo(tmp_path / "images/a.jpg", orientation=orientation)
        code, _, text = run(source)
        assert code == count == len(problems(text)) and ("annotations[0]: the size is" in text) == count


def test_prompts_that_are_too_long(tmp_path, run):
    source = small(tmp_path, [("a.jpg", "half.png", "the red box on the ground " * 80), ("b.jpg", "half.png", "it")])
    code, _, text = run(source, "--samples", 0)
    (problem,) = problems(text)
    assert code == 1 and "a.jpg" in problem and "--model_max_length 512" in problem
    assert run(source, "--samples", 0, "--model_max_length", 4096)[0] == 0


@pytest.mark.parametrize("name", ["own.csv", "own.jsonl", "own.json"])
def test_train_and_val_by_photo(tmp_path, run, name):
    count = 10
    if name == "own.json":
        annotations = [annotation(k, k // 2, phrases=[f"thing {k}"]) for k in range(2 * count)]
        source = coco_set(tmp_path, annotations, [(k, f"{k}.jpg") for k in range(count)]).rename(tmp_path / name)
    else:
        label_map(tmp_path / "m.png", [0, 1])
        for k in range(count):
            photo(tmp_path / f"{k}.jpg")
        rows = [(f"{'./' * (k % 2)}{k // 2}.jpg", "m.png", f'thing {k}, "red"') for k in range(2 * count)]
        source = table(tmp_path, rows, [" Image", "mask", "prompt"] if name == "own.csv" else COLUMNS, name)
    code, _, text = run(source, "--split", 0.2, "--samples", 0)
    assert code == 0 and "8 photos" in text and "2 photos" in text
    parts = [load_split(f"custom|{source.with_stem(f'own_{part}')}", ".") for part in ("train", "val")]
    photos = [{os.path.normpath(image.image_id) for image in part} for part in parts]
    assert list(map(len, photos)) == [8, 2] and len(photos[0] | photos[1]) == 10
    assert sum(len(image.expressions) for part in parts for image in part) == 2 * count
    with pytest.raises(UserError, match="exists"):
        main([str(source), "--split", "0.2"])


def test_what_cannot_be_opened(tmp_path, run, capsys):
    code, _, text = run(table(tmp_path, [], header=("photo", "text")))
    assert code == 1 and "line 1 should be image,mask,prompt" in text
    assert "| set" not in text  # a table of nothing would bury it
    (tmp_path / "tree/refer_seg").mkdir(parents=True)
    for folder in "tree", "tree/refer_seg":  # without a set; the wrong folder
        assert main([folder]) == 1 and f"nothing to check in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["gone"], [".", "--split", "0.1"], [".", "--output", "sheets"], [".", "--limit", "-1"], []]
)
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
