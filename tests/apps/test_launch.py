"""`self1e launch`: two ranks of a small program, which are interrupted, asked to stop, or fail."""

import signal
import subprocess
import sys

import pytest
from helpers import ROOT
from terminal import CTRL_C, Terminal

from self1e.cli import main

LAUNCH = [sys.executable, "-m", "self1e", "launch"]
# Waits for SIGTERM or SIGUSR1, or ends at once with the code that it is given.
PROGRAM = """
import signal, sys, time
from self1e.distributed import rank, run_program
heard = []


def program():
    for number in signal.SIGTERM, signal.SIGUSR1:
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    print(f"rank {rank()} is ready", flush=True)
    while not heard and len(sys.argv) == 1:
        time.sleep(0.05)
    print(f"rank {rank()} heard {heard}", flush=True)
    return int(sys.argv[1]) if sys.argv[1:] else 75


sys.exit(run_program(program, expected=(ValueError,)))
"""


@pytest.fixture
def start(tmp_path):
    """`start(*arguments)` runs PROGRAM on two ranks in a terminal; without arguments, both are ready then."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(*arguments: str) -> Terminal:
        command = [*LAUNCH, "--nproc_per_node=2", tmp_path / "program.py", *arguments]
        terminal = Terminal(command, environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, folder=tmp_path)
        for rank in range(0 if arguments else 2):
            terminal.read_until(f"rank {rank} is ready", timeout=400)
        return terminal

    return start


def test_ctrl_c_is_the_first_ranks_message(start):
    terminal = start()
    terminal.type(CTRL_C)
    code, printed = terminal.finish()
    assert code == 130 and printed.count("interrupted") == 1
    assert printed.splitlines()[-1] == "interrupted" and "Traceback" not in printed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_request_to_stop_reaches_the_ranks(start, name):
    """From outside of the terminal, to the launcher alone."""
    terminal = start()
    terminal.process.send_signal(signal.Signals[name])
    code, printed = terminal.finish()
    assert code == 75 and "Traceback" not in printed, printed
    assert all(f"rank {rank} heard ['{name}']" in printed for rank in range(2))


def test_the_code_is_that_of_the_rank_that_failed(start):
    code, printed = start("3").finish()
    assert code == 3 and "Traceback" not in printed


def test_the_code_of_a_killed_rank_is_that_of_a_shell(tmp_path):
    (tmp_path / "program.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    command = [*LAUNCH, "--nproc_per_node=2", str(tmp_path / "program.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 128 + signal.SIGKILL and "Traceback" not in done.stderr
    assert "exitcode: -9" in done.stderr


def test_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["launch"])
    assert "it needs a program to start" in capsys.readouterr().err
    assert main(["launch", "--help"]) == 0 and "torchrun --help" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--nproc_per_node=0", "--nproc_per_node=-1", "--nnodes=0", "--nnodes=x"])
def test_numbers_that_torchrun_would_meet_with_a_traceback(flag, capsys):
    with pytest.raises(SystemExit) as end:
        main(["launch", flag, "program.py"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and flag.replace("=", " ") in error and "at least 1" in error
