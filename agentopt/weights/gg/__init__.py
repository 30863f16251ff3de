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

from agentopt.weights._events import Event, Resumed, Warned, Working
from agentopt.weights.gg._types import (
    EXPORTS,
    FORMATS,
    Encoded,
    GGFit,
    Histogram,
    Planned,
    Quality,
    QuantizeOptions,
    QuantizeResult,
    ShardWritten,
    TensorDone,
    TensorReport,
)

if TYPE_CHECKING:
    from agentopt.weights.gg import archive as archive
    from agentopt.weights.gg._backslash import BackSlash as BackSlash
    from agentopt.weights.gg._backslash import Record as Record
    from agentopt.weights.gg._books import NUS as NUS
    from agentopt.weights.gg._books import compander as compander
    from agentopt.weights.gg._books import default_books as default_books
    from agentopt.weights.gg._books import refine as refine
    from agentopt.weights.gg._books import sample_rows as sample_rows
    from agentopt.weights.gg._codec import code_entropy as code_entropy
    from agentopt.weights.gg._codec import decode as decode
    from agentopt.weights.gg._codec import encode as encode
    from agentopt.weights.gg._codec import sqnr as sqnr
    from agentopt.weights.gg._deepshape import Reshaped as Reshaped
    from agentopt.weights.gg._deepshape import deepshape as deepshape
    from agentopt.weights.gg._deepshape import deepshape_ as deepshape_
    from agentopt.weights.gg._density import beta_of as beta_of
    from agentopt.weights.gg._density import cdf as cdf
    from agentopt.weights.gg._density import entropy as entropy
    from agentopt.weights.gg._density import logpdf as logpdf
    from agentopt.weights.gg._density import pdf as pdf
    from agentopt.weights.gg._density import quantile as quantile
    from agentopt.weights.gg._density import ratio as ratio
    from agentopt.weights.gg._density import sample as sample
    from agentopt.weights.gg._density import sigma_of as sigma_of
    from agentopt.weights.gg._fit import fit as fit
    from agentopt.weights.gg._init import init_ as init_
    from agentopt.weights.gg._linear import RF8Embedding as RF8Embedding
    from agentopt.weights.gg._linear import RF8Linear as RF8Linear
    from agentopt.weights.gg._quantize import quantize as quantize
    from agentopt.weights.gg._rates import Rates as Rates
    from agentopt.weights.gg._rates import bits_per_weight as bits_per_weight

_LAZY: dict[str, str] = {
    "BackSlash": "_backslash",
    "Record": "_backslash",
    "NUS": "_books",
    "compander": "_books",
    "default_books": "_books",
    "refine": "_books",
    "sample_rows": "_books",
    "code_entropy": "_codec",
    "decode": "_codec",
    "encode": "_codec",
    "sqnr": "_codec",
    "Reshaped": "_deepshape",
    "deepshape": "_deepshape",
    "deepshape_": "_deepshape",
    "beta_of": "_density",
    "cdf": "_density",
    "entropy": "_density",
    "logpdf": "_density",
    "pdf": "_density",
    "quantile": "_density",
    "ratio": "_density",
    "sample": "_density",
    "sigma_of": "_density",
    "fit": "_fit",
    "init_": "_init",
    "RF8Embedding": "_linear",
    "RF8Linear": "_linear",
    "quantize": "_quantize",
    "Rates": "_rates",
    "bits_per_weight": "_rates",
}

__all__ = [
    "EXPORTS",
    "FORMATS",
    "NUS",
    "BackSlash",
    "Encoded",
    "Event",
    "GGFit",
    "Histogram",
    "Planned",
    "Quality",
    "QuantizeOptions",
    "QuantizeResult",
    "RF8Embedding",
    "RF8Linear",
    "Rates",
    "Record",
    "Reshaped",
    "Resumed",
    "ShardWritten",
    "TensorDone",
    "TensorReport",
    "Warned",
    "Working",
    "archive",
    "beta_of",
    "bits_per_weight",
    "cdf",
    "code_entropy",
    "compander",
    "decode",
    "deepshape",
    "deepshape_",
    "default_books",
    "encode",
    "entropy",
    "fit",
    "init_",
    "logpdf",
    "pdf",
    "quantile",
    "quantize",
    "ratio",
    "refine",
    "sample",
    "sample_rows",
    "sigma_of",
    "sqnr",
]


def __getattr__(name: str) -> object:
    if name == "archive":
        return importlib.import_module("agentopt.weights.gg.archive")
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.gg.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
