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

_LAZY: dict[str, str] = {}

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Encoded",
    "GGFit",
    "Quality",
    "QuantizeOptions",
    "QuantizeResult",
    "TensorReport",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.gg.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
