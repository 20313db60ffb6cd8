"""Fixtures of the whole suite. `SHARED` is the folder with golden outputs and miniature data; a user has none of it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("SELF1E_SHARED", ROOT.parent / "shared"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="golden outputs and miniature data are not part of the repository (SELF1E_SHARED)"
)
