# Sourced by quickstart.sh and test.sh: makes .venv beside this folder, installs into it, and activates it.
# SELF1E_VENV names another place; an environment that already holds these requirements is used as it is.

use_environment() { # use_environment WHAT...: arguments of pip install, run from the project's folder
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    cd "$root"
    local venv=${SELF1E_VENV:-$root/.venv} wanted
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or newer is needed; set PYTHON") if sys.version_info < (3, 10) else None'
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    wanted="$* $(cat requirements.txt pyproject.toml | cksum)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $venv (PyTorch is large: minutes)"
        "$venv/bin/python" -m pip install --quiet "$@"
        echo "$wanted" > "$venv/installed"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
