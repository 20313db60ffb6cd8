"""Every bash and Python block of the pages runs as it stands, in a folder where what the pages name is there in small.

The folder holds links to the project's programs; `PATH/InternVL3-2B`, a tiny base; `PATH/published` and
`runs/NAME/ckpt_model`, tiny trained models; `dataset/` and `data/`, a few synthetic scenes in every format; own data
in `mine/`; the photos `a.jpg` and `photos/b.png`. The environment is the activated one, without a GPU.

A block changes in two places only: training takes one step without evaluation (`--max_steps 1 --no_eval`), and a
launcher gets a free port. The Python blocks of a page run one after another, since later ones use what earlier ones
made. `self1e` and training run as programs in the README, and in this process on the other pages and where training
has a `--config`. What does not run here stands in `LEFT_OUT`, with the reason.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, free_port, make_base, make_trained
from PIL import Image

from self1e import cli
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import Self1EProcessor
from self1e.model.weights import save_checkpoint
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.training import train

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("train_hf_ivl_seq.py", "eval_all.sh", "eval_vqas.sh", "configs", "scripts", "examples", "self1e")
LEFT_OUT = {  # a line that starts with one of these is not run
    "bash scripts/quickstart.sh": "takes six minutes",
    "source .venv/bin/activate": "the environment is activated",
    "pip install": "changes the environment",
    "self1e demo": "serves until it is stopped; tests/apps/test_demo.py runs it",
    "bash scripts/get_data.sh": "needs the network; tests/scripts runs it",
    "DATASET_DIR=/big/dataset": "as the line before",
    "hf upload": "needs the hub",
    "python scripts/benchmark.py": "takes a minute",
    "bash eval_vqas.sh --version PATH/InternVL3-2B --exp_name NAME --dynamic --": "tests/evaluation runs these flags",
    "bash eval_vqas.sh --version PATH/InternVL3-2B --exp_name compared": "tests/evaluation compares models",
    "bash scripts/test.sh": "is what runs this",
    "python -m lmms_eval": "needs lmms-eval, which the suite's environment has not; tests/apps/test_lmms_eval.py",
}


def blocks(language: str) -> list:
    """(page, text) of each block of a language, with an id for pytest."""
    return [
        pytest.param(page.relative_to(ROOT).as_posix(), text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text()), 1)
        if kind == language
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with `base`, `trained` and `published`."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", image_size=56)
    trained = make_trained(folder / "trained", base)
    model, processor = Self1EForSegmentation.from_pretrained(trained), Self1EProcessor.from_pretrained(trained)
    save_checkpoint(model, processor, folder / "published", published=True)
    return folder


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    """A folder with `dataset` and `data`."""
    return make_shapes_dataset(tmp_path_factory.mktemp("trees"), train=8, val=2, size=64)


@pytest.fixture(scope="module")
def evaluated(models, trees, tmp_path_factory) -> Path:
    """The folder of an evaluation of RefCOCO val."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ["--val_dataset", "refcoco|unc|val", "--dataset_dir", trees / "dataset", "--workers", "0"]
    program = ["--eval_only", "--version", models / "trained", "--exp_name", "NAME", "--log_base_dir", runs, *flags]
    assert train.main([str(word) for word in program]) == 0
    return runs / "NAME/eval"


@pytest.fixture
def place(tmp_path, models, trees, monkeypatch) -> Path:
    """The folder that the blocks run in."""
    for name in PROGRAMS:
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("dataset", "data"):
        (tmp_path / name).symlink_to(trees / name)
    (tmp_path / "PATH").mkdir()
    (tmp_path / "PATH/InternVL3-2B").symlink_to(models / "base")
    (tmp_path / "PATH/published").symlink_to(models / "published")
    (tmp_path / "photos").mkdir()
    photo = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    photo.save(tmp_path / "a.jpg")
    photo.rotate(180).save(tmp_path / "photos/b.png")
    own_data(tmp_path / "mine", photo)
    program = tmp_path / "bin/self1e"  # what installing the package puts beside python
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m self1e "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_data(folder: Path, photo: Image.Image) -> None:
    """train.csv with four photos, val.csv with one, coco.json with two."""
    folder.mkdir()
    mask = np.zeros((photo.height, photo.width), np.uint8)
    mask[10:30, 20:40] = 255
    for name, numbers in {"train": range(4), "val": [4]}.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "mask", "prompt"])
            for number in numbers:
                photo.rotate(180 * (number % 2)).save(folder / f"{number}.jpg")
                Image.fromarray(np.roll(mask, 5 * number, 1)).save(folder / f"{number}.png")
                table.writerow([f"{number}.jpg", f"{number}.png", f"the thing number {number}"])
    box = [[20, 10, 40, 10, 40, 30, 20, 30]]
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in range(2)],
        "categories": [{"id": 7, "name": "mug"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 7, "segmentation": box} for n in range(2)],
    }
    (folder / "coco.json").write_text(json.dumps(coco))


def shortened(text: str) -> str:
    """The block with what does not run left out, one step per training and a free port per launcher."""
    commands = text.replace("\\\n", " ").splitlines()
    text = "\n".join(line for line in commands if not line.startswith(tuple(LEFT_OUT)))
    text = text.replace("train_hf_ivl_seq.py", "train_hf_ivl_seq.py --max_steps 1 --no_eval")
    return re.sub(r"deepspeed (--master_port=\d+)?", f"deepspeed --master_port={free_port()} ", text)


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_bash(page, text, place, models, request):
    text = shortened(text)
    if not text.strip():
        return
    if "--exp_name=NAME" not in text and not re.search(r"train_hf_ivl_seq.*--exp_name NAME", text):
        (place / "runs/NAME").mkdir(parents=True)  # not where the block itself trains it
        shutil.copytree(models / "trained", place / "runs/NAME/ckpt_model")
    for name in set(re.findall(r"runs/(\w+)/eval/", text)):  # the block reads what an evaluation wrote
        shutil.copytree(request.getfixturevalue("evaluated"), place / f"runs/{name}/eval")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]
    elsewhere = page != "README.md" or all("--config" in words for words in commands)
    if elsewhere and all(words[0] in ("self1e", "deepspeed") for words in commands):
        for name, *words in commands:
            main = cli.main if name == "self1e" else train.main
            words = words if name == "self1e" else words[words.index("train_hf_ivl_seq.py") + 1 :]
            assert main([path for word in words for path in (glob(word) if "*" in word else [word])]) == 0, words
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, env=environment(place), timeout=600
    )
    assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{place / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SELF1E_CACHE": str(place / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python(page, place, models):
    code = [text for kind, text in BLOCK.findall(page.read_text()) if kind == "python"]
    (place / "runs/NAME").mkdir(parents=True)
    (place / "runs/NAME/ckpt_model").symlink_to(models / "trained")
    names: dict = {}
    for text in code:
        exec(compile(text, str(page), "exec"), names)  # noqa: S102
    if page == ROOT / "README.md":
        assert names["result"].mask.shape == (40, 60) and names["reply"].masks.dtype == bool
        assert names["out"].loss.isfinite() and len(names["out"].mask_logits) == 1
