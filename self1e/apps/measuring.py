"""What computations cost: time, FLOPs, and bytes of the tensors that are alive together, on any device."""

import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive together, those of `known` not counted; `meta` tensors count as real ones.

    `now` is what is alive at the moment, `most` the largest value so far. Together with a `FlopCounterMode`, whose
    hooks keep recomputed tensors alive, it counts too much under gradient checkpointing: count one after the other.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.alive = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs: dict[str, Any] | None = None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.add(x.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of `work`, after one unmeasured run."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
