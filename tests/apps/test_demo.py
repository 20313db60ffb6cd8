"""The demo's work without its server: answers, files, limits, escaping, refusals before a model loads."""

import asyncio
import importlib.util
import json
import os
import socket
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, free_port, make_base, make_trained
from PIL import Image

from self1e.cli import main
from self1e.visualize import enlarge

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is not installed (pip install 'self1e[demo]')"
)
SEGMENT, CHAT = "Segment: one mask per prompt", "Chat: the model answers"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from self1e.apps.loading import load

    return load(str(make_trained(tmp_path_factory.mktemp("demo") / "trained")), device="cpu")


@pytest.fixture
def demo(loaded, tmp_path):
    from self1e.apps.page import Demo, Limits

    (tmp_path / "results").mkdir()
    return Demo(
        *loaded, tmp_path / "results", Limits(megapixels=1.0, prompts=20, characters=50, disk=10**9, tokens=64)
    )


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(path)
    return str(path)


def ask(demo, path, text, mode=SEGMENT, opacity=0.5, threshold=0.5):
    return list(demo.answer(path, text, mode, threshold, False, 8, opacity))


def test_results_take_no_more_disk_than_allowed(demo, picture):
    import gradio as gr

    from self1e.apps.gate import bytes_in

    demo.limits = replace(demo.limits, disk=10_000)
    ask(demo, picture, "it")
    while bytes_in(demo.folder) < 10_000:
        ask(demo, picture, "it")
    before = bytes_in(demo.folder)
    with pytest.raises(gr.Error, match="no space left for results"):
        ask(demo, picture, "it")
    assert bytes_in(demo.folder) == before


def test_answer_has_overlay_text_and_downloads(demo, picture):
    from self1e.apps.page import KEEP, paint

    ((painted, text, files, folder),) = ask(demo, picture, "the <b>star</b>\n\n Which one? \n", opacity=1.0)
    assert painted.size == (8 * 60, 8 * 40)  # small pictures are drawn larger
    assert text.count('class="seg"') == 2 and "&lt;b&gt;star" in text and "<b>star" not in text
    assert text.count("score 0.") == 2
    names = [Path(file).name for file in files]
    assert names[:2] == ["masks.zip", "predictions.json"] and len([n for n in names if n.endswith("overlay.jpg")]) == 2
    found = json.loads((Path(folder) / "predictions.json").read_text())
    assert [record["prompt"] for record in found] == ["the <b>star</b>", "Which one?"]
    with zipfile.ZipFile(files[0]) as archive:
        held = set(archive.namelist())
        assert np.array(Image.open(archive.open(found[0]["mask"]))).shape == (40, 60)
    named = {record[kind] for record in found for kind in ("image", "mask", "overlay")}
    assert held == named | {"predictions.json"}
    original = np.asarray(enlarge(Image.open(picture)), float)
    faint, strong = (np.abs(np.asarray(paint(folder, opacity), float) - original).mean() for opacity in (0, 1))
    assert faint < strong == np.abs(np.asarray(painted, float) - original).mean()
    os.utime(folder, (0, time.time() - KEEP - 60))
    ask(demo, picture, "the star")
    assert not Path(folder).exists() and len(list(demo.folder.iterdir())) == 1 and paint(folder, 0.5) is None
    *_, chatted = ask(demo, picture, "Where is it?", CHAT)
    assert chatted[1].count('class="seg"') == len(json.loads((Path(chatted[3]) / "predictions.json").read_text()))
    assert "answers.json" in [Path(file).name for file in chatted[2]]


def test_many_prompts_come_in_parts_and_stay_cheap(demo, picture):
    from self1e.apps.page import LISTED, TOGETHER

    prompts = [f"thing {number}" for number in range(20)]
    parts = ask(demo, picture, "\n".join(prompts))
    assert [part[1].count('class="seg"') for part in parts] == [TOGETHER, 2 * TOGETHER, 20]
    assert [part[2] is None for part in parts] == [True, True, False] and f"{TOGETHER} of 20" in parts[0][1]
    assert len(parts[-1][2]) == 2 < LISTED and len({part[3] for part in parts}) == 1
    assert len(zipfile.ZipFile(parts[-1][2][0]).namelist()) == 42


