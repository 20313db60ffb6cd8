#!/usr/bin/env bash
# Purpose: the whole test suite, in an environment of its own.
# Command: bash scripts/test.sh [any pytest arguments]
# Cost:    the installation (minutes, once), then under 10 minutes on 2 CPU cores.
# Result:  pytest's summary; exit code 0 when all pass. The demo's test needs Chromium, golden values need SELF1E_SHARED.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment -r requirements.txt -e ".[demo,test]"
export OMP_NUM_THREADS=1              # the suite runs one process a core
exec python -m pytest -n auto "$@"
