"""self1e/data/readers.py: formats, the cache, and pickles that are not what they should be."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers import Calls
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CHILDREN
from trees import SQUARE, instances, reference, write_json

from self1e.data import readers
from self1e.data.readers import (
    load_plain_pickle,
    open_tables,
    read_coco,
    stream_json,
)
from self1e.data.sets.referring import read_refs
from self1e.data.sets.vqa import read_instructions, read_questions
from self1e.errors import UserError

QUESTION = {"image": "a", "question": "b"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


numbers = st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab.é", max_size=3), inner, max_size=4),
)


@settings(max_examples=40, deadline=None)
@given(items=st.lists(values, max_size=5), bom=st.booleans(), escaped=st.booleans())
def test_streaming_equals_the_standard_parser(tmp_path_factory, items, bom, escaped):
    path = tmp_path_factory.mktemp("json") / "x.json"
    text = json.dumps({"before": [1], "items": items}, ensure_ascii=escaped)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    assert [value for _, value in stream_json(path, "items")] == items
    path.write_text(json.dumps(items), encoding="utf-8")
    assert [value for _, value in stream_json(path)] == items


def test_a_fault_of_a_reader_is_no_fault_of_the_disk(tmp_path):
    def read_another(path):
        yield "items", (path / "absent").read_text()

    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(NotADirectoryError):
        open_tables(tmp_path / "x.json", read_another)
    with pytest.raises(UserError, match="is missing"):
        open_tables(tmp_path, read_another)


@pytest.mark.parametrize("text", ["", "[1, 2", '{"a": [1}', "[1 2]", '["é', "version https://git-lfs.github.com/spec"])
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="x.json.*Git LFS" if "lfs" in text else "x.json"):
        open_tables(tmp_path / "x.json", read_instructions)


def test_coco_look_ups_do_not_depend_on_the_order_of_ids(tmp_path):
    annotations = [{"id": i, "image_id": owner, "segmentation": [SQUARE]} for i, owner in ((9, 7), (4, 5), (6, 7))]
    path = write_json(tmp_path / "instances.json", instances([(7, "b.jpg"), (5, "a.jpg")], annotations))
    tables = open_tables(path, read_coco)
    images, annotations = pickle.loads(pickle.dumps((tables["images"], tables["annotations"])))  # as workers get them
    assert [images.having(id)[0][0] for id in (5, 7)] == ["a.jpg", "b.jpg"]
    assert images.keys[:, 0].tolist() == [7, 5] and not tables["problems"]
    assert annotations.having(6) == [[6, 1, [SQUARE]]] and not annotations.having(5)
    assert [id for id, *_ in annotations.having(7, column=1)] == [9, 6] and not annotations.having(8, column=1)


BOX = {"bbox": [2, 3, 6, 6], "area": 36}
FLAT = [0, 0, 0, 9, 9, 9]


@pytest.mark.parametrize(
    "fields, word",
    [
        ({"segmentation": []} | BOX, "empty"),
        ({"segmentation": [[12, 0, 18, 0, 18, 5]]} | BOX, "far from its bbox"),
        ({"segmentation": [[8, 4, 18, 4, 18, 10, 8, 10]], "bbox": [8, 4, 18, 10]}, "far from"),  # x1, y1, x2, y2
        ({"segmentation": [SQUARE], "area": 900}, "another area"),
        ({"segmentation": [[0.1, 0.2, 0.9, 0.2, 0.9, 0.8]]}, "0 to 1"),
        ({"segmentation": [[2, 3, 80, 3, 80, 9]]}, "outside its image"),
        ({"segmentation": [SQUARE]} | BOX, None),
        ({"segmentation": SQUARE} | BOX, None),
        ({"segmentation": []}, None),
        ({"segmentation": {"size": [12, 20], "counts": [240]}} | BOX, "empty"),
        ({"segmentation": {"size": [12, 20], "counts": [27, 6, 207]}, "bbox": [2, 3, 1, 6], "area": 6}, None),
        ({"segmentation": {"size": [12, 20], "counts": [27, 6, 207]}, "bbox": [12, 3, 8, 6]}, "far from"),
    ],
)
def test_what_contradicts_itself_is_a_problem_of_the_file(tmp_path, fields, word):
    annotations = [{"id": k, "image_id": 7, **fields} for k in (1, 2)]
    path = write_json(tmp_path / "instances.json", instances([(7, "b.jpg")], annotations))
    problems = open_tables(path, read_coco)["problems"]
    if word is None:
        assert not problems
    else:
        (problem,) = problems
        assert problem.startswith("instances.json: 2 x ") and word in problem and "annotation 1" in problem


def test_ids_that_occur_twice_and_owners_that_do_not_exist_are_problems(tmp_path):
    annotations = [{"id": 1, "image_id": owner, "segmentation": [SQUARE]} for owner in (7, 8)]
    images = [(7, "a.jpg"), (7, "b.jpg")]
    path = write_json(tmp_path / "instances.json", instances(images, annotations))
    problems = open_tables(path, read_coco)["problems"]
    assert len(problems) == 3 and all("instances.json" in problem for problem in problems)


SOUND = {
    read_coco: instances([(7, "b.jpg")], [{"id": 1, "image_id": 7, "segmentation": []}]),
    read_refs: [reference(1, 7, 1, "train", "it")],
    read_instructions: [{"id": "1", "image": "x.jpg", "conversations": [{"from": "human", "value": "x"}]}],
    read_questions: QUESTION,
}
CHANGES = [
    (read_coco, ("images", 0), "file_name"),
    (read_coco, ("annotations", 0), "segmentation"),
    (read_coco, (), "images"),
    (read_refs, (0,), "ann_id"),
    (read_instructions, (0, "conversations", 0), "from"),
    (read_questions, (), "question"),
]


@pytest.mark.parametrize("reader, path, key", CHANGES)
def test_a_record_of_another_schema_is_refused_with_file_and_key(tmp_path, reader, path, key):
    content = json.loads(json.dumps(SOUND[reader]))
    record = content
    for step in path:
        record = record[step]
    for change in record.pop, lambda key: record.update({key: True}):  # absent; of another type
        change(key)
        with pytest.raises(UserError, match=f"source.json.*{key}" if path or key == "question" else "source.json"):
            open_tables(write_json(tmp_path / "source.json", content), reader)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "text"])
def test_another_structure_names_the_file(tmp_path, cache, value):
    for reader in SOUND.keys() - {read_instructions}:
        with pytest.raises(UserError, match="x.json"):
            open_tables(write_json(tmp_path / "x.json", value), reader)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def items(source: Path) -> list:
    return list(open_tables(source, read_questions)["items"])


def test_cache_is_used_and_follows_the_source(tmp_path, cache, monkeypatch):
    source = tmp_path / "q.jsonl"
    source.write_text(f'\ufeff{json.dumps(QUESTION)}\n\n{{"image": "c", "question": "d", "answer": 3}}\n')
    assert items(source) == [["a", "b", None], ["c", "d", "3"]]
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_write", None)
        items(source)
    table = open_tables(source, read_questions)["items"]
    for one in (table, pickle.loads(pickle.dumps(table))):  # as workers get it: mapped, and not copied
        assert isinstance(one._bounds, np.memmap) and isinstance(one._texts, np.memmap) and list(one) == items(source)
    source.write_text('{"image": "x", "question": "y"}\n')
    os.utime(source, ns=(1, 1))
    assert items(source) == [["x", "y", None]]


def _open_in_process(source: Path, cache: Path, results) -> None:
    os.environ["SELF1E_CACHE"] = str(cache)
    results.put(len(items(source)))


def test_several_processes_may_build_at_once(tmp_path, cache):
    source = tmp_path / "q.jsonl"
    source.write_text(f"{json.dumps(QUESTION)}\n" * 5000)
    results = CHILDREN.Queue()
    arguments = source, cache, results
    processes = [CHILDREN.Process(target=_open_in_process, args=arguments, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=300) for _ in processes] == [5000] * 3
    for process in processes:
        process.join(timeout=300)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_full_disk_names_the_variable_and_leaves_nothing(tmp_path, cache, monkeypatch):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTION))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(readers.np, "save", full)
    with pytest.raises(UserError, match="No space left.*SELF1E_CACHE"):
        items(tmp_path / "q.jsonl")
    assert not [path for path in cache.iterdir() if path.is_dir()]


PICKLES = {
    "os.system": pickle.dumps([Calls(os.system, "touch ran")], 2),
    "protocol 0": pickle.dumps([Calls(os.system, "touch ran")], 0),
    "eval": pickle.dumps(Calls(eval, "open('ran', 'w')"), 4),
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "a set": pickle.dumps({1, 2}, 2),
    "cut": pickle.dumps([reference(1, 2, 3, "train", "a cat")] * 20, protocol=2)[:99],
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_asks_for_more_than_plain_values_is_refused_and_runs_nothing(tmp_path, kind):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(PICKLES[kind])
    with pytest.raises(UserError, match="no pickle of plain values"):
        load_plain_pickle(path)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=40, deadline=None)
@given(value=values, protocol=st.integers(0, 5))
def test_plain_pickles_are_read_as_the_library_reads_them(tmp_path_factory, value, protocol):
    path = tmp_path_factory.mktemp("pickle") / "refs.p"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(path) == value


def test_byte_strings_of_python_2_are_utf8(tmp_path):
    # Protocol 2 as Python 2 wrote it: SHORT_BINSTRING for str.
    def text(raw: bytes) -> bytes:
        return b"U" + bytes([len(raw)]) + raw

    def mapping(**items: bytes) -> bytes:
        return b"}(" + b"".join(text(key.encode()) + value for key, value in items.items()) + b"u"

    sentence = mapping(sent_id=b"K\x01", sent=text("soirée".encode()))
    ref = mapping(
        ref_id=b"K\x05", image_id=b"K\x07", ann_id=b"K\x09", split=text(b"train"), sentences=b"](" + sentence + b"e"
    )
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02](" + ref + b"e.")
    built = open_tables(tmp_path / "refs(unc).p", read_refs)
    assert list(built["refs"]) == [[5, [9], [[1, "soirée"]]]] and built["refs"].keys.tolist() == [[7, 0]]
    assert list(built["splits"]) == ["train"]
