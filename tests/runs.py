"""Training runs for tests: their command line, in this process or as two under the deepspeed launcher, their logs."""

import faulthandler
import gc
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from helpers import ROOT, free_port, hear_ctrl_c
from PIL import Image

from self1e.training import run as program
from self1e.training.checkpoint import checkpoints_in
from self1e.training.trainer import Self1ETrainer

LAUNCHER = Path(sys.executable).with_name("deepspeed")
BOUND = ["--batch_size", "2", "--grad_accumulation_steps", "2", "--lora_r", "4", "--use_llm_lora", "--optimize_vision"]
BOUND += ["--use_vision_lora", "--precision", "fp32", "--print_freq", "1", "--warmup_steps", "2", "--workers", "0"]


def command(version: Path, shapes: Path, runs: Path, name: str, *flags: str) -> list[str]:
    paths = {"version": version, "dataset_dir": shapes / "dataset", "data_dir": shapes / "data", "log_base_dir": runs}
    sets = ["--refer_seg_data", "refclef||refcoco", "--sem_seg_data", "ade20k||cocostuff"]
    return [*(f"--{key}={value}" for key, value in paths.items()), *BOUND, *sets, "--exp_name", name, *flags]


def train(*args: str, code: int = 0) -> None:
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    assert program.main(command(*args)) == code


Method = tuple[type, str]
EVENTS = (Self1ETrainer, "compute_loss"), (torch, "save"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")
# A test process has threads (of the test runner, of servers under test), so that a fork of it can hang: children come
# from a process that has none and has loaded the libraries.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["self1e.training.run", "deepspeed", "matplotlib.figure"])
LIMIT = 400
PATIENCE = 150  # seconds after which a child says where it is; a run takes about ten


def train_in_a_child(*args: Path | str, send: tuple[int, int] | None = None, at: Method | None = None) -> int:
    """As `train`, in a process of its own: its exit code, negative when a signal ended it.

    send: a signal, and the number of the event at which the child sends it to itself. at: the method whose calls are
    the events; all of `EVENTS` unless given.
    """
    with tempfile.NamedTemporaryFile("r") as log:
        child = CHILDREN.Process(target=_train_and_exit, args=(command(*args), send, at, log.name))
        child.start()
        child.join(timeout=PATIENCE + 30)
        if child.exitcode is None:
            child.kill()
            raise AssertionError(f"a training run hung: {args}\n{log.read()}")
        return child.exitcode


def _train_and_exit(flags: list[str], send: tuple[int, int] | None, at: Method | None, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(PATIENCE)
    gc.freeze()  # as the program does after its imports
    if send is not None:
        sent, when = send
        count_events(lambda number: os.kill(os.getpid(), sent) if number == when else None, [at] if at else EVENTS)
    sys.exit(program.main(flags))


def count_events(happen: Callable[[int], None], events=EVENTS) -> None:
    """Call `happen` with 0, 1, ... before each of the events, in this process and from now on."""
    numbers = itertools.count()

    def announced(function):
        def call(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():  # the watchdog writes when it will
                happen(next(numbers))
            return function(*args, **kwargs)

        return call

    for owner, name in events:
        setattr(owner, name, announced(getattr(owner, name)))


def history(folder: Path) -> list[dict]:
    """The log of the last checkpoint, training lines only."""
    state = json.loads((checkpoints_in(folder / "checkpoints")[-1] / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def curves(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pictures(folder: Path) -> dict[str, list[tuple[int, Image.Image]]]:
    """Tag -> (step, picture) of every picture in the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0})  # 0: all of them
    events.Reload()
    return {
        tag: [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def launch(*args: Path | str, launcher: str = "deepspeed") -> subprocess.Popen:
    """Two CPU processes under a launcher, in a process group of their own, killed after `LIMIT` seconds.

    launcher: deepspeed or torchrun.
    """
    start = {
        "deepspeed": [LAUNCHER, "--num_accelerators=2"],
        "torchrun": [LAUNCHER.with_name("torchrun"), "--nproc_per_node=2"],
    }[launcher]
    program = [*start, f"--master_port={free_port()}", ROOT / "train_hf_ivl_seq.py"]
    process = subprocess.Popen(
        [*map(str, program), *command(*args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT, end)  # whoever reads what the process prints is not left waiting
    timer.daemon = True
    timer.start()
    return process


def steps(printed: str) -> dict[str, str]:
    """Number of each step -> its loss, terms, gradient norm and learning rates, as printed."""
    return dict(re.findall(r"step (\d+)  epoch \S+  (loss .*?)  [\d.]+ samples/s", printed))


def loss(line: str) -> float:
    return float(line.split()[1])
