"""The demo as it is served: in a headless Chromium, over raw HTTP, to several clients at once, until SIGTERM.

`SELF1E_SCREENSHOT=file.png` keeps the browser test's screenshot, `SELF1E_DEMO_MODEL=folder` shows a trained model in
it (the picture in the documentation is made that way); without them the tests use a tiny random model.
`SELF1E_DEMO_CLIENTS=50` asks with that many clients at once.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, free_port, make_trained, noise
from PIL import Image

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="Gradio is not installed (pip install 'self1e[demo]')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
CLIENTS = int(os.environ.get("SELF1E_DEMO_CLIENTS", 8))
SEGMENT = "Segment: one mask per prompt"
FORM = {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address, process and temporary folder of `self1e demo`, with a picture limit of 1 megapixel."""
    folder = tmp_path_factory.mktemp("server")
    version = Path(os.environ.get("SELF1E_DEMO_MODEL") or make_trained(folder / "trained"))
    port = free_port()
    (folder / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "self1e",
        "demo",
        "--version",
        str(version),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    command += ["--max_megapixels", "1", "--max_upload", "1mb", "--max_disk", "20mb", "--queue", str(CLIENTS)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield url, process, folder
    finally:
        process.terminate()
        process.wait(timeout=120)


def peak_memory(pid: int) -> int:
    """Resident megabytes of a process at its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def status(url: str, **options) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, **options), timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_clients_at_once_get_their_own_answers(server, tmp_path):
    from gradio_client import Client, handle_file

    url, process, _ = server

    def ask(number: int) -> tuple[tuple[int, int], dict]:
        photo = tmp_path / f"{number}.png"
        noise(40 + number, 30, seed=number).save(photo)
        client = Client(
            url, verbose=False, httpx_kwargs={"timeout": 300}, download_files=str(tmp_path / f"client{number}")
        )
        arguments = [handle_file(str(photo)), f"thing {number}", SEGMENT, 0.5, False, 8, 0.5]
        painted, text, files = client.predict(*arguments, api_name="/answer")
        (record,) = json.loads(Path(files[1]).read_text())
        assert f"thing {number}" in text
        return Image.open(painted).size, record

    before = peak_memory(process.pid)
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(CLIENTS)))
    for number, (size, record) in enumerate(found):
        assert (record["width"], record["height"]) == (40 + number, 30)
        assert size[0] * 30 == size[1] * (40 + number) and size[0] >= 400  # small pictures are drawn larger
        assert record["prompt"] == f"thing {number}"
    grown = peak_memory(process.pid) - before
    print(f"{CLIENTS} clients at once: peak of {before + grown} MB, {grown} MB more than before")
    assert grown < 400


def test_raw_requests_reach_nothing_else(server):
    url, process, folder = server
    address = url.removeprefix("http://").split(":")
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        f"/gradio_api/file={folder}/log",
        f"/gradio_api/file={ROOT}/self1e/cli.py",
        "/static/../../../../etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/theme.css/../../etc/passwd",
    ):
        assert status(url + path) in (400, 403, 404, 405), path
        with socket.create_connection((address[0], int(address[1])), timeout=30) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert b"root:" not in answer and b"COMMANDS" not in answer, path
    for garbage in (
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection((address[0], int(address[1])), timeout=30) as raw:
            raw.sendall(garbage)
            raw.settimeout(5)
            try:
                raw.recv(1000)
            except OSError:
                pass
    forged = [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "it", SEGMENT, 0.5, False, 8, 0.5]
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/gradio_api/call/answer", json.dumps({"data": forged}).encode(), headers)
    with urllib.request.urlopen(call, timeout=30) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/answer/{event}", timeout=60) as response:
        events = response.read().decode()
    assert "event: error" in events and "root:" not in events
    boundary = b"--b\r\nContent-Disposition: form-data; name=files; filename=../../x.png\r\n\r\n"
    large = boundary + b"\0" * 2_000_000 + b"\r\n--b--\r\n"
    assert status(f"{url}/gradio_api/upload", data=large, headers=FORM) == 413
    assert status(f"{url}/gradio_api/upload", data=iter([large]), headers=FORM) == 411
    assert status(url) == 200 and process.poll() is None
    assert not list(folder.rglob("x.png"))


JUNK: list = [None, 3, "x", [], {}, {"path": 3}, 1e400, ["x"] * 7]
BODIES = [{"data": junk} for junk in JUNK] + [{"data": [junk] * 7} for junk in JUNK] + [{}, [], None]
RAW = [b"{", b"\xff", b"[" * 100_000]


def test_malformed_calls_are_refused(server):
    """No call with nonsense is answered, none ends the server, tracebacks go to the log alone (see the last test)."""
    url, process, _ = server
    indexed = [{"data": [], "fn_index": number, "session_hash": "a"} for number in (-1, 0, 4, 99, "x", None)]
    bodies = [json.dumps(body).encode() for body in [*BODIES, *indexed]] + RAW
    for path in (
        "call/answer",
        "call/unknown",
        "run/answer",
        "run/predict",
        "queue/join",
        "cancel",
        "component_server",
    ):
        for body in bodies:
            headers = {"Content-Type": "application/json"}
            call = urllib.request.Request(f"{url}/gradio_api/{path}", body, headers)
            try:
                with urllib.request.urlopen(call, timeout=60) as response:
                    text = response.read().decode()
                if path.startswith("call/"):
                    event = f"{url}/gradio_api/{path}/{json.loads(text)['event_id']}"
                    with urllib.request.urlopen(event, timeout=60) as response:
                        text = response.read().decode()
                    assert "event: error" in text, (body, text)
            except urllib.error.HTTPError as error:
                text = error.read().decode()
            assert "Traceback" not in text and "site-packages" not in text
    assert status(url) == 200 and process.poll() is None


@pytest.fixture
def browser():
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Chromium (Debian's package `chromium`) and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)


def test_in_a_browser(server, browser, tmp_path):
    from playwright.sync_api import expect

    from self1e.apps.page import examples

    url = server[0]
    photo, prompts = examples()[1]
    Image.new("RGB", (1500, 1000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    asked = []
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.route(lambda address: not address.startswith((url, "data:", "blob:")),
               lambda route: (asked.append(route.request.url), route.abort()))  # fmt: skip
    page.goto(url)
    run = page.locator("#run")
    run.click()
    expect(page.get_by_text("Choose a picture first.")).to_be_visible(timeout=30_000)
    for name, message in (("large.png", "1.5 megapixels"), ("text.png", "no picture that can be read")):
        page.locator("#picture input[type=file]").set_input_files(tmp_path / name)
        page.locator("#prompts textarea").fill("anything")
        page.locator("#picture img").wait_for(state="attached")
        run.click()
        expect(page.get_by_text(message)).to_be_visible(timeout=30_000)
        page.reload()
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.locator("#picture img").wait_for()
    page.locator("#prompts textarea").fill("<IMG_CONTEXT> <b>cat</b>")
    run.click()
    expect(page.get_by_text("'<IMG_CONTEXT> <b>cat</b>' holds the reserved token")).to_be_visible(timeout=30_000)
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
    expect(page.locator("#downloads a[href$='masks.zip']")).to_be_visible()
    expect(page.locator("#downloads a[href$='predictions.json']")).to_be_visible()

    with page.expect_download() as download:
        page.locator("#downloads a[href$='.png']").first.click()
    mask = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    mask.load()
    assert mask.format == "PNG" and mask.size == Image.open(photo).size and set(np.unique(mask)) <= {0, 255}

    with urllib.request.urlopen(first, timeout=30) as response:
        painted = np.asarray(Image.open(io.BytesIO(response.read())).convert("RGB"), float)
    original = np.asarray(Image.open(photo).convert("RGB"), float)
    assert painted.shape == original.shape and np.abs(painted - original)[np.asarray(mask) > 0].mean() > 5
    if "SELF1E_SCREENSHOT" in os.environ:
        page.mouse.move(0, 0)
        page.screenshot(path=os.environ["SELF1E_SCREENSHOT"], full_page=True)
    page.locator("#opacity input[type=number]").fill("1")
    page.wait_for_function("first => document.querySelector('#overlay img').src != first", arg=first)
    assert asked == [], "the page must not contact other machines"


def test_on_a_phone(server, browser, tmp_path):
    from playwright.sync_api import expect

    photo = tmp_path / "small.png"
    noise(30, 20).save(photo)
    page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.goto(server[0])
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.locator("#picture img").wait_for()
    page.locator("#prompts textarea").fill("the thing with a rather long description of what it is and does")
    page.locator("#run").tap()
    expect(page.locator("#answer .seg")).to_have_count(1, timeout=60_000)
    expect(page.locator("#overlay img")).to_be_in_viewport()
    expect(page.locator("#cancel")).to_be_in_viewport()
    assert page.locator("#overlay img").bounding_box()["width"] > 300  # a small picture is shown larger
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#downloads a[href$='masks.zip']").scroll_into_view_if_needed()
    if "SELF1E_SCREENSHOT" in os.environ:
        page.screenshot(path=Path(os.environ["SELF1E_SCREENSHOT"]).with_suffix(".phone.png"), full_page=True)


def page_with_prompts(server, browser, tmp_path, count):
    """The page on a desktop with a small picture and as many prompts, not run yet."""
    photo = tmp_path / "small.png"
    noise(30, 20).save(photo)
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(server[0])
    page.locator("#picture input[type=file]").set_input_files(photo)
    page.locator("#picture img").wait_for()
    page.locator("#prompts textarea").fill("\n".join(f"thing {number}" for number in range(count)))
    return page


def test_two_hundred_prompts_can_be_cancelled_or_waited_for(server, browser, tmp_path):
    from playwright.sync_api import expect

    page = page_with_prompts(server, browser, tmp_path, 200)
    run, waiting, marks = (
        page.locator("#run"),
        page.get_by_text("of 200 prompts are done"),
        page.locator("#answer .seg"),
    )
    run.click()
    expect(waiting).to_be_visible(timeout=60_000)
    page.locator("#cancel").click()
    expect(page.locator("#answer .generating, #overlay .generating")).to_have_count(0, timeout=60_000)
    done = marks.count()
    assert 0 < done < 200
    page.wait_for_timeout(1500)  # another group of prompts would have been answered by now
    assert marks.count() == done
    with page.expect_download() as download:
        page.locator("#downloads a[href$='masks.zip']").click()
    with zipfile.ZipFile(download.value.path()) as archive:  # what is done is kept
        kept = [record["mask"] for record in json.loads(archive.read("predictions.json"))]
        assert set(kept) < set(archive.namelist()) and done <= len(kept) < 200

    run.click()
    expect(marks).to_have_count(200, timeout=300_000)
    expect(waiting).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollHeight") < 2500
    page.set_viewport_size({"width": 1280, "height": 12_000})
    expect(marks.first).to_be_in_viewport()
    expect(marks.last).not_to_be_in_viewport()  # the list scrolls in a box of its own
    expect(page.locator("#downloads a[href$='masks.zip']")).to_be_visible()
    assert page.locator("#downloads a[href$='.png']").count() == 0  # 400 files are in the ZIP
    if "SELF1E_SCREENSHOT" in os.environ:
        page.screenshot(path=Path(os.environ["SELF1E_SCREENSHOT"]).with_suffix(".many.png"), full_page=True)


def test_run_right_after_cancel_is_heard(server, browser, tmp_path):
    from playwright.sync_api import expect

    page = page_with_prompts(server, browser, tmp_path, 100)
    page.locator("#run").click()
    expect(page.get_by_text("of 100 prompts are done")).to_be_visible(timeout=60_000)
    page.evaluate("document.querySelector('#cancel').click(), document.querySelector('#run').click()")
    expect(page.locator("#answer .seg")).to_have_count(100, timeout=120_000)  # the first run has stopped before


def test_uploads_take_no_more_disk_than_allowed(server):
    """The next to last test of this file, because it leaves no space: twenty megabytes are allowed."""
    url, _, folder = server
    answers = []
    for number in range(25):
        data = b"--b\r\nContent-Disposition: form-data; name=files; filename=x.png\r\n\r\n"
        data += number.to_bytes(1, "big") * 950_000 + b"\r\n--b--\r\n"
        answers.append(status(f"{url}/gradio_api/upload", data=data, headers=FORM))
    assert 200 in answers and answers[-1] == 507 and set(answers) == {200, 507}
    assert sum(path.stat().st_size for path in (folder / "tmp").rglob("uploads/**/*") if path.is_file()) < 20e6


def test_sigterm_leaves_nothing_behind(server):
    """The last test of this file, because it ends the server."""
    _, process, folder = server
    assert list((folder / "tmp").glob("self1e_demo_*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not list((folder / "tmp").iterdir())
    log = (folder / "log").read_text()
    assert "Self1E is at http://127.0.0.1" in log and "public link" not in log
    above = set(re.findall(r"(.*)\n+Traceback \(most recent call last\)", log))  # what introduces each traceback
    assert "a call failed" in above and all("exception" in line for line in above - {"a call failed"}), above
