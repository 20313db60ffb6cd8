"""The demo as it is served: in a headless Chromium, to several clients at once, until SIGTERM, behind a proxy.

`SELF1E_SCREENSHOT=file.png` keeps screenshots, `SELF1E_DEMO_MODEL=folder` shows a trained model in them (the picture
in the documentation is made that way); without them the tests use a tiny random model.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, free_port, make_trained, noise
from PIL import Image

from self1e.apps.demo import CHAT, SEGMENT, marked
from self1e.model.inference import Reply

pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'self1e[demo]')")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXAMPLE = files("self1e.apps") / "demo_examples/star_ring_square_triangle.jpg"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def serve(folder):
    """Address, process and folder of `self1e demo` in a shell whose proxies lead nowhere."""
    port = free_port()
    version = os.environ.get("SELF1E_DEMO_MODEL") or make_trained(folder / "trained")
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "self1e", "demo", "--version", str(version), "--port", str(port)]
    proxies = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "all_proxy": "socks5://127.0.0.1:9"}
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "CUDA_VISIBLE_DEVICES": ""} | proxies
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--max_upload", "1mb"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        for _ in range(480):
            assert process.poll() is None, (folder / "log").read_text()
            if "until Ctrl-C" in (folder / "log").read_text():
                break
            time.sleep(0.25)
        OPENER.open(f"http://127.0.0.1:{port}", timeout=60).close()
        yield f"http://127.0.0.1:{port}", process, folder
    finally:
        process.terminate()
        process.wait(timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server")) as served:
        yield served


def test_clients_at_once_get_their_own_answers(server, tmp_path):
    from gradio_client import Client, handle_file

    def ask(number: int) -> None:
        photo = tmp_path / f"{number}.png"
        noise(40 + number, 30, seed=number).save(photo)
        client = Client(
            server[0], verbose=False, httpx_kwargs={"trust_env": False}, download_files=str(tmp_path / f"c{number}")
        )
        mode = (SEGMENT, CHAT)[number % 2]
        job = client.submit(handle_file(str(photo)), f"thing {number}\nit", mode, api_name="/answer")
        painted, words, made, status = job.result(timeout=300)[:4]
        assert Image.open(painted).size == (40 + number, 30)
        assert words["value"][0]["token"].startswith(f"thing {number}: ") and status == "2 of 2"
        data = json.loads(Path(made[0]).read_text())
        assert (data["images"][0]["width"], data["images"][0]["file_name"]) == (40 + number, photo.name)
        assert mode == CHAT or len(made) == 3  # the COCO file and two masks

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))


def test_a_torn_photo_is_refused_without_the_servers_paths(server, tmp_path):
    from gradio_client import Client, handle_file

    noise(40, 30).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:500])
    client = Client(server[0], verbose=False, httpx_kwargs={"trust_env": False})
    with pytest.raises(Exception, match="no photo that can be read") as error:
        client.predict(handle_file(str(tmp_path / "torn.png")), "it", SEGMENT, api_name="/answer")
    assert "torn.png" not in str(error.value)


def test_a_port_in_use_is_one_line(server):
    url, process, folder = server
    command = [sys.executable, "-m", "self1e", "demo", "--version", str(folder / "trained"), "--port", url[-5:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "--port" in done.stderr and "Traceback" not in done.stderr


def test_files_of_the_server_are_out_of_reach(server):
    for path in ("/etc/passwd", f"{server[2]}/log", f"{ROOT}/self1e/cli.py", "../../../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as error:
            OPENER.open(f"{server[0]}/gradio_api/file={path}", timeout=30)
        assert error.value.code in (400, 403, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package `chromium`) and playwright")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(server, tmp_path, width):
    """A refusal; prompts and their masks; a run that is cancelled: on a desktop and on a phone."""
    playwright = pytest.importorskip("playwright.sync_api")
    url, asked = server[0], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        expect = playwright.expect
        expect.set_options(timeout=60_000)
        page.goto(url)
        status, prompts = page.locator("#status"), page.locator("#prompts textarea")
        page.locator("#photo input[type=file]").set_input_files(str(EXAMPLE))
        page.locator("#photo img").wait_for()
        prompts.fill("<IMG_CONTEXT> <b>cat</b>")
        page.locator("#run").click()
        expect(page.get_by_text("'<IMG_CONTEXT> <b>cat</b>' holds the reserved token")).to_be_visible()
        page.reload()

        page.locator("#photo input[type=file]").set_input_files(str(EXAMPLE))
        page.locator("#photo img").wait_for()
        prompts.fill("the yellow ring\nthe <b>star</b>")
        page.locator("#run").click()
        expect(status).to_contain_text("2 of 2")
        expect(page.locator("#answers")).to_contain_text("the <b>star</b>: ")
        expect(page.locator("#overlay img")).to_be_in_viewport()
        with page.expect_download() as download:
            page.locator("#files a[href$='.png']").first.click()
        mask = np.array(Image.open(download.value.path()))
        assert mask.shape == Image.open(EXAMPLE).size[::-1] and set(np.unique(mask)) <= {0, 255}
        if "SELF1E_SCREENSHOT" in os.environ:
            page.screenshot(path=Path(os.environ["SELF1E_SCREENSHOT"]).with_suffix(f".{width}.png"), full_page=True)

        prompts.fill("\n".join(f"thing {number}" for number in range(100)))
        page.locator("#run").click()
        expect(status).to_have_text(re.compile(r"^\s*[1-9]\d* of 100"))
        page.locator("#cancel").click()
        expect(status).to_contain_text("cancelled: ")
        done = int(status.inner_text().split()[1])
        assert 0 < done < 100 and status.inner_text().strip() == f"cancelled: {done} of 100 done"
        assert page.locator("#files a[href$='.png']").count() >= done
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
        browser.close()


def test_sigterm_leaves_nothing_behind(tmp_path):
    """In the middle of a request."""
    from gradio_client import Client, handle_file

    with serve(tmp_path) as (url, process, _):
        client = Client(url, verbose=False, httpx_kwargs={"trust_env": False})
        job = client.submit(handle_file(str(EXAMPLE)), "thing\n" * 100, CHAT, api_name="/answer")
        while not job.outputs():
            assert not job.done()
            time.sleep(0.05)
        assert list((tmp_path / "tmp").glob("self1e_demo_*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0 and not list((tmp_path / "tmp").glob("self1e*"))
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_colours_of_answers_are_those_of_masks():
    masks = np.zeros((2, 30, 30), bool)
    masks[0, :3] = True
    replies = [Reply("[SEG] & [SEG].", masks, masks, [0.9, None]), Reply("No.", masks[:0], masks[:0], [])]
    words, colors = marked(["a", "b"], replies)
    assert "".join(word for word, _ in words) == "a: [SEG] & [SEG].\nb: No.\n"
    assert colors == {"1: 10.0%, 0.90": "#009e73", "2: empty": "#e69f00"}
    assert [label for _, label in words if label] == list(colors)
