"""What the processes of a run share: two real ones of a small program, started by torchrun."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, free_port
from terminal import CTRL_C, Terminal

from self1e import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
PROGRAM = """
import sys, time
from torch.utils.data import DataLoader
from self1e import distributed
from self1e.errors import UserError
from self1e.evaluation.loop import progress


def program(what):
    distributed.start("gloo")
    rank = distributed.rank()
    assert distributed.gather(f"r{rank}") == [f"r{each}" for each in range(distributed.world_size())]
    bar = progress(30, desc="photos", unit="photo")
    [bar.update() for _ in range(30)]
    bar.close()
    assert distributed.on_main(lambda: f"from rank {rank}") == "from rank 0"
    distributed.say(f"ranks: {distributed.world_size()}")
    if what == "one fails" and rank == 1:
        raise UserError("the photo of rank 1 is broken")
    if what == "all fail":
        raise UserError("no such folder")
    if what == "bug":
        loader = iter(DataLoader(range(99), num_workers=1, worker_init_fn=distributed.ignore_signals))
        raise RuntimeError(f"a fault of the program after item {next(loader)}")  # its traceback holds the loader
    if what == "wait":
        print(f"rank {rank} waits", flush=True)
        time.sleep(600)
    distributed.gather(rank)
    return 3 if what == "3" else 0


if __name__ == "__main__":
    sys.exit(distributed.run_program(lambda: program(sys.argv[1])))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(command, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("works", 0, ""),
        ("one fails", 1, "error: the photo of rank 1 is broken"),
        ("all fail", 1, "error: no such folder"),
        ("bug", 1, "RuntimeError: a fault of the program"),
    ],
)
def test_whoever_meets_an_error_ends_the_run_and_says_so_once(program, what, code, says):
    done = run([*TORCHRUN, f"--master_port={free_port()}", program, what])
    assert (done.returncode, done.stdout.count("ranks: 2\n")) == (code, 1), (
        done.stderr
    )  # Gloo of torch 2.8 prints, too
    ours = done.stderr.split("ChildFailedError")[0]  # torchrun adds a report of its own
    assert ours.count("photos, process 1 of 2: ") == 10 and "2: 30 of 30 photos" in ours and "\r" not in ours
    ours = ours[ours.rindex("left\n") + 5 :]
    assert (f'File "{program}"' in ours) == (what == "bug")  # a traceback
    assert ours.count(says) >= 1 and (what == "bug" or ours.count(f"{says}\n") <= 1)


def test_one_process_keeps_the_traceback_and_ends_its_workers(program):
    done = run([sys.executable, program, "bug"])
    assert done.returncode == 1 and done.stderr.endswith(
        "RuntimeError: a fault of the program after item tensor([0])\n"
    )
    assert f'File "{program}"' in done.stderr


ALL = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, ALL])
def test_what_a_cluster_leaves_in_the_environment_is_no_launcher(program, variables):
    done = run([sys.executable, program, "3"], **variables)
    assert (done.returncode, done.stdout) == (3, "ranks: 1\n") and "Error" not in done.stderr


def test_all_of_it_without_a_launcher_is_refused_in_one_line(program):
    done = run([sys.executable, program, "3"], **ALL | {"WORLD_SIZE": "2"})
    assert done.returncode == 1 and done.stderr.strip().startswith("error: no launcher set RANK")


@pytest.mark.parametrize(("cores", "ranks", "workers", "threads"), [(2, 1, 0, 1), (16, 1, 4, 11), (16, 4, 1, 2)])
def test_workers_and_threads_follow_the_cores(monkeypatch, cores, ranks, workers, threads):
    variables = {**ALL, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert distributed.share_cores() == workers and used == [threads]


def test_ctrl_c_is_one_line(program, tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    terminal = Terminal([sys.executable, program, "wait"], environment=environment, folder=tmp_path)
    terminal.read_until("rank 0 waits", timeout=200)
    terminal.type(CTRL_C)
    code, printed = terminal.finish()
    assert code == 130
    assert printed.count("\ninterrupted\n") == 1 and str(program) not in printed.split("interrupted")[1]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Unix alone has it")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_request_to_stop_is_heard_inside_its_block_alone(name):
    from self1e.stop import stop_requests

    before = signal.getsignal(signal.Signals[name])
    with stop_requests() as asked_to_stop:
        assert not asked_to_stop()
        signal.raise_signal(signal.Signals[name])
        assert asked_to_stop()
    assert signal.getsignal(signal.Signals[name]) == before
