"""Counts of long texts, remembered: a text of megabytes is counted several times on its way to a capsule."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

LONG = 1 << 16
"""Characters from which a count is worth remembering."""
_REMEMBERED = 256


class Remembered:
    """The counts of the last few long texts, by digest: the texts themselves are not held."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, text: str, count: Callable[[str], int]) -> int:
        """`count(text)`, once."""
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            found = self._counts.get(key)
        if found is None:
            found = count(text)
            with self._lock:
                self._counts[key] = found
                while len(self._counts) > _REMEMBERED:
                    self._counts.popitem(last=False)
        return found
