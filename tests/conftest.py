"""Fixtures of the whole suite. `SHARED` holds golden outputs and miniature data; a user has none of it."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SELF1E_SHARED", ROOT.parent / "shared"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="golden outputs and miniature data are not part of the repository (SELF1E_SHARED)"
)

# Options of scripts/make_tiny_internvl.py: 2 x 2 image tokens a tile of 56 pixels, 0.1 M parameters.
TINY = {"image_size": 56, "width": 32, "layers": 2, "vision_width": 32, "vision_layers": 2, "vocab_size": 400}


@pytest.fixture(scope="session", autouse=True)
def index_cache(tmp_path_factory):
    """The suite writes nothing into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELF1E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photo of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory) -> Callable[..., Path]:
    """`make_tiny(**options)` writes a tiny InternVL3 (sizes `TINY`) to a new folder."""
    path = ROOT / "scripts" / "make_tiny_internvl.py"
    spec = importlib.util.spec_from_file_location("make_tiny_internvl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda **options: module.make_tiny_internvl(tmp_path_factory.mktemp("tiny"), **{**TINY, **options})


@pytest.fixture(scope="session")
def tiny_version(make_tiny) -> Path:
    """Folder of a tiny base model, original layout. Not to be written to."""
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_processor(tiny_version):
    from self1e import Self1EProcessor

    return Self1EProcessor.from_pretrained(tiny_version)


@pytest.fixture(scope="session")
def load_tiny(tiny_version) -> Callable:
    """`load_tiny(**options)` loads the tiny base with a head whose logits are far from 0; in evaluation mode."""
    from self1e import Self1EForSegmentation

    def load(version: Path = tiny_version, **options):
        model = Self1EForSegmentation.from_pretrained(version, **options)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.segmentation_head.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return load
