"""The gateway: an ASGI application in front of one engine, and the server it runs in. Importing this loads no parser.

gateway = Gateway(engine, catalog, keyring=keyring, observers=[meter, log])
await serve_app(gateway, "127.0.0.1", 8000, stop=stop)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from agentopt.serving.gateway._limits import Limits

if TYPE_CHECKING:
    from agentopt.serving.gateway._app import Gateway as Gateway
    from agentopt.serving.gateway._client import Upstream as Upstream
    from agentopt.serving.gateway._client import UpstreamReply as UpstreamReply
    from agentopt.serving.gateway._logs import AccessLog as AccessLog
    from agentopt.serving.gateway._openapi import document as document
    from agentopt.serving.gateway._server import raise_file_limit as raise_file_limit
    from agentopt.serving.gateway._server import serve_app as serve_app
    from agentopt.serving.gateway._server import serving as serving
    from agentopt.serving.gateway._wire import UpstreamError as UpstreamError

_LAZY = {
    "AccessLog": "_logs",
    "Gateway": "_app",
    "Upstream": "_client",
    "UpstreamError": "_wire",
    "UpstreamReply": "_client",
    "document": "_openapi",
    "raise_file_limit": "_server",
    "serve_app": "_server",
    "serving": "_server",
}

__all__ = [
    "AccessLog",
    "Gateway",
    "Limits",
    "Upstream",
    "UpstreamError",
    "UpstreamReply",
    "document",
    "raise_file_limit",
    "serve_app",
    "serving",
]


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
