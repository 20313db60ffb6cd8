"""A GPU rehearsed on a CPU: tensors tagged `cuda:N` are computed here, but mixing devices raises and waits count.

    with Rehearsal() as gpu:                       # inside, `cuda:N` exists
        place(model, "cuda:0")
        gpu.waits.clear()
        model(**inputs).loss.backward()
        print(gpu.table())                         # what made the host wait for the GPU, and where
    python tests/gpu_rehearsal.py                  # the tables of the cases in tests/model/test_gpu_rehearsal.py

A `Tagged` tensor wraps a plain one and a place. Operations reach it below autograd and run on the plain tensors, after
a check that all of them are in one place; as on a GPU, numbers without dimensions and indices may come from the host.
What waits: reading a value, an operation whose result's size depends on values, and a copy between host and GPU (from
pinned memory a non-blocking copy does not wait, yet it is counted too, for the host may have to wait for the memory).
Streams, memory, kernels and collectives are not rehearsed.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

PACKAGE = str(Path(__file__).resolve().parents[1] / "self1e")
# Operations that ask the GPU how large their result is, or hand a value to the host.
WAITING = {
    "_local_scalar_dense": "value read", "nonzero": "nonzero", "masked_select": "masked_select", "equal": "equal",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique", "is_nonzero": "value read",
    "repeat_interleave": "repeat_interleave", "masked_scatter_backward": "masked_scatter, backward",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
READERS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__"}
WAITS: Counter = Counter()  # (kind, line) -> times


class WrongPlace(RuntimeError):
    """An operation over tensors of several devices."""


def line_of_ours() -> str:
    """The innermost line of the package on the stack; backward passes have none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward, or a library"


def wait(kind: str) -> None:
    WAITS[kind, line_of_ours()] += 1


class Tagged(Tensor):
    """A plain CPU tensor that claims to be elsewhere."""

    plain: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, plain: Tensor, place: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, strides=plain.stride(), storage_offset=plain.storage_offset(), dtype=plain.dtype
        )

    def __init__(self, plain: Tensor, place: torch.device):
        self.plain, self.place = plain.detach(), place

    def __repr__(self) -> str:
        return f"Tagged({self.place}, {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return intercept(func, args, kwargs or {}, plain_call)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        place = one_place(op, args, kwargs)
        bare_args, bare_kwargs = tree_map_only(Tagged, lambda x: x.plain, (args, kwargs))
        out = op(*bare_args, **bare_kwargs)
        out = tree_map_only(Tensor, lambda x: x if isinstance(x, Tagged) else Tagged(x, place), out)
        return return_and_correct_aliasing(op, args, kwargs, out)


def one_place(op, args: tuple, kwargs: dict) -> torch.device:
    """The device of an operation; raises WrongPlace where there are several, and counts what waits."""
    name = op._schema.name.partition("::")[2]
    if name in INDEXING:
        target, indices, values = args[0], [i for i in args[1] if i is not None], args[2:3]
        for index in indices:
            if not isinstance(index, Tagged):
                wait("index from the host")
            if index.dtype in (torch.bool, torch.uint8):
                wait("nonzero of a boolean index")
        checked = [target, *(i for i in indices if isinstance(i, Tagged)), *values]
    else:
        checked = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "copy_" and isinstance(args[0], Tagged) != isinstance(args[1], Tagged):
            wait("copy between host and GPU")
            return next(x.place for x in checked if isinstance(x, Tagged))
        if name in WAITING:
            wait(WAITING[name])
    tagged = [x for x in checked if isinstance(x, Tagged)]
    sized = [x for x in checked if isinstance(x, Tensor) and x.dim() > 0]
    places = {str(x.place) if isinstance(x, Tagged) else "cpu" for x in sized} or {str(tagged[0].place)}
    if len(places) > 1:
        shapes = [tuple(x.shape) for x in sized]
        raise WrongPlace(f"{op} over tensors on {sorted(places)} of shapes {shapes} at {line_of_ours()}")
    return torch.device(places.pop()) if places != {"cpu"} else tagged[0].place


