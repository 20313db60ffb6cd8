"""Every bash and Python block of the README and of docs/ runs as pasted, where all that it names is there in small.

The folder links to the project's programs. Hub ids are folders in it: `OpenGVLab/InternVL3-2B` a tiny base, and
`UltraDoughnut/SELF1E` a tiny checkpoint of the published layout. `runs/X` is a trained and evaluated run, unless the
block makes X itself. Two things are changed: training takes one step without evaluation, and a launcher gets a free
port. Blocks of the README that train run in bash; other commands run in this process, without launcher. The Python
blocks of a page run one after another. What does not run here stands in `LEFT_OUT`.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, free_port, make_base, make_trained
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor, cli
from self1e.model.weights import save_checkpoint
from self1e.synthetic.shapes_dataset import make_shapes_dataset

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("train_hf_ivl_seq.py", "eval_all.sh", "eval_vqas.sh", "configs", "scripts", "examples", "self1e")
LEFT_OUT = {  # a line that starts with one of these is not run
    "bash scripts/quickstart.sh": "takes six minutes",
    "bash scripts/test.sh": "is what runs this",
    "bash scripts/get_data.sh": "needs the network; tests/scripts runs it",
    "DATASET_DIR=/big/dataset": "the same",
    "python3 -m venv": "changes the environment",
    ".venv/bin/pip": "the same",
    "pip install": "the same",
    "source .venv/bin/activate": "the environment is activated",
    "self1e demo": "serves until it is stopped; tests/apps/test_demo.py runs it",
    "hf upload": "needs the hub",
    "bash eval_vqas.sh runs/NAME --dynamic --score_only": "tests/evaluation/vqa scores saved answers",
    "bash eval_vqas.sh --version": "tests/evaluation/vqa compares models",
    "python -m lmms_eval": "needs lmms-eval; tests/apps/test_lmms_eval.py",
}
if torch.__version__ < "2.14":
    LEFT_OUT |= dict.fromkeys(("self1e export", "python examples/run_onnx.py"), "needs torch 2.14")


def blocks(language: str) -> list:
    """(page, text) of each block of a language, with an id for pytest."""
    return [
        pytest.param(page, text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()), 1)
        if kind == language
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `base` and `published`, and in `run` what a training and an evaluation leave."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", image_size=56)
    trained = make_trained(folder / "run/ckpt_model", base)
    model, processor = Self1EForSegmentation.from_pretrained(trained), Self1EProcessor.from_pretrained(trained)
    save_checkpoint(model, processor, folder / "published", published=True)
    return folder


@pytest.fixture(scope="module")
def trees(models) -> Path:
    """A folder with `dataset` and `data`; the run in `models` is evaluated on it."""
    tree = make_shapes_dataset(models / "trees", train=8, val=2, size=64)
    flags = ["--val_dataset", "refcoco|unc|val", "--dataset_dir", str(tree / "dataset"), "--workers", "0"]
    assert cli.main(["eval", "segmentation", str(models / "run"), *flags]) == 0
    return tree


@pytest.fixture
def folder(tmp_path, models, trees, monkeypatch) -> Path:
    """The folder that the blocks run in."""
    links = {name: ROOT / name for name in PROGRAMS} | {name: trees / name for name in ("dataset", "data")}
    links |= {"OpenGVLab/InternVL3-2B": models / "base", "UltraDoughnut/SELF1E": models / "published"}
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    (tmp_path / "photos").mkdir()
    photo = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    photo.save(tmp_path / "a.jpg")
    photo.rotate(180).save(tmp_path / "photos/b.png")
    (tmp_path / "asked.csv").write_text("image,prompt\na.jpg,the red car\nphotos/b.png,the sky\n")
    own_data(tmp_path / "mine", photo)
    program = tmp_path / "bin/self1e"  # what installing the package puts beside python
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m self1e "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_data(folder: Path, photo: Image.Image) -> None:
    """train.csv and all.csv with 12 photos, coco.json with two of them."""
    folder.mkdir()
    mask = np.zeros((photo.height, photo.width), np.uint8)
    mask[10:30, 20:40] = 255
    lines = [("image", "mask", "prompt")]
    for number in range(12):
        photo.rotate(180 * (number % 2)).save(folder / f"{number}.jpg")
        Image.fromarray(np.roll(mask, number, 1)).save(folder / f"{number}.png")
        lines.append((f"{number}.jpg", f"{number}.png", f"the thing number {number}"))
    for name in ("train.csv", "all.csv"):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(lines)
    box = [[20, 10, 40, 10, 40, 30, 20, 30]]
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in range(2)],
        "categories": [{"id": 7, "name": "mug"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 7, "segmentation": box} for n in range(2)],
    }
    (folder / "coco.json").write_text(json.dumps(coco))


def shortened(text: str) -> str:
    """The block without what is left out, with one step per training and a free port per launcher."""
    lines = text.replace("\\\n", " ").splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.startswith(tuple(LEFT_OUT)))
    text = text.replace("train_hf_ivl_seq.py", "train_hf_ivl_seq.py --max_steps 1 --no_eval")
    return re.sub(r"deepspeed (--master_port=\d+)?", f"deepspeed --master_port={free_port()} ", text)


def run_here(line: str) -> int:
    """The exit code of a command of the project, run in this process."""
    program, *words = shlex.split(line, comments=True)
    if program == "bash":
        return cli.main(["eval", {"eval_all.sh": "segmentation", "eval_vqas.sh": "vqa"}[words[0]], *words[1:]])
    if program == "python":
        return subprocess.run([sys.executable, *words], timeout=300).returncode
    if program == "torchrun":
        words = words[words.index("self1e") + 1 :]
    if program == "deepspeed":
        words = ["train", *words[words.index("train_hf_ivl_seq.py") + 1 :]]
    return cli.main(words)


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_bash(page, text, folder, models):
    text = shortened(text)
    for name in set(re.findall(r"runs/(\w+)", text)) - set(re.findall(r"--exp_name[= ](\w+)", text)):
        shutil.copytree(models / "run", folder / "runs" / name)
    if page.name != "README.md" or "train_hf_ivl_seq.py" not in text:
        for line in text.splitlines():
            assert run_here(line) == 0, line
        return
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python(page, folder, models):
    code = [text for kind, text in BLOCK.findall(page.read_text()) if kind == "python"]
    shutil.copytree(models / "run", folder / "runs/NAME")
    names: dict = {}
    for text in code:
        exec(compile(text, str(page), "exec"), names)  # noqa: S102
    if page.stem == "README":
        assert names["result"].mask.shape == (40, 60)
    if page.stem == "use":
        assert names["reply"].masks.dtype == bool and names["out"].loss.isfinite()
