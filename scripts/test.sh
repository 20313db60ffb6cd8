#!/usr/bin/env bash
# Purpose: the checks of style and types and the whole test suite, in an environment of its own.
# Command: bash scripts/test.sh [any pytest arguments; with some, the suite alone]
# Cost:    the installation (minutes, once), then 6 to 9 minutes on 2 CPU cores.
# Result:  pytest's summary; exit code 0 when all pass. The demo's browser test needs an installed Chromium.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment -r requirements.txt -e ".[demo,quantize,test,dev]"
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
fi
export OMP_NUM_THREADS=1              # the suite runs one process per core
exec python -m pytest -n auto --dist worksteal "$@"  # neighbours, which share fixtures, mostly stay together
