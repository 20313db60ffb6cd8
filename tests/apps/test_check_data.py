"""`self1e check-data`: sound trees pass, and each kind of fault is named with its record."""

import csv
import json
import re
import shutil

import pytest
from helpers import SHARED, needs_shared
from PIL import Image
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

from self1e.apps.check_data import SHEET, main
from self1e.data.families import FAMILIES
from self1e.data.splits import SPLITS
from self1e.data.totals import compare, known_totals
from self1e.evaluation.vqa.registry import VQA_BENCHMARKS
from self1e.synthetic.shapes_dataset import make_shapes_dataset


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the contact sheet goes below it


@pytest.fixture
def run(capsys):
    def run(*arguments):
        """Exit code, {set: [records, photos, sentences, masks, empty, problems]}, and the text before the table."""
        code = main([str(argument) for argument in (*arguments, "--workers", 2)])
        text = capsys.readouterr().out
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "]
        return code, {name: cells[:6] for name, *cells in lines[2:]}, text

    return run


def problems(text):
    return [line.strip() for line in text.split("\n| set")[0].splitlines() if line.startswith("  ")]


def copy_shapes(root):
    return make_shapes_dataset(root, train=4, val=2, size=64)


def test_every_set_of_a_sound_tree(tmp_path, run):
    copy_shapes(tmp_path)
    code, rows, text = run(tmp_path / "dataset", "--samples", 1, "--limit", 3, "--output", "sheet.jpg")
    beyond = [name for name in SPLITS if name.startswith(("rrefcoco", "refzom"))]  # not among the synthetic sets
    absent = [line for line in text.splitlines() if line.startswith("not there")]
    assert code == 0 and problems(text) == [] and absent == [f"not there: {', '.join(beyond)}"]
    training = [name for family in FAMILIES.values() for name in family.sets]
    splits = [name.replace("|", " ") for name in SPLITS if name not in beyond]
    assert list(rows) == training + splits + [*VQA_BENCHMARKS]
    assert rows["grefcoco"] == ["3 of 4", "4", "12", "12", "3", "0"]
    assert rows["vqav2"][1:5] == ["2", "3", "0", "0"]
    with Image.open("sheet.jpg") as sheet:
        assert sheet.width > 4 * 560 and len(sheet.getcolors(1 << 24)) > 1000


@needs_shared
def test_real_photos(run):
    code, rows, text = run(SHARED / "minidata/dataset", "--limit", 2, "--samples", 0)
    assert code == 0 and len(rows) > 30, text


def test_known_totals(tmp_path, run, monkeypatch):
    copy_shapes(tmp_path)
    totals = {"refcoco": {"images": 4, "refs": 9_000}, "gqa": {"questions": 1}, "ade20k": {"images": 2}}
    monkeypatch.setattr("self1e.data.totals.known_totals", lambda: totals)
    text = run(tmp_path / "dataset", "--samples", 0, "--limit", 1)[2]
    found = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if line[:2] == "| "}
    assert found["ade20k"] == "complete" and found["cocostuff"] == "-"
    assert re.fullmatch(r"\d+ of 9,000 refs", found["refcoco"])
    assert re.fullmatch(r"another version: \d+ of 1 questions", found["gqa"])


def test_the_shipped_totals_are_those_of_sets_and_splits():
    known = known_totals()
    assert set(known) <= {name for family in FAMILIES.values() for name in family.sets} | set(SPLITS)
    val = known["refcoco|unc|val"]
    assert compare("refcoco|unc|val", val) == "complete"
    assert compare("refcoco|unc|val", val | {"images": 1499}) == "partly: 1,499 of 1,500 images"
    assert compare("refcoco|unc|val", val | {"images": 1499, "refs": 3812}) == "another version: 3,812 of 3,811 refs"
    assert compare("custom|x", {"images": 3}) == "-"


def test_odd_segmentations_are_counted_and_are_no_problem(tmp_path, run):
    parts = [
        {"id": 1, "image_id": 1, "segmentation": [SQUARE, [1, 2, 3]]},
        {"id": 2, "image_id": 1, "segmentation": []},
    ]
    voc = tmp_path / "dataset/vlpart/pascal_part"
    write_json(voc / "train.json", instances([(1, "1.jpg")], parts))
    photo(voc / "VOCdevkit/VOC2010/JPEGImages/1.jpg")
    code, rows, text = run(tmp_path / "dataset", "--samples", 0)
    assert code == 0 and rows["pascal_part"] == ["1", "1", "1", "1", "0", "0"]
    assert "train.json: 1 annotations with an empty segmentation are skipped (first: annotation 2)" in text
    assert "train.json: 1 annotations with polygon parts of fewer than 6" in text


