"""Mutations of annotation files and pictures for tests/data/test_fuzz.py, and what a reader may do with them."""

import contextlib
import copy
import json
import os
import pickle
import signal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from trees import H, W

from self1e.data.samples import SampleError

INPUTS = int(os.environ.get("SELF1E_FUZZ_INPUTS", 280))
TESTS = 14  # that share the inputs
HANG = 20  # seconds
fuzz = settings(
    max_examples=-(-INPUTS // TESTS),
    derandomize="SELF1E_FUZZ_SEED" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JUNK = [
    None, True, False, 0, -1, 1, 7, 1 << 31, 1 << 40, 1 << 70, -(1 << 70), 0.5, float("nan"), float("inf"), 1e300,
    "", " ", "7", "x", "../../up.jpg", "/etc/hostname", "\0", "a" * 5_000, "the [SEG]", "<|im_end|>", "é\ud800",
    [], {}, [[]], [None], [1, 2, 3], {"a": 1}, [[1, 2, 3, 4, 5, 6]], [[0, 0, 1e5, 1e5, 0, 1e5] * 50], [True] * 6,
    {"size": [H, W], "counts": ""}, {"size": [H, W], "counts": "o"}, {"size": [H, W], "counts": [H * W + 1]},
]  # fmt: skip


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise AssertionError(f"an input took more than {HANG} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def refused_by_name(*names: str):
    """Passes on only what no user should see: another error, or one that names nothing."""
    try:
        yield
    except (ValueError, OSError, SampleError) as error:
        assert any(name in str(error) for name in names), f"{type(error).__name__} names no file: {error}"


def places(value, path=()):
    """Paths of all values of a JSON tree."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def changes(draw, value):
    """A copy of a JSON tree in which one to three values are replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([path for path in places(value) if path] or [("gone",)]))
        if last == "gone":
            break
        owner = value
        for key in parents:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "nest", "remove", "double"]))
        if action == "remove":
            del owner[last]
        elif action == "double" and isinstance(owner, list):
            owner.append(owner[last])
        elif action == "nest":
            owner[last] = "NESTED"
        else:
            owner[last] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    return value


@st.composite
def damage(draw, raw):
    """Bytes of which one is flipped, or that end early."""
    place = draw(st.integers(0, len(raw) - 1)) if raw else 0
    if not raw or draw(st.booleans()):
        return raw[:place]
    return raw[:place] + bytes([raw[place] ^ draw(st.integers(1, 255))]) + raw[place + 1 :]


def to_json(value) -> bytes:
    """JSON in which "NESTED" is a list deeper than any parser goes."""
    return json.dumps(value).replace('"NESTED"', "[" * 200_000 + "]" * 200_000).encode()


def to_pickle(value) -> bytes:
    return pickle.dumps(value, protocol=2)
