"""A model for VQA tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(make_tiny) -> Path:
    """A random model with 4 image tokens per tile, small enough for a 100 token reply in a fraction of a second."""
    return make_tiny(vision_layers=1, vocab_size=600)
