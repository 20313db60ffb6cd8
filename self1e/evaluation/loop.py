"""The loop of every evaluation, and of `self1e segment`: data workers prepare what this rank then works on."""

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, default_convert
from tqdm import tqdm

from self1e import distributed
from self1e.errors import UserError
from self1e.stop import Stopped

T = TypeVar("T")
WAIT = timedelta(days=1)  # that a rank may wait for the share of another one


def progress(total: int, **options: Any) -> tqdm:
    """tqdm's bar on the first process alone; in a log file, where nothing can move a cursor, a line per tenth."""
    if distributed.world_size() > 1:
        options["desc"] += f", process 1 of {distributed.world_size()}"
    if not sys.stderr.isatty():
        write = lambda text: text.strip() and print(text.strip(), file=sys.stderr)  # noqa: E731
        lines = SimpleNamespace(write=write, flush=sys.stderr.flush)
        form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {remaining} left{postfix}"
        options |= {"file": lines, "bar_format": form, "delay": 1e-9}  # a delay: no line at 0
        options |= {"miniters": -(-total // 10), "mininterval": 0, "maxinterval": float("inf"), "leave": False}
    return tqdm(total=total, disable=not distributed.is_main(), **options)


def attempt(prepare: Callable[[T], Any], item: T) -> Any:
    """The item prepared, or the error of a broken one: a worker that raised it would bury it in its traceback."""
    try:
        return default_convert(prepare(item))
    except UserError as error:
        return error


def prepared(
    items: Sequence[T],
    prepare: Callable[[T], Any],
    *,
    workers: int = 4,
    timeout: float = 0,
    asked_to_stop: Callable[[], bool] | None = None,
    broken: Callable[[UserError], None] | None = None,
) -> Iterator[tuple[T, Any]]:
    """Each item of this rank with what data workers have made of it, in order.

    Args:
        prepare: a function of an item that other processes can be given.
        workers: of them. timeout: seconds that one of them may take for an item; 0: any time.
        asked_to_stop: called before each item; where it returns True, this rank leaves, and when the others have left
            or finished, all raise `Stopped`.
        broken: takes the UserError of an item, which is then passed over. None: it is raised, on this rank.
    """
    loader: DataLoader = DataLoader(
        items,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=partial(attempt, prepare),
        num_workers=min(workers, len(items)),
        timeout=timeout if workers and items else 0,
        generator=torch.Generator(),  # or the loader would draw from the global one, and training after it change
        worker_init_fn=distributed.ignore_signals,
    )
    stopped = False
    for item, made in zip(items, loader):
        stopped = asked_to_stop is not None and asked_to_stop()
        if stopped:
            break
        if not isinstance(made, UserError):
            yield item, made
        elif broken is None:
            raise made
        else:
            broken(made)
    if any(distributed.gather(stopped)):
        raise Stopped
