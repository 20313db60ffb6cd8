"""Fixtures of the whole suite."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SHARED, TINY, needs_shared

from self1e import Self1EForSegmentation, Self1EProcessor
from self1e.apps.convert import convert
from self1e.synthetic.shapes_dataset import make_shapes_dataset
from self1e.synthetic.tiny_internvl import make_tiny_internvl

LONGEST = ("test_two_processes.py", "test_stopping.py")


def pytest_collection_modifyitems(items):
    """Begin with the tests that take minutes, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """Keep what the test files import out of later collections, of which every training run asks for several."""
    gc.freeze()


def pytest_unconfigure():
    """Let the libraries' own checks at exit find everything collected."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def index_cache(tmp_path_factory):
    """The suite writes nothing into the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELF1E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shapes_tree(tmp_path_factory) -> Path:
    """Every set in its real format, on synthetic scenes: `dataset` and `data` below it. Not to be written to."""
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), train=16, val=4, size=64)


@pytest.fixture(scope="session", params=["shapes", pytest.param("photos", marks=needs_shared)])
def miniature(request, shapes_tree) -> Path:
    """A miniature of every set: of synthetic scenes, and of real photos where those are. Not to be written to."""
    return shapes_tree if request.param == "shapes" else SHARED / "minidata"


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory) -> Callable[..., Path]:
    """`make_tiny(**options)` writes a tiny InternVL3 (sizes `TINY`) to a new folder; layout: `internvl` or `hf`."""

    def make(*, layout: str = "internvl", **options) -> Path:
        folder = make_tiny_internvl(tmp_path_factory.mktemp("tiny"), **(TINY | options))
        if layout == "hf":
            convert(str(folder), folder / "hf", "hf")
            return folder / "hf"
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_version(make_tiny) -> Path:
    """Folder of a tiny base model, original layout. Not to be written to."""
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_processor(tiny_version):
    return Self1EProcessor.from_pretrained(tiny_version)


@pytest.fixture(scope="session")
def load_tiny(tiny_version) -> Callable:
    """`load_tiny(**options)` loads the tiny base with a head whose logits are far from 0; in evaluation mode."""

    def load(version: Path = tiny_version, **options):
        model = Self1EForSegmentation.from_pretrained(version, **options)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.segmentation_head.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return load
