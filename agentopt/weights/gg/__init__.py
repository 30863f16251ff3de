"""Generalized-Gaussian weights: fit, initialise, train for rate, reshape, quantize to a byte. Importing loads no torch.

    from agentopt.weights import gg
    fit = gg.fit(weight)                                        # nu, beta, sigma
    encoded = gg.encode(weight, format="rf8-gg")
    gg.decode(encoded)
    gg.quantize("model-folder", "model-rf8", format="rf8-gg")   # one folder for transformers, peft and vLLM

GG initialisation, DeepShape and RF8: arXiv 2506.00486 v3 (v4 dropped the last two). BackSlash: arXiv 2504.16968.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from agentopt.weights.gg._types import (
    EXPORTS,
    FORMATS,
    Encoded,
    GGFit,
    Quality,
    QuantizeOptions,
    QuantizeResult,
    TensorReport,
)

if TYPE_CHECKING:
    from agentopt.weights.gg._books import NUS as NUS
    from agentopt.weights.gg._books import compander as compander
    from agentopt.weights.gg._books import default_books as default_books
    from agentopt.weights.gg._books import refine as refine
    from agentopt.weights.gg._books import sample_rows as sample_rows
    from agentopt.weights.gg._codec import code_entropy as code_entropy
    from agentopt.weights.gg._codec import decode as decode
    from agentopt.weights.gg._codec import encode as encode
    from agentopt.weights.gg._codec import sqnr as sqnr

_LAZY: dict[str, str] = {
    "NUS": "_books",
    "code_entropy": "_codec",
    "compander": "_books",
    "decode": "_codec",
    "default_books": "_books",
    "encode": "_codec",
    "refine": "_books",
    "sample_rows": "_books",
    "sqnr": "_codec",
}

__all__ = [
    "EXPORTS",
    "FORMATS",
    "NUS",
    "Encoded",
    "GGFit",
    "Quality",
    "QuantizeOptions",
    "QuantizeResult",
    "TensorReport",
    "code_entropy",
    "compander",
    "decode",
    "default_books",
    "encode",
    "refine",
    "sample_rows",
    "sqnr",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.gg.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
