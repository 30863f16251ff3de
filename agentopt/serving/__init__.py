"""The hosted endpoint: an engine under supervision, and a gateway with keys, metrics, tuned programs and capture.

    from agentopt.serving import ServeOptions, serve_forever
    serve_forever(ServeOptions(model="embedded"), print)

Importing this loads no engine and no web server. The parts stand in rooms of their own: `engines`, `gateway`, `keys`,
`admin`, `adapters`, `variants`, `capture`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentopt.serving._options import ServeOptions as ServeOptions
    from agentopt.serving._serve import serve as serve
    from agentopt.serving._serve import serve_forever as serve_forever

_LAZY = {"ServeOptions": "_options", "serve": "_serve", "serve_forever": "_serve"}

__all__ = ["ServeOptions", "serve", "serve_forever"]


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
