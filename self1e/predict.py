"""`python -m self1e.predict ...` is `self1e segment ...`; see `self1e.apps.predict`."""

import sys

from self1e.cli import main

if __name__ == "__main__":
    sys.exit(main(["segment", *sys.argv[1:]]))
