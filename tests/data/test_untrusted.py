"""Files of strangers: pickles run no code, names stay in their folder, texts forge no tokens, types are checked."""

import codecs
import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from trees import SQUARE, instances, photo, questions, reasoning_photo, reference, referring_set, write_json

from self1e.apps import check_data
from self1e.data.families import FAMILIES, DataConfig
from self1e.data.loader import build_mixture
from self1e.data.masks import load_label_map
from self1e.data.paths import inside
from self1e.data.readers import load_plain_pickle, read_coco, read_instructions, read_questions, read_refs
from self1e.data.samples import SampleError, load_image
from self1e.data.sets.reasoning import read_record
from self1e.data.splits import load_split
from self1e.data.tables import open_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ pickles
class Calls:
    def __init__(self, function, *arguments):
        self.value = function, arguments

    def __reduce__(self):
        return self.value


class State:
    def __setstate__(self, state):
        raise AssertionError("ran")

    def __reduce__(self):
        return State, (), {"a": 1}


class Elsewhere(pickle.Pickler):
    def persistent_id(self, value):
        return "id" if value == "outside" else None


def persistent() -> bytes:
    file = io.BytesIO()
    Elsewhere(file, 2).dump(["outside"])
    return file.getvalue()


GLOBAL = b"cos\nsystem\n"
TOUCH = b"(S'touch ran'\ntR."
PICKLES = {
    "os.system by REDUCE": pickle.dumps([Calls(os.system, "touch ran")], 2),
    "protocol 0": pickle.dumps([Calls(os.system, "touch ran")], 0),
    "eval": pickle.dumps(Calls(eval, "open('ran', 'w')"), 4),
    "exec behind codecs": pickle.dumps(Calls(codecs.decode, b"ran", "rot13"), 2),
    "GLOBAL by hand": GLOBAL + TOUCH,
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "INST": b"(S'touch ran'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch ran'\no.",
    "NEWOBJ of a class": pickle.dumps(State(), 2),
    "BUILD on a plain value": b"}(U\x01aK\x01ub.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": persistent(),
    "PERSID by hand": b"Pabc\n.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "BYTEARRAY8 of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "text of 2^60": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a.",
    "bytes of 2^31": b"\x80\x03B" + struct.pack("<I", (1 << 31) - 1) + b"a.",
    "memo of 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "memo of 2^62 by PUT": b"]p4611686018427387904\n.",
    "a code object's module": b"\x80\x02cmarshal\nloads\nU\x01a\x85R.",
    "set, no plain container": pickle.dumps({1, 2}, 4),
    "date": b"\x80\x02cdatetime\ndate\nU\x04aaaa\x85R.",
    "after the end": pickle.dumps([], 2)[:-1],
    "stack underflow": b"\x80\x02R.",
    "GLOBAL thrown away": b"]" + GLOBAL + b"0.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.",
    "READONLY_BUFFER": b"\x80\x05]\x98.",
    "FRAME of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"].",
    "number of 5,000 digits": b"I" + b"9" * 5_000 + b"\n.",
    "LONG4 of 2^31": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_malicious_pickles_are_refused_and_run_nothing(tmp_path, kind):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(PICKLES[kind])
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is no pickle of plain values"):
        load_plain_pickle(path)
    assert not (tmp_path / "ran").exists()


def test_pickles_whose_containers_are_shared_do_not_grow(tmp_path):
    sentences = [{"sent": "x"}] * 3_000
    ref = reference(1, 2, 3, "train") | {"sentences": sentences}
    bomb = [[]]
    for _ in range(60):
        bomb = [bomb, bomb]
    path = tmp_path / "refs(unc).p"
    for value in [ref] * 3_000, [reference(1, 2, 3, "train", "x") | {"ref_id": bomb}], [ref | {"ann_id": bomb}], bomb:
        path.write_bytes(pickle.dumps(value, 2))
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
            open_index(path, read_refs)


# ------------------------------------------------------------------------------------------------ names
def test_names_stay_in_their_folder(tmp_path):
    folder, outside = tmp_path / "photos", tmp_path / "outside"
    (folder / "a/b/c").mkdir(parents=True)
    outside.mkdir()
    (outside / "x.jpg").touch()
    assert inside(folder, "a/b/c/x.jpg") == folder / "a/b/c/x.jpg"
    for name in "../outside/x.jpg", "a/../../outside/x.jpg", f"{outside}/x.jpg", "C:\\x.jpg", "a\\..\\..\\x.jpg", "\0":
        with pytest.raises(ValueError, match="leads out of .*photos.*--allow_outside"):
            inside(folder, name)
        assert inside(folder, name, allow_outside=True) == folder / name
    (folder / "link.jpg").symlink_to(outside / "x.jpg")
    (folder / "a/b/c/deep").symlink_to(outside)
    for name in "link.jpg", "a/b/c/deep/x.jpg":
        with pytest.raises(ValueError, match="is a link to .*outside.*--allow_outside"):
            inside(folder, name)
    (folder / "near.jpg").symlink_to("a/y.jpg")
    assert inside(folder, "near.jpg") == folder / "near.jpg"


