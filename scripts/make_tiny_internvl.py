"""`python scripts/make_tiny_internvl.py ...` is `self1e make-tiny ...`, without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self1e.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["make-tiny", *sys.argv[1:]]))
