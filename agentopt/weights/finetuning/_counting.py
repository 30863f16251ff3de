"""How far a long measurement is: rows that went through the model, counted where they enter it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

Told = Callable[[str, int, int | None], None]


@contextlib.contextmanager
def counted(model: Any, told: Told, what: str, total: int) -> Generator[None]:
    """Tell after every forward pass how many of `total` rows were seen.

    Args:
        model: what is called with `input_ids`.
        told: takes what is being done, rows so far, and the total.
        what: is being done.
        total: rows in all, as far as that can be said beforehand.
    """
    seen = 0

    def count(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        nonlocal seen
        ids = keywords.get("input_ids")
        seen = min(total, seen + (1 if ids is None else int(ids.shape[0])))
        told(what, seen, total)

    told(what, 0, total)
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
