"""Self1E: a multimodal LLM that segments by itself.

`import self1e` loads nothing heavy: torch and transformers come with the first use of a name below. The Auto classes
of transformers know Self1E from the moment this package is imported.
"""

import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from self1e.flags import uncollected

if TYPE_CHECKING:
    from self1e.model.auto import Self1EConfig, Self1EForSegmentation, Self1EProcessor

__all__ = ["Self1EConfig", "Self1EForSegmentation", "Self1EProcessor"]

_REGISTRY = "self1e.model.auto"  # importing it registers the classes
# Modules of transformers and the Auto class in each that every way to a checkpoint passes.
_AUTO = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'self1e' has no attribute {name!r}")
    with uncollected():
        return getattr(importlib.import_module(_REGISTRY), name)


class _AutoClassHook:
    """Finds the modules of `_AUTO` as always, and lets their Auto classes register Self1E when they are first used.

    Registering at once would import transformers, which takes twice as long as torch; registering while one of these
    modules is imported would import transformers in a circle.
    """

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AUTO:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                _register_on_first_use(getattr(module, _AUTO[name]))

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _register_on_first_use(auto: Any) -> None:
    """Let `auto.from_pretrained` import `_REGISTRY` before it does its work for the first time."""
    original = auto.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto.from_pretrained = original
        importlib.import_module(_REGISTRY)
        return cls.from_pretrained(*args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)


if any(name in sys.modules for name in _AUTO):
    importlib.import_module(_REGISTRY)
else:
    sys.meta_path.insert(0, _AutoClassHook)
