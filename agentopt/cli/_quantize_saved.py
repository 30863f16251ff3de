"""The result of a quantization as its folder keeps it, so that it can be shown, and its report written, at any time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from agentopt.cli._quantize_settings import RESULT
from agentopt.errors import UserError
from agentopt.weights.gg import Quality, QuantizeResult, TensorReport
from agentopt.weights.gg._types import Histogram


def saved_result(folder: str | Path) -> QuantizeResult:
    """What `quantize` gave when it wrote this folder.

    Raises:
        UserError: the folder holds none, or none that can be read.
    """
    path = Path(folder) / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        quality = found["quality"]
        return QuantizeResult(
            out=str(folder),  # it may have been moved
            format=found["format"],
            tensors=tuple(_tensor(one) for one in found["tensors"]),
            kept=tuple(found["kept"]),
            bytes_before=found["bytes_before"],
            bytes_16=found["bytes_16"],
            bytes_after=found["bytes_after"],
            seconds=found["seconds"],
            quality=None if quality is None else Quality(**quality),
            source=str(found.get("source", "")),
            warnings=tuple(found.get("warnings", ())),
        )
    except FileNotFoundError:
        raise UserError(f"{folder}: found no {RESULT}, which agentopt quantize writes into a new folder.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as the result of a quantization ({error}).") from None


def _tensor(one: dict[str, Any]) -> TensorReport:
    histogram = one["histogram"]
    sqnr = one["sqnr_db"]
    fields: dict[str, Any] = {
        **one,
        "shape": tuple(one["shape"]),
        "sqnr_db": math.inf if sqnr is None else sqnr,
        "histogram": Histogram(histogram["low"], histogram["high"], tuple(histogram["counts"])),
    }
    return TensorReport(**fields)
