"""Kill a tiny training run at random points and compare what continues with the uninterrupted run.

Command:  python scripts/kill_test.py 100            or, for other points, python scripts/kill_test.py 100 --seed 100
Cost:     about 8 s per point on 2 CPU cores.
Expected: every point passes: equal losses, gradient norms and final weights.
"""

import argparse
import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests/training/test_kill.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=int, help="how many points are tried")
    parser.add_argument("--seed", type=int, default=0, help="of the first point; the next ones have the next seeds")
    arguments = parser.parse_args()
    os.environ |= {"SELF1E_KILL_POINTS": str(arguments.points), "SELF1E_KILL_SEED": str(arguments.seed)}
    return int(pytest.main(["-q", "-k", "kill_anywhere", str(TESTS)]))


if __name__ == "__main__":  # the runs that are killed import this file
    sys.exit(main())
