"""The demo's page: its functions, and the page itself in a headless Chromium.

`SELF1E_SCREENSHOT=file.png` keeps the browser test's screenshot, `SELF1E_DEMO_MODEL=folder` shows a trained model in
it (the README's picture is made that way); without them the test uses a tiny random model.
"""

import importlib.util
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_base, make_trained
from PIL import Image

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is not installed (pip install 'self1e[demo]')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return Path(os.environ.get("SELF1E_DEMO_MODEL") or make_trained(tmp_path_factory.mktemp("demo") / "trained"))


@pytest.fixture
def demo(version, tmp_path):
    from self1e.apps.demo import Demo
    from self1e.apps.predict import load

    return Demo(*load(str(version), device="cpu"), tmp_path, max_megapixels=1.0)


def ask(demo, image, text, mode="Segment: one mask a prompt", opacity=0.5):
    return demo.answer(image, text, mode, 0.5, False, 8, opacity)


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((60, 40)).convert("RGB")


def test_answer_has_overlay_text_and_downloads(demo):
    from self1e.apps.demo import KEEP, paint

    image = picture()
    painted, text, files, shown = ask(demo, image, "the <b>star</b>\n\n Which one? \n", opacity=1.0)
    assert painted.size == (60, 40) and shown[1].shape == (2, 40, 60)
    assert text.count('class="seg"') == 2 and "&lt;b&gt;star" in text and "<b>star" not in text
    *masks, records = files
    assert [np.array(Image.open(mask)).shape for mask in masks] == [(40, 60)] * 2
    assert [record["prompt"] for record in json.loads(Path(records).read_text())] == ["the <b>star</b>", "Which one?"]
    faint = np.asarray(paint(shown, 0.0), float) - np.asarray(image, float)
    strong = np.asarray(painted, float) - np.asarray(image, float)
    assert np.abs(faint).mean() < np.abs(strong).mean()
    os.utime(Path(records).parent, (0, time.time() - KEEP - 60))
    ask(demo, image, "the star")
    assert not Path(records).exists() and len(list(demo.folder.iterdir())) == 1
    chatted = ask(demo, image, "Where is it?", "Chat: the model answers")
    assert chatted[1].count('class="seg"') == len(chatted[3][1])


def test_colors_of_text_are_those_of_masks():
    from self1e.apps.demo import answer_html, paint
    from self1e.model.inference import Reply
    from self1e.visualize import PALETTE

    masks = np.zeros((3, 30, 30), bool)
    for index, mask in enumerate(masks):
        mask[10 * index : 10 * index + 9] = True
    one = Reply("[SEG] & [SEG].", masks[:2], np.zeros((2, 8, 8)), [0.9, None])
    two, none = Reply("It is [SEG].", masks[2:], np.zeros((1, 8, 8)), [0.6]), Reply("No.", masks[:0], masks[:0], [])
    text = answer_html(["a", "b", "c"], [one, none, two])
    places = [text.index(f"rgb{color}") for color in PALETTE[:3]]
    assert places == sorted(places) and "no mask" in text and "&amp;" in text
    painted = np.asarray(paint((Image.new("RGB", (30, 30)), masks), 1.0))
    assert [tuple(painted[row, 15]) for row in (4, 14, 24)] == list(PALETTE[:3])


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (None, "it", "Choose a picture"),
        (picture(), " \n", "at least one prompt"),
        (Image.new("RGB", (2000, 600)), "it", "1.2 megapixels"),
        (picture(), "the [SEG]", "reserved token"),
    ],
)
def test_errors_are_for_the_page(demo, image, text, message):
    import gradio

    with pytest.raises(gradio.Error, match=message):
        ask(demo, image, text)


def test_examples_ship_with_the_package():
    from self1e.apps.demo import examples

    assert len(examples()) >= 2
    for path, prompts in examples():
        assert Image.open(path).size >= (224, 224) and Path(path).stat().st_size < 100_000 and prompts.strip()
    assert "demo_examples/*" in (ROOT / "pyproject.toml").read_text()


def test_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"the demo needs Gradio: pip install 'self1e\[demo\]'"):
        runpy.run_path(str(ROOT / "self1e/apps/demo.py"))


def test_base_model_is_refused(tmp_path, capsys):
    from self1e.apps.demo import main

    assert main(["--version", str(make_base(tmp_path / "base")), "--device", "cpu"]) == 1
    assert "--model_weights" in capsys.readouterr().err


@pytest.fixture
def server(version, tmp_path):
    """The address of `python -m self1e.apps.demo`, running with a picture limit of 1 megapixel."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "self1e.demo", "--version", str(version), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--max_megapixels", "1"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(tmp_path / "cache")},
        )  # fmt: skip
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's package `chromium`)")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_in_a_browser(server, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    from self1e.apps.demo import examples

    photo, prompts = examples()[1]
    Image.new("RGB", (1500, 1000)).save(tmp_path / "large.png")
    asked = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.route(lambda url: not url.startswith((server, "data:", "blob:")),
                   lambda route: (asked.append(route.request.url), route.abort()))  # fmt: skip
        page.goto(server)
        run = page.locator("#run")
        run.click()
        expect(page.get_by_text("Choose a picture first.")).to_be_visible(timeout=30_000)
        page.locator("#picture input[type=file]").set_input_files(tmp_path / "large.png")
        page.locator("#prompts textarea").fill("anything")
        page.locator("#picture img").wait_for()
        run.click()
        expect(page.get_by_text("1.5 megapixels")).to_be_visible(timeout=30_000)
        page.reload()

        page.locator("#picture input[type=file]").set_input_files(photo)
        page.locator("#prompts textarea").fill(prompts)
        page.locator("#picture img").wait_for()
        run.click()
        overlay = page.locator("#overlay img")
        overlay.wait_for(timeout=60_000)
        first = overlay.get_attribute("src")
        marks = page.locator("#answer .seg")
        expect(marks).to_have_count(len(prompts.splitlines()))
        assert len(set(marks.evaluate_all("marks => marks.map(m => m.style.backgroundColor)"))) == marks.count()
        expect(page.locator("#downloads a[href$='predictions.json']")).to_be_visible()

        with page.expect_download() as download:
            page.locator("#downloads a").first.click()
        mask = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
        mask.load()
        assert mask.format == "PNG" and mask.size == Image.open(photo).size and set(np.unique(mask)) <= {0, 255}

        with urllib.request.urlopen(first) as response:
            painted = np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"), float)
        original = np.asarray(Image.open(photo).convert("RGB"), float)
        assert painted.shape == original.shape and np.abs(painted - original)[np.asarray(mask) > 0].mean() > 5
        if "SELF1E_SCREENSHOT" in os.environ:
            page.mouse.move(0, 0)
            page.screenshot(path=os.environ["SELF1E_SCREENSHOT"], full_page=True)
        page.locator("#opacity input[type=number]").fill("1")
        page.wait_for_function("first => document.querySelector('#overlay img').src != first", arg=first)
        browser.close()
    assert asked == [], "the page must not contact other machines"
