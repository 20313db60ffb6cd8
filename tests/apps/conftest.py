"""A trained model for the tests of programs."""

import pytest
from helpers import make_trained


@pytest.fixture(scope="session")
def version(tmp_path_factory) -> str:
    """Folder of a tiny trained model, our own layout. Not to be written to."""
    return str(make_trained(tmp_path_factory.mktemp("programs") / "trained"))
