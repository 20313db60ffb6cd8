"""`python scripts/check_data.py ...` is `self1e check-data ...`, without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from self1e.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
