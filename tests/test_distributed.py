"""What the processes of a run share; several real ones run in the tests of training and evaluation."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT, hear_ctrl_c

from self1e import distributed


@pytest.mark.parametrize("items, size", [(7, 3), (2, 5), (6, 2), (0, 2), (9, 1)])
def test_blocks_cover_everything_once(monkeypatch, items, size):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    blocks = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        blocks.append(list(distributed.share(range(items))))
    assert [item for block in blocks for item in block] == list(range(items))
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1


DESTRUCTOR = """
import os, signal, sys, time
from self1e.distributed import run_program


class Loader:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def program():
    Loader()
    time.sleep(600)
    return 0


sys.exit(run_program(program, expected=(ValueError,)))
"""


@pytest.mark.parametrize("launched", [False, True])
def test_ctrl_c_in_a_destructor_ends_the_program(launched):
    """Python drops what is raised there; a data loader that ends its workers is such a place."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    environment |= {"LOCAL_RANK": "0", "RANK": "0"} if launched else {}
    command = [sys.executable, "-c", DESTRUCTOR]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=hear_ctrl_c
    )
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


ASKED = """
import os, signal, sys, time
from self1e.distributed import run_program


def program():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    time.sleep(60)
    return 0


sys.exit(run_program(program, expected=(ValueError,)))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_request_to_stop_ends_a_program_that_does_not_listen(name):
    command = [sys.executable, "-c", ASKED, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (75, f"\nstopped by {name}\n")


BUG = """
import sys
from torch.utils.data import DataLoader
from self1e.distributed import ignore_requests_to_stop, run_program


def program():
    batches = iter(DataLoader(range(99), num_workers=1, worker_init_fn=ignore_requests_to_stop))
    next(batches)
    raise RuntimeError("a fault of the program")  # its traceback holds the loader


sys.exit(run_program(program, expected=(ValueError,)))
"""


TAKEN = """
import os, socket, time
from multiprocessing.resource_sharer import DupFd
from self1e.distributed import ignore_requests_to_stop

ignore_requests_to_stop()
for leave in "at once", "after a word":
    address, _ = DupFd(0)._id  # as a worker hands its tensors out
    with socket.socket(socket.AF_UNIX) as program:
        program.connect(address)
        if leave != "at once":
            program.recv(4)
time.sleep(0.5)
"""


@pytest.mark.skipif(os.name == "nt", reason="tensors are handed out by sockets on Unix alone")
def test_a_data_worker_says_nothing_where_its_program_ends():
    """Whatever the program was about to take."""
    done = subprocess.run([sys.executable, "-c", TAKEN], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fault_of_the_program_does_not_wait_for_its_data_workers():
    """They ignore the SIGTERM with which Python ends them, because a cluster sends it to all processes alike."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    command = [sys.executable, "-c", BUG]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a fault of the program\n")