def test_faults_of_a_tree(tmp_path, run):
    root = tmp_path / "dataset"
    outside = [0, 0, 3 * W, 0, 3 * W, 4]
    for name in "a", "b", "c":
        photo(root / f"ade20k/images/training/{name}.jpg")
        label_map(root / f"ade20k/annotations/training/{name}.png", [1, 2])
    cut = root / "ade20k/images/training/b.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    Image.new("L", (W, H + 1), 3).save(root / "ade20k/annotations/training/c.png")
    (root / "cocostuff").mkdir()

    squares = [{"id": 4, "image_id": 7, "segmentation": [SQUARE]}, {"id": 4, "image_id": 8, "segmentation": [SQUARE]}]
    squares += [{"id": 5, "image_id": 8, "segmentation": [outside]}, {"id": 6, "image_id": 99, "segmentation": []}]
    refs = [reference(1, 7, 4, "train", "fine", " "), reference(2, 8, 5, "train", "a <image> b")]
    refs += [reference(3, 7, 4, "val", "x"), reference(3, 7, 4, "val", "y")]
    referring_set(root, "refcoco", refs, squares, images=[(7, "7.jpg"), (8, "8.jpg")])
    (root / "refer_seg/refclef").mkdir()

    parts = [
        {"id": 1, "image_id": 1, "segmentation": [SQUARE]},
        {"id": 2, "image_id": 2, "segmentation": [SQUARE], "category_id": 8},
    ]
    voc = root / "vlpart/pascal_part"
    write_json(voc / "train.json", instances([(1, "gone.jpg"), (2, "2.jpg")], parts))
    photo(voc / "VOCdevkit/VOC2010/JPEGImages/2.jpg")

    reasoning_photo(root, "train", "one", ["x"], shapes=[{"label": "t", "points": [[-9, 0], [5, 0], [5, 5]]}])
    reasoning_photo(root, "val", "two", [])
    questions(tmp_path / "data", "vqav2/vqav2_train.jsonl", 2)
    with open(tmp_path / "data/vqav2/vqav2_train.jsonl", "a") as file:
        file.write(json.dumps({"image": "data/photos/0.jpg", "question": " ", "answer": "<image>"}) + "\n")
        file.write(json.dumps({"image": "data/photos/9.jpg", "question": "What?", "answer": "x"}) + "\n")
    (tmp_path / "data/okvqa").mkdir()
    (tmp_path / "data/okvqa/okvqa_train.jsonl").write_text('{"image": "data/photos/0.jpg"}\n')

    code, rows, text = run(root)
    found = "\n".join(problems(text))
    for fault in (
        "ade20k/b.jpg: cannot read", "ade20k/c.jpg: the mask's size is 20 x 13, the photo 20 x 12",
        f"{root / 'cocostuff/train2017'} is missing",
        "instances.json: annotation id 4 occurs twice",
        "instances.json: annotations of image 99, which is not among its images",
        "refcoco/7.jpg: a phrase is empty", "b in this image", "holds the reserved token <image>",
        "refcoco/8.jpg: annotation 5: a polygon reaches (0 to 60, 0 to 4), outside 20 x 12 pixels",
        f"{root / 'refer_seg/refclef/refs(unc).p'} is missing",
        "pascal_part/gone.jpg: cannot read", "pascal_part/2.jpg: annotation 2: unknown category 8",
        "ReasonSeg/one.jpg: shapes[0]: a polygon reaches (-9 to 5, 0 to 5), outside 20 x 12 pixels",
        "ReasonSeg/two.jpg: its JSON holds no text",
        "vqav2/2: a phrase is empty", "vqav2/2: '<image>' holds the reserved token <image>", "vqav2/3: cannot read",
        "okvqa_train.jsonl, line 1: key 'question' is missing",
    ):  # fmt: skip
        assert fault in found, (fault, found)
    assert code == 1 and rows["ade20k"] == ["3", "3", "3", "3", "0", "2"]
    assert "not there: mapillary, paco_lvis" not in text and "mapillary" in text.split("not there:")[1]


