"""The admin side as an ASGI app, on a port of its own: state, metrics, adapters, variants, drain.

/health and /metrics answer anybody who reaches the port, as orchestrators and Prometheus expect; all else wants the
token. The gateway has none of these routes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import anyio.to_thread

from agentopt.errors import AgentoptError, UserError
from agentopt.serving._types import Phase, Refusal
from agentopt.serving.admin._doors import HostCheck, check_token, loopback
from agentopt.serving.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from agentopt.serving.admin._control import Adapters, Control

_log = logging.getLogger("agentopt.serving.admin")
_LONGEST_BODY = 64 << 10
_LONGEST_DRAIN = 86400.0
_METRICS_SECONDS = 5.0


def admin_app(control: Control) -> ASGIApp:
    """The app over the parts of one server; binds the meter to them."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    routes = _Routes(control)
    control.meter.bind(control)

    def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            check_token([value for name, value in request.headers.raw if name == b"authorization"], control.token)
            return await handler(request)

        return checked

    app = Starlette(
        routes=[
            Route("/health", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
            Route("/status", guarded(routes.status), methods=["GET"]),
            Route("/openapi.json", guarded(routes.openapi), methods=["GET"]),
            Route("/adapters", guarded(routes.adapters), methods=["GET"]),
            Route("/adapters", guarded(routes.add), methods=["POST"]),
            Route("/adapters/{name:path}", guarded(routes.remove), methods=["DELETE"]),
            Route("/variants", guarded(routes.variants), methods=["GET"]),
            Route("/drain", guarded(routes.drain), methods=["POST"]),
        ],
        exception_handlers={AgentoptError: _error, HTTPException: _http_error, Exception: _fault},
    )
    return HostCheck(app) if loopback(control.host) else app


class _Routes:
    """One method per route."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def health(self, request: Request) -> Response:
        """The process is up."""
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Ours and the engine's; without the engine's where it does not answer."""
        from starlette.responses import Response

        text = await anyio.to_thread.run_sync(self._control.meter.text, await _engine_metrics(self._control))
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def status(self, request: Request) -> Response:
        """`Control.status`."""
        return _json(self._control.status())

    async def openapi(self, request: Request) -> Response:
        """The document of the public routes."""
        from agentopt.serving.gateway import document

        return _json(document(self._control.engine.abilities, self._control.capture is not None))

    async def adapters(self, request: Request) -> Response:
        """All adapters and which of them the engine holds."""
        return _json({"adapters": [one.to_dict() for one in self._registry().list()]})

    async def add(self, request: Request) -> Response:
        """Check and add one: {"name", "path"}; the path as the server sees it."""
        registry, body = self._registry(), await _body(request)
        name, path = body.get("name"), body.get("path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path or "\0" in path:
            raise Refusal(400, 'Expected {"name": "...", "path": "folder of the adapter, as the server sees it"}.')
        taken: Any = getattr(self._control.catalog, "taken", None)
        if taken is not None and (what := taken(name)):
            raise Refusal(409, f"{name} is {what} already; take another name.", code="name_taken", param="name")
        await registry.add(name, path, keep=True)
        listed = [one.to_dict() for one in registry.list()]
        return _json(next((one for one in listed if one.get("name") == name), {"name": name}), 201)

    async def remove(self, request: Request) -> Response:
        """Take one away; requests that use it end first."""
        # Our server leaves paths as they came; names may hold characters that clients escape.
        registry, name = self._registry(), unquote(str(request.path_params["name"]))
        if name not in registry:
            raise Refusal(404, f"There is no adapter {name}.", code="not_found")
        await registry.remove(name)
        return _json({"name": name, "removed": True})

    async def variants(self, request: Request) -> Response:
        """What each candidate of each virtual model was asked and got."""
        scores = self._control.scores
        return _json({"variants": [] if scores is None else await anyio.to_thread.run_sync(scores)})

    async def drain(self, request: Request) -> Response:
        """Answers when it has drained: {"seconds": 30, "stop": true}; then the server ends, where stop is true."""
        from starlette.background import BackgroundTask

        body = await _body(request)
        seconds, stop = body.get("seconds", 30), body.get("stop", True)
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not 0 <= seconds <= _LONGEST_DRAIN or not isinstance(stop, bool):
            raise Refusal(400, f'Expected {{"seconds": 0 to {_LONGEST_DRAIN:.0f}, "stop": true or false}}.')
        drained = await self._control.drain(float(seconds))
        ending = self._control.stop if stop else None
        response = _json(
            {"drained": drained, "in_flight": self._control.gateway.in_flight, "stops": ending is not None}
        )
        response.background = None if ending is None else BackgroundTask(_call, ending)
        return response

    def _registry(self) -> Adapters:
        registry = self._control.adapters
        if registry is None:
            name = self._control.engine.name
            there = "; load them where that engine runs, and they are models here" if name == "external" else ""
            raise Refusal(501, f"This server takes no adapters: its engine is {name}{there}.", code="no_adapters")
        return registry


async def _call(function: Callable[[], None]) -> None:
    """On the event loop: starlette runs plain functions in a thread."""
    function()


async def _engine_metrics(control: Control) -> str:
    """The engine's own text; empty when it has none or does not answer in time."""
    if control.engine.phase is not Phase.READY:
        return ""
    try:
        with anyio.fail_after(_METRICS_SECONDS):
            if control.engine_metrics is not None:
                return await control.engine_metrics()
            from agentopt.serving.engines import fetch

            status, body = await fetch(control.engine.address, "/metrics", timeout=_METRICS_SECONDS)
    except (OSError, TimeoutError, AgentoptError, ValueError) as error:
        _log.info("the engine's metrics are not to be had: %s", error)
        return ""
    return body.decode("utf-8", "replace") if status == 200 else ""


def _json(content: Any, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers={"cache-control": "no-store"})


async def _body(request: Request) -> dict[str, Any]:
    """The request's JSON object; empty for none.

    Raises:
        Refusal: 413 too long, 400 no JSON object.
    """
    import json

    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _LONGEST_BODY:
            raise Refusal(413, f"The body is longer than {_LONGEST_BODY} bytes.")
    try:
        body: Any = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "The body is not a JSON object.")
    return cast("dict[str, Any]", body)


async def _error(request: Request, error: Exception) -> Response:
    """Refusals with their status; a user's mistake is 400; what could not be done is 502."""
    if isinstance(error, Refusal):
        response = _json(error.body(), error.status)
        if error.status == 401:
            response.headers["www-authenticate"] = "Bearer"
        if error.retry_after is not None:
            response.headers["retry-after"] = str(math.ceil(error.retry_after))
        return response
    status, kind = (400, "invalid_request_error") if isinstance(error, UserError) else (502, "server_error")
    return _json(Refusal(status, str(error), kind=kind).body(), status)


async def _http_error(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 500)
    headers: dict[str, str] | None = getattr(error, "headers", None)
    text = {404: "There is no such route.", 405: "This route takes another method."}.get(status, str(error))
    response = _json(Refusal(status, text).body(), status)
    response.headers.update(headers or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    """A mistake of ours: the log has it, the client gets no insides."""
    return _json(Refusal(500, "The server made a mistake; its log says more.", kind="server_error").body(), 500)
