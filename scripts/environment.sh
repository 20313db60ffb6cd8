# Sourced by quickstart.sh and test.sh: makes .venv in the project's folder, installs into it, and activates it.
# SELF1E_VENV names another place. An environment that already holds these requirements is used as it is.

use_environment() { # use_environment WHAT...: the arguments of pip install, relative to the project's folder
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root"
    local venv=${SELF1E_VENV:-$root/.venv} wanted
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed; set PYTHON" if not (3, 11) <= sys.version_info < (3, 14) else 0)'
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    wanted="$* $(cat requirements.txt pyproject.toml | cksum)"
    if ! grep -qxF -- "$wanted" "$venv/installed" 2>/dev/null; then
        echo "installing into $venv: 6 to 7 GB with CUDA, minutes in which nothing more is printed"
        "$venv/bin/python" -m pip install --quiet "$@"
        echo "$wanted" >> "$venv/installed"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