def table(root, rows, header=("image", "mask", "prompt")):
    with open(root / "own.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return root / "own.csv"


def test_own_data(tmp_path, run):
    for name in "ab":
        photo(tmp_path / f"images/{name}.jpg")
    label_map(tmp_path / "masks/half.png", [0, 1])
    label_map(tmp_path / "masks/none.png", [0])
    rows = [("a.jpg", "half.png", "half"), ("a.jpg", "none.png", "nothing"), ("b.jpg", "half.png", "Which half?")]
    source = table(tmp_path, rows)
    code, rows, _ = run(source, "--output", tmp_path / "deep/sheet.jpg")
    assert code == 0 and rows == {str(source): ["2", "2", "3", "3", "1", "0"]}
    with Image.open(tmp_path / "deep/sheet.jpg") as sheet:
        assert sheet.width > 2 * 560
    assert run(tmp_path, "--kind", "custom", "--samples", 0)[1][str(tmp_path)] == ["2", "2", "3", "3", "1", "0"]
    assert not (tmp_path / SHEET).exists()


def test_faults_of_own_data_are_all_listed(tmp_path, run):
    for name in "abc":
        photo(tmp_path / f"{name}.jpg")
    label_map(tmp_path / "half.png", [0, 1])
    Image.new("L", (W + 2, H)).save(tmp_path / "wide.png")
    (tmp_path / "c.jpg").write_bytes(b"none")
    source = table(
        tmp_path,
        [
            ("a.jpg", "half.png", "fine"),
            ("a.jpg", "half.png", ""),
            ("gone.jpg", "half.png", "x"),
            ("b.jpg", "wide.png", "wide"),
            ("a.jpg", "half.png", "my [SEG]"),
            ("c.jpg", "half.png", "x"),
        ],
    )
    code, rows, text = run(source)
    assert (tmp_path / SHEET).exists()
    assert code == 1 and rows[str(source)] == ["4", "4", "2", "2", "0", "5"]
    found = problems(text)
    starts = [
        "line 3: prompt is empty",
        "line 4: image gone.jpg is neither",
        "a.jpg: 'my [SEG]' holds the reserved",
        f"custom|{source}/b.jpg: line 5: the mask's size is 22 x 12",
        f"custom|{source}/c.jpg: cannot read",
    ]
    assert sorted(line.startswith(tuple(starts)) for line in found) == [True] * 5, found


def test_polygons_of_own_data(tmp_path, run):
    photo(tmp_path / "a.jpg")
    annotations = [
        {"id": 1, "image_id": 1, "segmentation": [[-30, 0, 5, 0, 5, 5]], "phrases": "far"},
        {"id": 2, "image_id": 1, "segmentation": [[-1, 0, 5, 0, 5, 5]], "phrases": "near"},
    ]
    source = write_json(tmp_path / "own.json", instances([(1, "a.jpg")], annotations))
    code, _, text = run(source)
    assert code == 1 and problems(text) == [
        "a.jpg: annotations[0]: a polygon reaches (-30 to 5, 0 to 5), outside 20 x 12 pixels"
    ]


def test_each_fault_of_own_data_is_named_once(tmp_path, run):
    photo(tmp_path / "a.jpg")
    label_map(tmp_path / "m.png", [1])
    source = table(tmp_path, [("gone.jpg", "m.png", "it"), ("a.jpg", "lost.png", "it"), ("a.jpg", "m.png", "all")])
    code, rows, text = run(source)
    assert (
        code == 1
        and rows[str(source)][0] == "2"
        and problems(text)
        == [
            f"line 2: image gone.jpg is neither in {tmp_path} nor in {tmp_path / 'images'}",
            f"line 3: mask lost.png is neither in {tmp_path} nor in {tmp_path / 'masks'}",
        ]
    )


def test_all_malformed_annotations_of_a_photo_are_named(tmp_path, run):
    photo(tmp_path / "a.jpg")
    shapes = [[[1, 2, 3]], SQUARE, {"size": [H, W], "counts": [3, 4]}, [["x"] * 6]]
    annotations = [
        {"id": k, "image_id": 1, "segmentation": shape if k != 1 else [shape], "phrases": f"thing {k}"}
        for k, shape in enumerate(shapes)
    ]
    code, _, text = run(write_json(tmp_path / "own.json", instances([(1, "a.jpg")], annotations)))
    (problem,) = problems(text)
    assert code == 1 and problem.split("; ") == [
        f"custom|{tmp_path / 'own.json'}/a.jpg: annotations[0]: malformed segmentation "
        "(a polygon needs at least three finite points)",
        "annotations[2]: malformed segmentation (the runs do not add up to the image)",
        "annotations[3]: malformed segmentation (a polygon needs at least three finite points)",
    ]


@pytest.mark.parametrize("content", ['{"images": [', "[1]", '{"images": [{"file_name": "\\ud800"}]}'])
def test_own_files_are_not_to_be_downloaded(tmp_path, run, content):
    (tmp_path / "own.json").write_text(content)
    code, _, text = run(tmp_path / "own.json")
    assert code == 1 and "own.json" in text and "download" not in text


def test_long_lists_are_cut_and_counted(tmp_path, run):
    label_map(tmp_path / "m.png", [1])
    code, rows, text = run(table(tmp_path, [(f"{k}.jpg", "m.png", "x") for k in range(12)]))
    assert code == 1 and len(problems(text)) == 11 and "and 2 more" in text


def test_what_cannot_be_opened(tmp_path, run, capsys):
    code, _, text = run(table(tmp_path, [], header=("photo", "text")))
    assert code == 1 and "line 1: no column image, mask, prompt; found photo, text" in text
    assert "| set" not in text  # a table of nothing would bury it
    (tmp_path / "refer_seg").mkdir()
    assert run(tmp_path)[0] == 1  # a tree without a set


@pytest.mark.parametrize("arguments", [["gone"], [".", "--limit", "0"], [".", "--samples", "-1"], []])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_a_missing_vqa_photo_does_not_hide_the_rest(tmp_path, run):
    copy_shapes(tmp_path)
    shutil.rmtree(tmp_path / "data/gqa/images")
    (tmp_path / "dataset/reason_seg").rename(tmp_path / "moved")
    code, rows, text = run(tmp_path / "dataset", "--limit", 1, "--samples", 0)
    assert code == 1 and "ReasonSeg" in text.split("not there:")[1]
    assert rows["refcoco"][-1] == "0" and rows["gqa"][-1] != "0"


def test_faulty_benchmarks_and_strays_do_not_hide_the_rest(tmp_path, run):
    copy_shapes(tmp_path)
    data, reasoning = tmp_path / "data", tmp_path / "dataset/reason_seg/ReasonSeg/test"
    (data / "okvqa/okvqa_val.jsonl").write_text("[]\n")
    (data / "mmbench/mmbench_dev_20230712.tsv").write_text("a\tb\n1\t2\n")
    (data / "pope/coco/coco_pope_random.json").write_text("no JSON")
    (data / "textvqa/textvqa_val_annotations.json").unlink()
    lines = (data / "vqav2/vqav2_train.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"question"', '"text"')
    (data / "vqav2/vqav2_train.jsonl").write_text("\n".join(lines))
    stray = sorted(reasoning.glob("*.jpg"))[0]
    stray.rename(stray.with_suffix(".JPG"))
    code, rows, text = run(tmp_path / "dataset", "--samples", 0)
    found = "\n".join(problems(text))
    assert code == 1 and "6 problems" in text
    for part in (
        "okvqa_val.jsonl is malformed",
        "mmbench_dev_20230712.tsv is malformed",
        "coco_pope_random.json is malformed",
        "textvqa_val_annotations.json is missing",
        "vqav2_train.jsonl, line 2: key 'question' is missing",
        f"{stray.stem}.json is not read: no {stray.stem}.jpg is beside it",
    ):
        assert part in found, part
    assert rows["pope"][0] != "0" and rows["mmbench-test-cn"][-1] == "0"


def test_jpeg_masks_are_refused(tmp_path, run):
    photo(tmp_path / "own/a.jpg")
    Image.new("L", (W, H), 255).save(tmp_path / "own/mask.jpg")
    (tmp_path / "own/train.csv").write_text("image,mask,prompt\na.jpg,mask.jpg,the cup\n")
    (tmp_path / "own/data").mkdir()  # makes no tree of a folder of own data
    code, _, text = run(tmp_path / "own")
    assert code == 1 and "own/mask.jpg is a JPEG, which blurs the labels at every edge; store it as a PNG" in text
    assert "1 problem\n" in text


@pytest.mark.parametrize("given", [".", "dataset/refer_seg"])
def test_a_folder_beside_the_tree(tmp_path, run, capsys, given):
    copy_shapes(tmp_path)
    assert main([given, "--workers", "2"]) == 1
    assert (
        f"did you mean {(tmp_path / 'dataset').relative_to(tmp_path) if given == '.' else tmp_path / 'dataset'}?"
        in (capsys.readouterr().err)
    )
