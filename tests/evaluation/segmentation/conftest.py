"""Data and a model for tests of the evaluation."""

import pytest
import torch
from segmentation_trees import make_dataset

from self1e import Self1EForSegmentation, Self1EProcessor


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Not to be written to."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def tiny(tiny_version):
    """Model and processor; the model's logits are of both signs."""
    torch.manual_seed(0)
    model = Self1EForSegmentation.from_pretrained(tiny_version, dtype=torch.float32)
    torch.nn.init.normal_(model.segmentation_head.f_out[-1].bias)
    return model, Self1EProcessor.from_pretrained(tiny_version)


@pytest.fixture
def one_thread():
    """As each of several processes has, or sums differ in their last digits and pixels near 0 flip."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
