"""self1e/data/tables.py: streaming parser, cache, schemas, pickles that are not what they should be."""

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from trees import SQUARE, instances, reference, write_json

from self1e.data import tables
from self1e.data.coco import CocoIndex
from self1e.data.readers import read_coco, read_instructions, read_questions, read_refs, stream_json
from self1e.data.sets.custom_source import read_prompt_table
from self1e.data.tables import Writer, open_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF1E_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        ' [1, 2.5, "a]"] ',
        "{}",
        '{"a": [], "b": [1, [2]], "c": {"d": [3]}, "e": 4}',
        '\n{ "a" :[ {"x" : "é\\u00e9"} , null ] }\n',
    ],
)
def test_streaming_equals_json_loads(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    rebuilt = {}
    for key, value, source in stream_json(path):
        assert json.loads(source) == value
        rebuilt.setdefault(key, []).append(value)
    expected = json.loads(text)
    if isinstance(expected, list):
        assert rebuilt.get(None, []) == expected
    else:
        assert rebuilt == {k: v if isinstance(v, list) and v else [v] for k, v in expected.items()}


@pytest.mark.parametrize("text", ["", "[1, 2", '{"a": [1}', "[1 2]", '{"a" 1}', '{"a": 1 "b": 2}', "12", '["é'])
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json.*download it again"):
        list(stream_json(tmp_path / "x.json"))


def test_coco_look_ups_do_not_depend_on_the_order_of_ids(tmp_path):
    annotations = [{"id": i, "image_id": owner, "segmentation": [SQUARE]} for i, owner in ((9, 7), (4, 5), (6, 7))]
    path = write_json(tmp_path / "instances.json", instances([(7, "b.jpg"), (5, "a.jpg")], annotations))
    coco = pickle.loads(pickle.dumps(CocoIndex(path)))  # as a worker process gets it
    assert [coco.image(int(row))[0] for row in coco.image_rows([5, 7])] == ["a.jpg", "b.jpg"]
    assert coco.image_ids.tolist() == [7, 5]
    assert coco.annotation(6)["image_id"] == 7
    assert [coco.annotation_at(row)["id"] for row in coco.annotation_rows(7)] == [9, 6]
    assert not len(coco.annotation_rows(8))
    with pytest.raises(KeyError, match="image id 8"):
        coco.image_rows([5, 8])
    with pytest.raises(KeyError, match="annotation id 5"):
        coco.annotation(5)


def test_a_record_of_another_schema_is_named(tmp_path):
    sound = instances([(7, "b.jpg"), (5, "a.jpg")], [{"id": i, "image_id": 7, "segmentation": []} for i in range(3)])

    def message(key, number, field, value=None):
        content = json.loads(json.dumps(sound))
        content[key][number].pop(field)
        content[key][number] |= {} if value is None else {field: value}
        with pytest.raises(ValueError) as error:
            CocoIndex(write_json(tmp_path / "paco.json", content))
        return str(error.value).removeprefix(str(tmp_path))

    assert message("annotations", 2, "image_id").startswith("/paco.json, annotations[2]: key 'image_id' is missing")
    assert message("annotations", 1, "id", "9").startswith(
        "/paco.json, annotations[1]: unexpected structure (id is '9'"
    )
    assert message("images", 1, "height", 0).startswith("/paco.json, images[1]: unexpected structure (height")
    assert message("categories", 0, "name").startswith("/paco.json, categories[0]: key 'name'")
    del sound["images"]
    with pytest.raises(ValueError, match="paco.json: key 'images' is missing"):
        CocoIndex(write_json(tmp_path / "paco.json", sound))
    refs = [reference(1, 7, 1, "val", "it"), {"ref_id": 2}]
    with pytest.raises(ValueError, match=r"grefs.json, record 1 counted from 0: key 'ann_id' is missing"):
        open_index(write_json(tmp_path / "grefs.json", refs), read_refs)


def test_cache_is_used_and_follows_the_source(tmp_path, cache, monkeypatch):
    source = tmp_path / "q.jsonl"
    source.write_text('{"image": "a", "question": "b"}\n\n{"image": "c", "question": "d", "answer": 3}\n')
    assert list(open_index(source, read_questions).table("items")) == [["a", "b", None], ["c", "d", "3"]]
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_build", lambda *_: pytest.fail("built again"))
        open_index(source, read_questions)
    source.write_text('{"image": "x", "question": "y"}\n')
    os.utime(source, ns=(1, 1))
    assert list(open_index(source, read_questions).table("items")) == [["x", "y", None]]
    assert sorted(path.suffix for path in cache.iterdir()) == ["", "", ".lock", ".lock"]


def _open_in_process(source: Path, results) -> None:
    results.put(len(open_index(source, read_questions).table("items")))


def test_several_processes_may_build_at_once(tmp_path, cache):
    source = tmp_path / "q.jsonl"
    source.write_text('{"image": "a", "question": "b"}\n' * 5000)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(source, results), daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=300) for _ in processes] == [5000] * 4
    for process in processes:
        process.join(timeout=300)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EEXIST])
