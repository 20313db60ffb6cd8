"""Photos that worker processes read ahead of the model."""

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from self1e.data.samples import SampleError
from self1e.distributed import ignore_requests_to_stop
from self1e.evaluation.watchdog import Watchdog


def _as_is(item: Any) -> Any:
    return item


def read_ahead(
    dataset: Dataset,
    order: Sequence[int],
    *,
    workers: int,
    name: Callable[[int], str],
    watchdog: Watchdog | None = None,
) -> Generator[Any]:
    """The items of `dataset` in the given order, read by worker processes, or by this one when `workers` is 0.

    An error is an item too: passing through a worker as an exception would bury its message, and all ranks have to
    learn of it. Whoever iterates raises it. name: what the item of a number is called where its reader raises what it
    should not, or its worker dies. watchdog: hears which item is waited for, and which one is worked on.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # `workers` suits more cores
        loader = DataLoader(
            dataset,
            sampler=order,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=min(workers, len(order)),
            worker_init_fn=ignore_requests_to_stop,
            generator=torch.Generator(),  # or the loader would draw from the global one, and training after it change
        )
        items = iter(loader)
    for number in order:
        if watchdog is not None:
            watchdog.reading(name(number))
        try:
            item = next(items)
        except Exception as error:
            yield SampleError(name(number), f"reading it failed ({type(error).__name__}: {error})")
            return
        if watchdog is not None:
            watchdog.computing([name(number)])
        yield item
