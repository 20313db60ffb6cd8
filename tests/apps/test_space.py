"""examples/space: laid out as a Space has it, started, asked, stopped; its requirements and its front matter."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, free_port, noise

SPACE = ROOT / "examples" / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def space(tmp_path) -> Path:
    """The folder that the README beside app.py makes: its files, and the package beside them."""
    folder = Path(shutil.copytree(SPACE, tmp_path / "space"))
    (folder / "self1e").symlink_to(ROOT / "self1e")
    return folder


def start(space: Path, **variables: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SELF1E_VERSION")}
    environment = kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "app.py"]
    return subprocess.Popen(
        command, cwd=space, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")
def test_the_space_answers_with_the_checkpoint_of_its_variable(space, version, tmp_path):
    from gradio_client import Client, handle_file

    port = str(free_port())
    app = start(space, SELF1E_VERSION=version, GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=port)
    try:
        for line in app.stdout:
            if line.startswith("Self1E is at"):
                break
        assert app.poll() is None
        noise(40, 30).save(tmp_path / "photo.png")
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "client"))
        mode = "Segment: one mask per prompt"
        _, text, files = client.predict(
            handle_file(str(tmp_path / "photo.png")), "a thing", mode, 0.5, False, 8, 0.5, api_name="/answer"
        )
        (record,) = json.loads(Path(files[1]).read_text())
        assert "a thing" in text and (record["width"], record["height"]) == (40, 30)
        app.terminate()
        assert app.wait(120) == 0
    finally:
        app.kill()


def test_a_space_without_its_variable_says_so(space):
    printed, _ = (app := start(space)).communicate(timeout=400)
    assert app.returncode == 1 and printed.startswith("SELF1E_VERSION is not set") and "Traceback" not in printed


def test_the_space_needs_what_the_project_needs():
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PROJECT["dependencies"]
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file() and front["license"] == "apache-2.0"
    least, below = re.fullmatch(r"gradio>=(\d+),<(\d+)", *PROJECT["optional-dependencies"]["demo"]).groups()
    assert int(least) <= int(front["sdk_version"].split(".")[0]) < int(below)
    assert front["python_version"] >= PROJECT["requires-python"].removeprefix(">=")