def test_another_machine_may_finish_the_same_index_first(tmp_path, cache, monkeypatch, code):
    source = tmp_path / "q.jsonl"
    source.write_text('{"image": "a", "question": "b"}\n')
    rename = os.rename

    def second(built, final):
        rename(built, final)  # the other machine's
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tables.os, "rename", second)
    assert len(open_index(source, read_questions).table("items")) == 1
    assert [path.name[:2] for path in cache.iterdir() if path.is_dir()] == ["q-"]


def test_full_disk_names_the_variable_and_leaves_nothing(tmp_path, cache, monkeypatch):
    source = tmp_path / "q.jsonl"
    source.write_text('{"image": "a", "question": "b"}\n')

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.np, "save", full)
    with pytest.raises(OSError, match="No space left.*SELF1E_CACHE"):
        open_index(source, read_questions)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "reader, name, value, key",
    [
        (read_coco, "instances.json", {"info": {}, "images": []}, "annotations"),
        (read_coco, "instances.json", {"images": [{"id": 1, "file_name": "x"}]}, "height"),
        (read_coco, "instances.json", {"images": [], "annotations": [{"id": 1}], "categories": []}, "category_id"),
        (read_instructions, "llava.json", [{"id": "1", "image": "x.jpg"}], "conversations"),
        (read_questions, "q.jsonl", {"image": "x.jpg", "text": "y"}, "question"),
        (read_refs, "grefs(unc).json", [{"ref_id": 1}], "ann_id"),
    ],
)
def test_another_schema_names_file_key_and_readme(tmp_path, cache, reader, name, value, key):
    with pytest.raises(ValueError) as error:
        open_index(write_json(tmp_path / name, value), reader)
    for word in name, repr(key), "docs/data.md, section Datasets":
        assert word in str(error.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "text"])
def test_another_structure_names_the_file(tmp_path, value):
    for reader in (read_coco, read_instructions, read_questions, read_refs):
        with pytest.raises(ValueError, match="x.json"):
            open_index(write_json(tmp_path / "x.json", value), reader)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_calls_something_is_refused_and_runs_nothing(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([Malicious(tmp_path / "ran")], protocol=2))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p.*system.*plain values"):
        open_index(path, read_refs)
    assert not (tmp_path / "ran").exists()


def test_corrupt_pickles_name_the_file(tmp_path):
    whole = pickle.dumps([reference(1, 2, 3, "train", "a cat")] * 20, protocol=2)
    rng = np.random.default_rng(0)
    broken = [b"", b"\x80\x02", whole[: len(whole) // 2], whole[:-1], rng.bytes(200), pickle.dumps({1, 2}, protocol=2)]
    for raw in broken:
        path = tmp_path / "refs(unc).p"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
            open_index(path, read_refs)


def test_python_2_strings_in_utf8_and_latin1(tmp_path):
    # Protocol 2 as Python 2 wrote it: SHORT_BINSTRING for str.
    def text(raw: bytes) -> bytes:
        return b"U" + bytes([len(raw)]) + raw

    def mapping(**items: bytes) -> bytes:
        return b"}(" + b"".join(text(key.encode()) + value for key, value in items.items()) + b"u"

    sentences = [mapping(sent_id=b"K\x01", sent=text(raw)) for raw in ("soirée".encode(), "café".encode("latin-1"))]
    ref = mapping(
        ref_id=b"K\x05",
        image_id=b"K\x07",
        ann_id=b"K\x09",
        split=text(b"train"),
        sentences=b"](" + b"".join(sentences) + b"e",
    )
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02](" + ref + b"e.")
    built = open_index(tmp_path / "refs(unc).p", read_refs)
    assert list(built.table("groups")) == [[7, [[5, [9], [[1, "soirée"], [1, "café"]]]]]]
    assert built.meta["splits"] == [["train", 0, 1]]


def test_readers_tell_how_far_they_are(tmp_path, monkeypatch):
    """A bar shows while a long pickle or CSV is read, as for JSON."""
    seen: list[float] = []
    monkeypatch.setattr(Writer, "progress", lambda self, done, total: seen.append(done / total))
    refs = [{"image_id": i, "ref_id": i, "ann_id": i, "split": "val", "sentences": []} for i in range(2000)]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs))
    open_index(tmp_path / "refs.p", read_refs)
    assert seen == sorted(seen) and len(set(seen)) > 2 and seen[-1] > 0.7
    seen.clear()
    rows = "".join(f"{i}.jpg,{i}.png,the thing number {i}\n" for i in range(2000))
    (tmp_path / "own.csv").write_text("image,mask,prompt\n" + rows)
    open_index(tmp_path / "own.csv", read_prompt_table)
    assert seen == sorted(seen) and len(set(seen)) > 2 and seen[-1] == 1
