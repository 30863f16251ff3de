"""Reading datasets."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentopt.evaluation._data import Dataset, Example

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example] | Dataset


def load_dataset(
    source: Source,
    *,
    name: str | None = None,
    inputs: Sequence[str] | None = None,
    label: str | None = None,
    signature: inspect.Signature | None = None,
) -> Dataset:
    """Read a dataset."""
    raise NotImplementedError
