"""What several test files share: places, pictures, tiny models. Fixtures: `conftest.py`; data trees: `trees.py`."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.data.samples import missing
from self1e.data.splits import SPLITS, split_readers
from self1e.model.weights import save_checkpoint
from self1e.synthetic.tiny_internvl import make_tiny_internvl

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SELF1E_SHARED", ROOT.parent / "shared"))
GOLDEN = ROOT / "tests" / "golden"
PACKS = [GOLDEN / "qwen2", GOLDEN / "qwen3"]  # of published outputs; README beside them
if (SHARED / "golden" / "model").is_dir():
    PACKS.append(SHARED / "golden" / "model")

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="real photos and the real tokenizer are not part of the repository (SELF1E_SHARED)"
)
each_pack = pytest.mark.parametrize("pack", PACKS, ids=[pack.name for pack in PACKS])

# Options of `make_tiny_internvl`: 2 x 2 image tokens a tile of 56 pixels, 0.1 M parameters.
TINY = {"image_size": 56, "width": 32, "layers": 2, "vision_width": 32, "vision_layers": 2, "vocab_size": 400}


def hear_ctrl_c() -> None:
    """For `preexec_fn`: a suite that was started in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_at_work(command: list, file: Path, ask: int, environment: dict[str, str]) -> str:
    """Send a command, not what it started, the signal `ask` as soon as `file` holds something; what it printed."""
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while not (file.is_file() and file.stat().st_size) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(ask)
        printed = process.communicate(timeout=300)[1]
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
    assert process.returncode != 0 and file.is_file() and file.stat().st_size, printed
    return printed


class Calls:
    """Its pickle, which a stranger may have made, calls a function where it is loaded."""

    def __init__(self, function, *arguments):
        self.value = function, arguments

    def __reduce__(self):
        return self.value


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photo of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def files(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its relative name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def splits_of(dataset: Path) -> list[str]:
    """The evaluation splits whose files a tree holds; all that the published program knows must be among them."""
    held = [name for name, reader in split_readers(SPLITS, dataset).items() if not missing(reader)]
    assert len(held) >= 15
    return held


def make_base(folder: Path, **options) -> Path:
    """A base checkpoint in the original layout, in `folder`: `TINY` with tiles of 112 pixels, and options."""
    return make_tiny_internvl(folder, **(TINY | {"image_size": 112} | options))


def make_trained(folder: Path, base: Path | None = None, **options) -> Path:
    """A checkpoint with a head, our own layout, in `folder`; its base beside it unless given."""
    base = base or make_base(folder.with_name(f"{folder.name}_base"), **options)
    model, processor = Self1EForSegmentation.from_pretrained(base), Self1EProcessor.from_pretrained(base)
    model.trained_head = True
    photo = Image.linear_gradient("L").convert("RGB")
    torch.manual_seed(0)
    for weight in model.segmentation_head.parameters():
        torch.nn.init.normal_(weight, std=0.2 * (weight.ndim > 1))
    # Random features share a large constant; the last bias takes it away, so that masks hold both kinds of pixels.
    head, last = model.segmentation_head, model.segmentation_head.f_out[-1]
    with patch.object(head, "logits", wraps=head.logits) as products:
        model.segment(processor, photo, "it")
    features = products.call_args_list[0].args[0]  # the mask's product comes first, then the auxiliary mask's
    with torch.no_grad():
        last.bias.sub_(features.mean((0, 1, 2)))
    assert 0.2 < model.segment(processor, photo, "it")[0].mask.mean() < 0.8
    save_checkpoint(model, processor, folder)
    return folder
