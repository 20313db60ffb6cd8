"""Training runs for tests: their command line, in this process or as two under a launcher, and what they logged."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import ROOT, free_port

from self1e.cli import main
from self1e.files import read_records

LAUNCHER = Path(sys.executable).with_name("deepspeed")
SMALL = ["--batch_size", "2", "--grad_accumulation_steps", "2", "--lora_r", "4", "--use_llm_lora", "--optimize_vision"]
SMALL += ["--use_vision_lora", "--precision", "fp32", "--print_freq", "1", "--warmup_steps", "2", "--workers", "0"]
LIMIT = 400  # seconds after which a run under a launcher is killed


def command(version: Path, shapes: Path, runs: Path, name: str, *flags: str) -> list[str]:
    paths = {"version": version, "dataset_dir": shapes / "dataset", "data_dir": shapes / "data", "log_base_dir": runs}
    sets = ["--refer_seg_data", "refclef||refcoco", "--sem_seg_data", "ade20k||cocostuff"]
    return [*(f"--{key}={value}" for key, value in paths.items()), *SMALL, *sets, "--exp_name", name, *flags]


def train(*args, code: int = 0) -> None:
    """A run in this process."""
    assert main(["train", *command(*args)]) == code


# A test process has threads (of the test runner, of servers under test), so that a fork of it can hang: children come
# from a process that has none and has loaded the libraries.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["self1e.training.train", "matplotlib.figure", "deepspeed"])


def train_in_a_child(*args, at: str = "", call: int = 0, do: Callable[[], None] | None = None) -> int:
    """As `train`, in a process of its own: its exit code, negative when a signal ended it.

    at: "module:attribute" of a function of the program, at whose call of that number the child does `do` first.
    """
    child = CHILDREN.Process(target=_train_and_exit, args=(command(*args), at, call, do))
    child.start()
    return exit_codes(child)[0]


def start_ranks(*args, at: str = "", call: int = 0, do: Callable[[], None] | None = None) -> list:
    """As `train_in_a_child`, by two processes, which print to `<runs>/<name>.<rank>.txt`; returns them."""
    return as_ranks(_train_and_exit, command(*args), at, call, do, printed=args[2] / args[3])


def train_by_ranks(*args, **intervention) -> list[int]:
    """The exit codes of `start_ranks`."""
    return exit_codes(*start_ranks(*args, **intervention))


def as_ranks(work: Callable, *args, printed: Path) -> list:
    """Two processes that find what a launcher tells ranks, do `work(*args)` and print to `<printed>.<rank>.txt`."""
    port = free_port()
    children = [CHILDREN.Process(target=_as_rank, args=(rank, port, printed, work, *args)) for rank in range(2)]
    for child in children:
        child.start()
    return children


def _as_rank(rank: int, port: int, printed: Path, work: Callable, *args) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    with open(f"{printed}.{rank}.txt", "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(*args)


def exit_codes(*children) -> list[int]:
    """What the processes end with; those that do not are killed."""
    for child in children:
        child.join(timeout=180)
    if any(child.exitcode is None for child in children):
        for child in children:
            child.kill()
        raise AssertionError("a training run hung")
    return [child.exitcode for child in children]


def _train_and_exit(flags: list[str], at: str, call: int, do: Callable[[], None] | None) -> None:
    gc.freeze()
    multiprocessing.set_start_method(None, force=True)  # or data workers would load the libraries anew
    if do is not None:
        intervene(at, call, do)
    sys.exit(main(["train", *flags]))


def intervene(at: str, call: int, do: Callable[[], None]) -> None:
    """Do something before the given call of a function, which is named as "module:attribute"."""
    module, _, path = at.partition(":")
    owner = sys.modules[module]
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            do()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_first() -> None:
    if os.environ["RANK"] == "0":
        kill()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def tell_by_sigusr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def tell_second_by_sigusr1() -> None:
    if os.environ["RANK"] == "1":
        tell_by_sigusr1()


def suspend_second() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)


def history(folder: Path) -> list[dict]:
    """The training lines of a run's log."""
    return [line for line in read_records(folder / "log.jsonl") if "loss" in line]


def events(folder: Path) -> dict[str, list[float]]:
    """The scalars that TensorBoard shows of a run, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [event.value for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def launch(*args) -> subprocess.Popen:
    """Two CPU processes under deepspeed, in a process group of their own."""
    script = [LAUNCHER, "--num_accelerators=2", f"--master_port={free_port()}", ROOT / "train_hf_ivl_seq.py"]
    process = subprocess.Popen(
        [*map(str, script), *command(*args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT, end)  # whoever reads what the process prints is not left waiting
    timer.daemon = True
    timer.start()
    return process
