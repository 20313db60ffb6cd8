"""Feed many mutated annotation files and pictures to the readers: `python scripts/fuzz.py --inputs 10000`.

The inputs are those of tests/data/test_fuzz.py, more of them, and the same in every run; with --seed they are others,
the same for each seed. Cost: 10,000 inputs take about 3 minutes on one core. Result: "passed", or the smallest input
that was read wrongly or refused without a name.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, help="of other inputs; unset: those of every run")
    arguments, further = parser.parse_known_args()
    os.environ["SELF1E_FUZZ_INPUTS"] = str(arguments.inputs)
    if arguments.seed is not None:
        os.environ["SELF1E_FUZZ_SEED"] = str(arguments.seed)
        further.append(f"--hypothesis-seed={arguments.seed}")
    start = time.monotonic()
    code = pytest.main(["-q", "-p", "no:xdist", str(ROOT / "tests/data/test_fuzz.py"), *further])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.inputs:,} inputs in {time.monotonic() - start:.0f} s, at most {memory:.0f} MB of memory")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