def test_folders_that_users_link_are_followed(tmp_path):
    (tmp_path / "store/train").mkdir(parents=True)
    (tmp_path / "store/train/x.jpg").touch()
    (tmp_path / "root").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/coco").mkdir(parents=True)
    (tmp_path / "tree/coco/train").symlink_to(tmp_path / "store/train")
    (tmp_path / "linked").symlink_to(tmp_path / "store")
    for folder, name in ("root", "coco/train/x.jpg"), ("linked", "train/x.jpg"), ("root/coco/train", "x.jpg"):
        assert inside(tmp_path / folder, name).exists()


def test_a_set_and_a_split_refuse_a_photo_outside_unless_allowed(tmp_path):
    photo(tmp_path / "secret.jpg")
    square = [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}]
    refs = [reference(1, 7, 1, "train", "x"), reference(2, 7, 1, "val", "x")]
    up = "../" * 5 + "secret.jpg"
    referring_set(tmp_path / "tree", "refcoco", refs, square, images=[(7, up)])
    (tmp_path / "tree/refer_seg/images/mscoco/images/train2014").mkdir(parents=True, exist_ok=True)
    photo(tmp_path / "secret.jpg")
    with pytest.raises(SampleError, match="secret.jpg.*leads out of"):
        load_split("refcoco|unc|val", tmp_path / "tree")[0].load()
    assert load_split("refcoco|unc|val", tmp_path / "tree", allow_outside=True)[0].load()[1].sum() == 36
    flags = {"dataset": "refer_seg", "refer_seg_data": "refcoco"}
    for allowed in False, True:
        config = DataConfig.parse(dataset_dir=tmp_path / "tree", data_dir=tmp_path, allow_outside=allowed, **flags)
        mixture = build_mixture(config, batch_size=1, seed=0)
        place = mixture.micro_batches(0, rank=0, world_size=1)[0][0]
        if allowed:
            assert mixture[place].masks[0].sum() == 36
        else:
            with pytest.raises(RuntimeError, match="leads out of"):
                mixture[place]
    assert check_data.main([str(tmp_path / "tree"), "--samples", "0"]) == 1
    assert check_data.main([str(tmp_path / "tree"), "--samples", "0", "--allow_outside"]) == 0


def test_own_data_stays_in_its_folder_unless_allowed(tmp_path):
    photo(tmp_path / "secret.jpg")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/own.csv").write_text(f"image,mask,prompt\n../secret.jpg,{tmp_path}/secret.png,x\n")
    with pytest.raises(ValueError, match="line 2: image: '../secret.jpg' leads out.*\n.*line 2: mask: .*leads out"):
        load_split(f"custom|{tmp_path}/own/own.csv", tmp_path)
    with pytest.raises(ValueError, match="mask .*secret.png is neither"):
        load_split(f"custom|{tmp_path}/own/own.csv", tmp_path, allow_outside=True)


# ------------------------------------------------------------------------------------------------ texts
TOKENS = (
    "[SEG]",
    "[SEGT]",
    "<image>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|fim_prefix|>",
)


@pytest.mark.parametrize("token", TOKENS)
def test_control_tokens_in_texts_break_the_sample(tmp_path, token):
    text = f"a {token} b"
    square = [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}]
    referring_set(tmp_path, "refcoco", [reference(1, 7, 1, s, text) for s in ("train", "val")], square)
    reasoning_photo(tmp_path, "train", "a", [text], is_sentence=True)
    reasoning_photo(tmp_path, "val", "a", [text], is_sentence=True)
    photo(tmp_path / "coco/train2017/a.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
    conversation = {"id": "1", "image": "a.jpg", "conversations": turns}
    write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", [conversation])
    questions(tmp_path, "gqa/train_balanced.jsonl", 1)
    line = {"image": "data/photos/0.jpg", "question": text, "answer": "x"}
    (tmp_path / "gqa/train_balanced.jsonl").write_text(json.dumps(line))
    names = [("reason_seg", "ReasonSeg"), ("vqa", "gqa")]
    names += [("refer_seg", "refcoco")] if token == token.lower() else []  # a phrase is lower-cased first
    names += [("vqa", "llava_instruct_150k")] if token != "<image>" else []  # published: taken out of the turns
    for family, name in names:
        data = FAMILIES[family].sets[name](tmp_path, tmp_path, rows=3)
        with pytest.raises(SampleError, match=f"^{name}/.*holds the reserved token"):
            data.sample(0, np.random.default_rng(0))
    for name in ["ReasonSeg|val"] + (["refcoco|unc|val"] if token == token.lower() else []):
        with pytest.raises(SampleError, match=r"\.jpg: .*holds the reserved token"):
            load_split(name, tmp_path)[0]


# ------------------------------------------------------------------------------------------------ types
BAD = [None, True, "7", 1.5, float("nan"), 1 << 80, [], {}, [7]]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("place", ["images.id", "images.height", "annotations.image_id", "annotations.category_id"])
def test_ids_and_sizes_are_integers(tmp_path, place, value):
    table, key = place.split(".")
    content = instances([(7, "a.jpg")], [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}])
    content[table][0][key] = value
    if value == 1 << 80 and key == "category_id":
        return  # an unknown category, which is the sample's own error
    with pytest.raises(ValueError, match="instances.json"):
        open_index(write_json(tmp_path / "instances.json", content), read_coco)


