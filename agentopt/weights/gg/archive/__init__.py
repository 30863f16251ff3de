"""A model in one file (`.ggz`): weights on a uniform grid, entropy-coded, or every bit kept. Importing loads no torch.

    from agentopt.weights.gg import archive
    archive.pack("model-folder", "model.ggz", sqnr=42)    # or step=0.001, or lossless=True
    with archive.Archive("model.ggz") as packed:
        packed.read("model.embed_tokens.weight")          # reads this tensor's bytes alone
    archive.unpack("model.ggz", "model-again")

rANS: Duda, arXiv 1311.2540. Exp-Golomb-coded weights on a grid: arXiv 2504.16968, 2506.00486 v3.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from agentopt.weights.gg.archive._container import is_archive
from agentopt.weights.gg.archive._types import (
    CODINGS,
    DEFAULT_SQNR,
    PackResult,
    TensorInfo,
    TensorPacked,
    TensorUnpacked,
    TensorVerified,
    UnpackResult,
)

if TYPE_CHECKING:
    from agentopt.weights.gg.archive._archive import Archive as Archive
    from agentopt.weights.gg.archive._packing import pack as pack
    from agentopt.weights.gg.archive._unpacking import unpack as unpack

_LAZY = {"Archive": "_archive", "pack": "_packing", "unpack": "_unpacking"}

__all__ = [
    "CODINGS",
    "DEFAULT_SQNR",
    "Archive",
    "PackResult",
    "TensorInfo",
    "TensorPacked",
    "TensorUnpacked",
    "TensorVerified",
    "UnpackResult",
    "is_archive",
    "pack",
    "unpack",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.gg.archive.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
