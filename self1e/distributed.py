"""The processes of a run: those that torchrun, deepspeed or srun started, or this one alone.

One rule for failures: whoever meets an error raises it, and its process ends with exit code 1; the launcher then ends
the others, whatever collective they wait in. `run_program` sees to it that whoever has the cause speaks first.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers.utils.logging import set_tqdm_hook

from self1e.errors import UserError
from self1e.stop import REQUEUE, SIGNALS, Stopped

T = TypeVar("T")
# A launcher sets all of the variables, and one of the marks.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
PATIENCE = 5  # seconds in which the launcher ends this rank if another one has met the cause


def launched() -> bool:
    """Whether a launcher started this process; clusters leave some of its variables in every shell.

    Those of a single process, without a mark, are left over: what they name as master may be gone.
    """
    return all(map(os.environ.get, VARIABLES)) and (os.environ["WORLD_SIZE"] != "1" or any(map(os.environ.get, MARKS)))


def rank() -> int:
    """Number of this process, from 0, on all nodes together."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """Number of processes that exchange with each other: 1 until `start`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the first process of all: the one that prints and writes."""
    return rank() == 0


def say(text: str) -> None:
    """Print on the first process alone."""
    if is_main():
        print(text, flush=True)


def device(name: str = "auto") -> torch.device:
    """`auto`, `cpu`, `cuda` (or `gpu`) or `mps` -> this rank's device; `auto` takes a GPU where there is one.

    Raises UserError where the device is not to be had.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = {"gpu": "cuda", "auto": next(kind for kind in present if present[kind])}.get(name, name)
    if not present.get(name):
        raise UserError(f"--device {name}: torch finds none here; use --device auto")
    if name != "cuda":
        return torch.device(name)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention plans anew, for about a second, at each new length
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution: fp32 is to be fp32
    if launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def start(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Open the process group where a launcher started this process and none is open yet.

    backend: "nccl" or "gloo"; None takes what the machine has. timeout: how long a rank waits for another, at the
    start and in a collective; None is torch's default.
    """
    if not launched() or dist.is_initialized():
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        device("cuda")  # collectives of objects use the current device
    dist.init_process_group(backend, timeout=timeout)


def share_cores(workers: int | None = None) -> int:
    """The number of data workers: as given, else up to 4 as this rank's cores allow; torch's threads get the rest.

    With a GPU every core may have a worker; on a CPU workers get less than half of the cores, and one core stays free.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_node = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1 if launched() else 1
    cores = max(1, available // int(on_node))
    if workers is None:
        workers = min(4, cores if torch.cuda.is_available() else (cores - 1) // 2)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores - workers - 1))
    return workers


def gather(value: T) -> list[T]:
    """Every rank's value (any picklable object), on every rank, in rank order, when all have come here."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on the first rank while the others wait; its result (any picklable object) on all ranks."""
    return gather(work() if is_main() else None)[0]  # type: ignore[return-value]


def ignore_signals(worker: int = 0) -> None:
    """A data worker's `worker_init_fn`: signals that a terminal or a cluster sends to all concern the program."""
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def run_program(program: Callable[[], int]) -> int:
    """Run a program's body and return its exit code.

    UserError is one line and exit code 1, Stopped one line and 75, KeyboardInterrupt one line and 130; all else keeps
    its traceback. Under a launcher all but the first rank's UserError wait, because what they met may follow from
    another rank's end.
    """
    if not launched():
        for name in VARIABLES:  # libraries would take what is left of them for a launcher's
            os.environ.pop(name, None)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find it out, and warn about it
    set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"delay": 2, "disable": None}))  # on a terminal
    try:
        if launched() and not any(map(os.environ.get, MARKS)):
            names = ", ".join(VARIABLES)
            raise UserError(f"no launcher set {names}: unset them, start by torchrun, or set LOCAL_WORLD_SIZE, too")
        code = program()
        if dist.is_initialized():
            dist.destroy_process_group()  # without it, torch can abort at the exit
        return code
    except Stopped:
        say("stopped on request; the same command continues, a training with --auto_resume")
        code = REQUEUE
    except KeyboardInterrupt:
        if launched():  # it passes on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if is_main():
            print("\ninterrupted", file=sys.stderr)
        code = 130  # as shells have it
    except UserError as error:
        if not is_main():
            time.sleep(PATIENCE)
        cause = str(error).rpartition("errors.UserError: ")[2]  # without the traceback that data workers put before it
        print(f"\nerror: {cause}", file=sys.stderr)
        code = 1
    except Exception:
        if not launched():
            raise
        time.sleep(PATIENCE)
        traceback.print_exc()
        code = 1
    finally:
        # Data workers that a traceback still holds: Python would send them a SIGTERM, which they ignore.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise at the end of each
        for worker in multiprocessing.active_children():
            worker.kill()
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
