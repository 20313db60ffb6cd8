"""`python -m self1e.demo ...` is `self1e demo ...`; see `self1e.apps.demo`."""

import sys

from self1e.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
