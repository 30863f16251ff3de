"""GGUF files read once instead of three times, and without numpy's slow kind of array, while a model is loaded.

transformers reads a GGUF file for the configuration, for the weights and for the tokenizer, each time by the package
gguf, which makes an array of every single word of the vocabulary; and it asks for the table of tensor names once per
module, though it depends on nothing but the architecture. What is read is the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Generator
from typing import Any


@contextlib.contextmanager
def read_once() -> Generator[None]:
    """Within this, a GGUF file is parsed once; does nothing where the package gguf is not installed."""
    try:
        gguf: Any = importlib.import_module("gguf")
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    except (ImportError, AttributeError):
        yield
        return
    # The last file alone is kept, and only until the model is loaded.
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(_plain(reader))
    gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


def _plain(reader: Any) -> Any:
    """The reader over an ordinary array: slices of a memory map are many times slower, and there are millions."""
    import numpy as np

    def set_data(self: Any, mapped: Any) -> None:
        self.__dict__["data"] = mapped.view(np.ndarray)

    def data(self: Any) -> Any:
        return self.__dict__["data"]

    return type(reader.__name__, (reader,), {"data": property(data, set_data)})