def plain_call(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class Move(torch.autograd.Function):
    """A copy to another place; its gradient comes back."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place_of(x)
        return put(x, place)

    @staticmethod
    def backward(ctx, gradient):
        return put(gradient, ctx.place), None


def place_of(x: Tensor) -> torch.device:
    return x.place if isinstance(x, Tagged) else torch.device("cpu")


def put(x: Tensor, place: torch.device) -> Tensor:
    with torch._C.DisableTorchFunction():
        plain = (x.plain if isinstance(x, Tagged) else x).detach().clone()
    return plain if place.type == "cpu" else Tagged(plain, place)


def as_place(value: Any) -> torch.device:
    place = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    return torch.device("cuda", 0) if place.type == "cuda" and place.index is None else place


def carry(x: Tensor, place: torch.device) -> Tensor:
    """`x.to(place)`."""
    if place_of(x) == place:
        return x
    if "cpu" in (place.type, place_of(x).type):
        wait(f"copy to the {'host' if place.type == 'cpu' else 'GPU'}")
    return Move.apply(x, place)


def to(x: Tensor, *args, device=None, dtype=None, other=None, **kwargs) -> Tensor:
    """`Tensor.to` in all its spellings."""
    for value in (*args, other):
        if isinstance(value, Tensor):
            device, dtype = place_of(value), value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool)):
            device = value
    if dtype is not None and dtype != x.dtype:
        with torch._C.DisableTorchFunction():
            x = torch.Tensor.to(x, dtype)
    return x if device is None else carry(x, as_place(device))


def intercept(func: Callable, args: tuple, kwargs: dict, go_on: Callable) -> Any:
    """What a caller may see or decide about devices; everything else goes on."""
    name, first = getattr(func, "__name__", ""), args[0] if args else None
    if isinstance(first, Tensor):
        if name == "to":
            return to(*args, **kwargs)
        if name in ("cpu", "cuda"):
            return carry(first, as_place(args[1] if len(args) > 1 else name))
    if isinstance(first, Tagged):
        if func == torch.Tensor.device.__get__:
            return first.place
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return func == torch.Tensor.is_cuda.__get__
        if name == "get_device":
            return first.place.index
        if name in ("numpy", "__array__"):
            raise TypeError(f"a tensor on {first.place} has no numpy array: copy it to the host first")
        if name in READERS:
            wait("value read")
            return getattr(first.plain, name)()
        if name == "data_ptr":
            return first.plain.data_ptr()
    if kwargs.get("device") is not None:
        place = as_place(kwargs["device"])
        if isinstance(first, Tensor) and name == "as_tensor":
            return carry(first, place)
        if place.type == "cuda" or isinstance(first, Tagged):
            if name in ("tensor", "as_tensor"):
                wait("copy to the GPU")
            bare_args, bare_kwargs = tree_map_only(Tagged, lambda x: x.plain, (args, kwargs | {"device": "cpu"}))
            with torch._C.DisableTorchFunction():
                out = func(*bare_args, **bare_kwargs)
            return out if place.type == "cpu" else tree_map_only(Tensor, lambda x: Tagged(x, place), out)
    return go_on(func, args, kwargs)


class Rehearsal(TorchFunctionMode):
    """Inside, `cuda:N` exists. `waits`: (kind, line) -> times."""

    waits = WAITS

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return intercept(func, args, kwargs or {}, lambda func, args, kwargs: func(*args, **kwargs))

    def table(self) -> str:
        """A line for each kind of wait, the most frequent first."""
        return "\n".join(f"{times:5d} x {kind:<28} {line}" for (kind, line), times in self.waits.most_common())


def place(model: nn.Module, plan: str | dict[str, str]) -> nn.Module:
    """`model.to` in place: one device, or prefix -> device, the longest prefix wins; shared parameters stay shared."""
    plan = {"": plan} if isinstance(plan, str) else plan
    moved: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, x in store.items():
                if x is None or isinstance(x, Tagged):
                    continue
                if id(x) not in moved:
                    tagged = Tagged(x.data, as_place(device_for(f"{prefix}.{name}", plan)))
                    moved[id(x)] = tagged.requires_grad_(x.requires_grad)
                    tagged._is_param = isinstance(x, nn.Parameter)
                store[name] = moved[id(x)]
    return model


def device_for(name: str, plan: dict[str, str]) -> str:
    """The device of a module or parameter."""
    return plan[max((prefix for prefix in plan if not prefix or f"{name}.".startswith(f"{prefix}.")), key=len)]


def dispatch(model: nn.Module, plan: dict[str, str]) -> nn.Module:
    """The model spread over devices, with the hooks that accelerate puts there for `device_map=plan`."""
    from unittest.mock import patch

    from accelerate.hooks import attach_align_device_hook_on_blocks

    names = [name for name, _ in model.named_modules()]
    whole = [name for name in names if name and not any(prefix.startswith(f"{name}.") for prefix in plan)]
    blocks = {name: as_place(device_for(name, plan)) for name in whole if name in plan or name.count(".") < 4}
    main = as_place(plan[""])
    with patch("accelerate.hooks.set_module_tensor_to_device"):  # they are where they belong
        attach_align_device_hook_on_blocks(
            place(model, plan), execution_device={"": main, **blocks}, offload=dict.fromkeys(blocks, False),
            skip_keys=model._skip_keys_device_placement,
        )  # fmt: skip
    return model


if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main(["-q", "-s", str(Path(__file__).parent / "model" / "test_gpu_rehearsal.py"), *sys.argv[1:]]))
