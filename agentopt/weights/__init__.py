"""Everything that touches tensors. Importing this loads no torch: heavy packages are imported by the functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentopt.weights import adapters as adapters
    from agentopt.weights import finetuning as finetuning
    from agentopt.weights import fold as fold
    from agentopt.weights import gg as gg
    from agentopt.weights import int8 as int8
    from agentopt.weights import load as load
    from agentopt.weights import prefix as prefix
    from agentopt.weights import tasks as tasks
    from agentopt.weights import zeroth as zeroth

__all__ = ["adapters", "finetuning", "fold", "gg", "int8", "load", "prefix", "tasks", "zeroth"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return importlib.import_module(f"agentopt.weights.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
