"""What is wrong with what a user gave; every other exception is a fault of the code and keeps its traceback."""

from collections.abc import Iterable


class UserError(Exception):
    """A flag, a path, a data file or a checkpoint is wrong: one line that names it and says how to mend it."""


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError, `<what> 'x'; known: ...`, for those of `names` that are not among the `known` ones."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
