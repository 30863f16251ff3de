"""Everything that touches tensors. Importing this loads no torch: heavy packages are imported by the functions."""

from __future__ import annotations

__all__: list[str] = []
