"""`python -m self1e COMMAND ...`: the commands of `self1e.cli` from a checkout."""

import sys

from self1e.cli import main

if __name__ == "__main__":
    sys.exit(main())