def test_colors_of_text_are_those_of_masks():
    from self1e.apps.page import answer_html
    from self1e.model.inference import Reply
    from self1e.visualize import PALETTE

    masks = np.zeros((3, 30, 30), bool)
    masks[0, :3] = True
    one = Reply("[SEG] & [SEG].", masks[:2], np.zeros((2, 8, 8)), [0.9, None])
    two, none = Reply("It is [SEG].", masks[2:], np.zeros((1, 8, 8)), [0.6]), Reply("No.", masks[:0], masks[:0], [])
    text = answer_html(["a", "b", "c"], [one, none, two])
    places = [text.index(f"rgb{color}") for color in PALETTE[:3]]
    assert places == sorted(places) and "no mask" in text and "&amp;" in text
    assert "score 0.90, 10.0% of the picture; empty mask" in text
    assert f"rgb{PALETTE[3]}" in answer_html(["c"], [two], first=3)


@pytest.mark.parametrize(
    ("content", "text", "message"),
    [
        (None, "it", "Choose a picture"),
        ((60, 40), " \n", "at least one prompt"),
        ((2000, 600), "it", "1.2 megapixels"),
        ((20000, 20000), "it", "400.0 megapixels"),
        (b"no picture", "it", "no picture that can be read"),
        ((60, 40), "x" * 51, "51 characters is too long"),
        ((60, 40), "x\n" * 21, "21 prompts are too many"),
        ((60, 40), "the [SEG]", "reserved token"),
        ((60, 40), "<IMG_CONTEXT> cat", "&lt;IMG_CONTEXT&gt; cat"),
    ],
)
def test_errors_are_for_the_page(demo, tmp_path, content, text, message):
    import gradio

    path = None if content is None else str(tmp_path / "input.png")
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif path:
        Image.new("1", content).save(path)
    with pytest.raises(gradio.Error, match=message) as error:
        ask(demo, path, text)
    assert str(tmp_path) not in str(error.value)


def test_a_fault_of_the_page_is_told_to_the_log_alone(demo, picture, monkeypatch, caplog):
    import gradio as gr
    from gradio.state_holder import SessionState

    from self1e.apps import page

    def broken(*args, **options):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(page, "ask", broken)
    blocks = page.build(demo, "tiny", queue=1)
    function = next(each for each in blocks.fns.values() if each.api_name == "answer")
    inputs = [{"path": picture, "meta": {"_type": "gradio.FileData"}}, "it", SEGMENT, 0.5, False, 8, 0.5]
    with pytest.raises(gr.Error) as told:
        asyncio.run(blocks.process_api(function, inputs, SessionState(blocks)))
    assert told.value.message == "The request could not be answered." and not told.value.print_exception
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "in broken" in caplog.text and "KeyError: 'a fault of ours'" in caplog.text


def test_a_fault_of_the_framework_is_told_to_the_log_alone(tmp_path, caplog):
    from self1e.apps.gate import Gate

    async def broken(scope, receive, send):
        raise KeyError("a fault of the framework")

    sent = []

    async def send(message):
        sent.append(message)

    gate = Gate(broken, tmp_path, largest=10, space=10)
    asyncio.run(gate({"type": "http", "method": "GET", "path": "/"}, None, send))
    assert sent[0]["status"] == 400 and sent[1]["body"] == b"The request could not be answered."
    (record,) = caplog.records
    assert record.levelname == "ERROR" and "in broken" in caplog.text and "a fault of the framework" in caplog.text


def test_settings_outside_their_range_are_refused(demo, picture):
    import gradio

    for setting in ({"threshold": 1.0}, {"opacity": float("nan")}, {"mode": "shell"}):
        with pytest.raises(gradio.Error, match="outside its range"):
            ask(demo, picture, "it", **setting)


def test_examples_ship_with_the_package():
    from self1e.apps.page import examples

    assert len(examples()) >= 2
    for path, prompts in examples():
        assert Image.open(path).size >= (224, 224) and Path(path).stat().st_size < 100_000 and prompts.strip()
    assert "demo_examples/*" in (ROOT / "pyproject.toml").read_text()


def test_missing_gradio_is_named(monkeypatch, capsys):
    from self1e.apps import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--version", "x"]) == 1
    assert "the demo needs Gradio: pip install 'self1e[demo]'" in capsys.readouterr().err


def test_base_model_is_refused(tmp_path, capsys):
    arguments = ["--version", str(make_base(tmp_path / "base")), "--device", "cpu", "--port", str(free_port())]
    assert main(["demo", *arguments]) == 1
    assert "--model_weights" in capsys.readouterr().err


def test_the_port_is_tried_before_the_model(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--version", "absent/model", "--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err
    for flags in (["--port", "70000"], ["--max_upload", "big"], ["--max_megapixels", "-1"], ["--queue", "0"]):
        with pytest.raises(SystemExit) as end:
            main(["demo", "--version", "absent/model", *flags])
        assert end.value.code == 2 and flags[0] in capsys.readouterr().err