@pytest.mark.parametrize("value", [7, None, ["a"], {}, True], ids=repr)
def test_names_and_texts_are_strings(tmp_path, value):
    turn = {"from": "human", "value": "x"}
    files = {
        "a.json": (read_coco, {"images": [{"id": 1, "file_name": value, "height": 5, "width": 5}]}),
        "b.json": (read_coco, {"categories": [{"id": 1, "name": value}]}),
        "c.json": (read_instructions, [{"id": "1", "image": value, "conversations": [turn]}]),
        "d.json": (read_instructions, [{"id": "1", "image": "x", "conversations": [turn | {"value": value}]}]),
        "e.jsonl": (read_questions, {"image": "x", "question": value}),
        "f.json": (read_refs, [reference(1, 2, 3, "train", "x") | {"split": value}]),
        "g.json": (read_refs, [reference(1, 2, 3, "train") | {"sentences": [{"sent": value}]}]),
    }
    for name, (reader, content) in files.items():
        with pytest.raises(ValueError, match=name):
            open_index(write_json(tmp_path / name, content), reader)
    reasoning_photo(tmp_path, "train", "a", [value])
    with pytest.raises(SampleError, match="a.json"):
        read_record(tmp_path / "reason_seg/ReasonSeg/train/a.jpg", "x")


def test_half_a_character_is_refused_in_every_place(tmp_path):
    half = "\ud800"
    content = instances([(7, "a.jpg")], [{"id": 1, "image_id": 7, "segmentation": [half], "phrases": "x"}])
    for name in "tables", "names":
        with pytest.raises(ValueError, match=f"{name}.json"):
            load_split(f"custom|{write_escaped(tmp_path / f'{name}.json', content)}", tmp_path)
        content["images"][0]["file_name"] = half
    with pytest.raises(ValueError, match="instances.json holds text that is no Unicode"):
        open_index(write_escaped(tmp_path / "instances.json", content), read_coco)


def write_escaped(path, value):
    path.write_text(json.dumps(value))
    return path


def test_an_expression_of_an_unknown_image_names_both_files(tmp_path):
    square = [{"id": 1, "image_id": 7, "segmentation": [SQUARE]}]
    refs = [reference(1, 7, 1, "train", "x"), reference(2, 9, 1, "train", "y")]
    referring_set(tmp_path, "refcoco", refs, square, images=[(7, "7.jpg")])
    data = FAMILIES["refer_seg"].sets["refcoco"](tmp_path, tmp_path, rows=3)
    with pytest.raises(ValueError, match=r"instances.json has no 'image id 9', which refs\(unc\).p names"):
        data.keys()


@pytest.mark.parametrize("size", [(0, 5), (-5, -5), (1 << 20, 1 << 20)])
def test_sizes_are_those_of_a_picture(tmp_path, size):
    content = instances([(7, "a.jpg")], [])
    content["images"][0] |= dict(zip(("height", "width"), size))
    with pytest.raises(ValueError, match="instances.json.*height and width"):
        open_index(write_json(tmp_path / "instances.json", content), read_coco)


def test_json_nested_without_end_is_refused(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    readers = {"a.json": read_coco, "b.json": read_instructions, "c.jsonl": read_questions, "d.json": read_refs}
    for name, reader in readers.items():
        (tmp_path / name).write_text(deep)
        with pytest.raises(ValueError, match=name):
            open_index(tmp_path / name, reader)
    reasoning_photo(tmp_path, "train", "a", ["x"])
    (tmp_path / "reason_seg/ReasonSeg/train/a.json").write_text(deep)
    with pytest.raises(SampleError, match="a.json"):
        read_record(tmp_path / "reason_seg/ReasonSeg/train/a.jpg", "x")


@pytest.mark.parametrize("size", [(70_000, 1), (1, 70_000)])
def test_a_picture_of_one_long_line_is_refused(tmp_path, size):
    """A file of a few bytes that would take gigabytes when it is shrunk."""
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(SampleError, match="a.png.*70,000.* pixels, and no side may be over 65,535"):
        load_image(tmp_path / "a.png")


def test_no_picture_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands EPS, whatever its name, to Ghostscript."""
    from PIL import EpsImagePlugin

    def started(*args, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(%pipe%id) (r) file\n")
    for read in load_image, lambda path: load_label_map(path, "a"):
        with pytest.raises(SampleError, match="a.jpg.*no picture of a known format"):
            read(path)
