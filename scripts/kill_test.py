"""Kill a tiny training run at random points and compare what continues with the uninterrupted run.

Command:  python scripts/kill_test.py 100
Cost:     about 8 s per point on 2 CPU cores.
Expected: every point passes: equal losses, gradient norms and final weights.
"""

import os
import sys
from pathlib import Path

import pytest

points = sys.argv[1] if len(sys.argv) == 2 and sys.argv[1].isdecimal() else sys.exit(__doc__)
os.environ["SELF1E_KILL_POINTS"] = points
sys.exit(
    pytest.main(
        ["-q", "-k", "kill_anywhere", str(Path(__file__).resolve().parents[1] / "tests/training/test_kill.py")]
    )
)
