"""The capture endpoint: a loopback OpenAI-compatible server for agents that call a client of their own.

`agentopt tune` starts it and sets OPENAI_BASE_URL, so that calls of `openai` (and of libraries built on it) become
calls of the `LM` that plays the role "agent": cache, throttle, retries, cost, records, the active candidate's context.
Which model answers: the one configured for "agent"; else the server the client would have reached, with its own key;
else the embedded model. It listens on 127.0.0.1, on a free port, below an unguessable path.

Served: /chat/completions (streamed or not), /completions, /models, /embeddings (passed through). Not served: the
Responses API and everything else, which get a 501 that says so.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, TypeVar

from agentopt.errors import AgentoptError, RunError
from agentopt.models import _config
from agentopt.models._capture_calls import HEADER, Register, Session, Unattributed, current_session, unwatch, watch
from agentopt.models._capture_wire import (
    Asked,
    Chunks,
    chat_object,
    completion_object,
    error_event,
    error_object,
    read_chat,
    read_completion,
)
from agentopt.models._connect import UPSTREAM_ENV, openai_base_url
from agentopt.models._lm import LM, reply_watch
from agentopt.models._protocol import Reply, Request

T = TypeVar("T")

PLACEHOLDER_KEY = "agentopt-capture"
"""OPENAI_API_KEY while the endpoint runs and the user has none: client libraries insist on a key."""
_HOST = "127.0.0.1"
_ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_API_KEY", UPSTREAM_ENV)
_MAX_BODY = 64 << 20
_NO_RETRY = {"x-should-retry": "false"}  # the LM behind us has retried already; OpenAI's client obeys this header


class Capture:
    """One endpoint in a background thread. Use as a context manager, or `start()` and `close()`.

    Raises:
        RunError: (from `start`) the server cannot listen.
    """

    def __init__(self) -> None:
        self._register = Register()
        self._secret = secrets.token_urlsafe(16)
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._saved: dict[str, str | None] = {}
        self.port = 0

    @property
    def base_url(self) -> str:
        """What OPENAI_BASE_URL is set to."""
        return f"http://{_HOST}:{self.port}/{self._secret}/v1"

    def start(self, *, set_environment: bool = True) -> Capture:
        """Listen; with `set_environment` put the address into OPENAI_BASE_URL until `close`."""
        import uvicorn

        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.bind((_HOST, 0))
        except OSError as error:
            listener.close()
            raise RunError(f"the capture endpoint cannot listen on {_HOST}: {error}; run with --no-capture") from error
        self.port = int(listener.getsockname()[1])
        config = uvicorn.Config(
            self._application(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="agentopt-capture", daemon=True
        )
        self._thread.start()
        watch(_HOST, self.port, self._register)
        if set_environment:
            self._set_environment()
        _running.append(self)
        return self

    def close(self) -> None:
        """Stop listening, restore the environment and the HTTP libraries. Calls under way are cut off."""
        if self in _running:
            _running.remove(self)
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved.clear()
        unwatch(_HOST, self.port)
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(5)
            self._server = self._thread = None

    def __enter__(self) -> Capture:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def session(self) -> Generator[Session]:
        """One rollout: calls from this context (and from processes given its environment) belong to it."""
        key = os.environ.get("OPENAI_API_KEY") or PLACEHOLDER_KEY
        address = f"http://{_HOST}:{self.port}/{self._secret}"
        with self._register.session(lambda token: f"{address}/r/{token}/v1", key) as session:
            yield session

    def _set_environment(self) -> None:
        self._saved = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.setdefault(UPSTREAM_ENV, os.environ.get("OPENAI_BASE_URL", ""))
        os.environ["OPENAI_BASE_URL"] = os.environ["OPENAI_API_BASE"] = self.base_url
        os.environ.setdefault(
            "OPENAI_API_KEY", PLACEHOLDER_KEY
        )  # a real key is left where the upstream client reads it

    # ---- the server side; everything below runs in the server's thread

    def _application(self) -> Any:
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes: list[Route] = []
        for prefix in (f"/{self._secret}/v1", f"/{self._secret}/r/{{token}}/v1"):
            routes += [
                Route(prefix + "/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route(prefix + "/completions", self._guarded(self._completion), methods=["POST"]),
                Route(prefix + "/embeddings", self._guarded(self._embeddings), methods=["POST"]),
                Route(prefix + "/models", self._guarded(self._models), methods=["GET"]),
                Route(prefix + "/{rest:path}", self._guarded(self._unsupported), methods=["GET", "POST", "DELETE"]),
            ]
        return Starlette(routes=routes)

    def _guarded(self, handle: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """The handler with the caller's context found, and every exception turned into OpenAI error JSON."""

        async def endpoint(http: Any) -> Any:
            from starlette.responses import JSONResponse

            context: Context | None = None
            try:
                context = self._register.context_of(http.headers.get(HEADER), http.path_params.get("token"))
                return await handle(http, context)
            except Unattributed as error:
                return JSONResponse(_plain_error(str(error), "unattributed_request"), 409, headers=_NO_RETRY)
            except Exception as error:  # noqa: BLE001  # the client gets it as an error reply, the session keeps it
                _note(context, error)
                status, body = error_object(error)
                return JSONResponse(body, status, headers=_NO_RETRY)

        return endpoint

    async def _chat(self, http: Any, context: Context) -> Any:
        from starlette.responses import JSONResponse, StreamingResponse

        asked = read_chat(await _json_body(http))
        if asked.stream and asked.samples == 1:
            first, rest = await _begun(_stream(asked, http, context))
            return StreamingResponse(_joined(first, rest), media_type="text/event-stream")
        return JSONResponse(chat_object(asked, await _complete([asked], http, context)))

    async def _completion(self, http: Any, context: Context) -> Any:
        from starlette.responses import JSONResponse

        asked = read_completion(await _json_body(http))
        if asked[0].stream:
            raise RunError("the capture endpoint streams /chat/completions only")
        return JSONResponse(completion_object(asked[0], await _complete(asked, http, context)))

    async def _models(self, http: Any, context: Context) -> Any:
        from starlette.responses import JSONResponse

        name = context.run(_model_for, "", http).name
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "agentopt"}]})

    async def _embeddings(self, http: Any, context: Context) -> Any:
        import httpx
        from starlette.responses import JSONResponse, Response

        key = _upstream_key(http)
        if key is None and not os.environ.get(UPSTREAM_ENV):
            message = "embeddings go to the server behind the capture endpoint, and none is known: set OPENAI_API_KEY"
            return JSONResponse(_plain_error(message, "not_supported"), 501, headers=_NO_RETRY)
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        async with httpx.AsyncClient(timeout=60) as client:
            reply = await client.post(
                f"{openai_base_url().rstrip('/')}/embeddings", content=await http.body(), headers=headers
            )
        return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))

    async def _unsupported(self, http: Any, context: Context) -> Any:
        from starlette.responses import JSONResponse

        message = (
            f"the capture endpoint does not serve {http.method} /{http.path_params['rest']}: use chat.completions "
            "(the Responses API is not captured), or run with --no-capture"
        )
        return JSONResponse(_plain_error(message, "not_supported"), 501, headers=_NO_RETRY)


_running: list[Capture] = []


@contextmanager
def capture_session() -> Generator[Session | None]:
    """One rollout's calls belong together: entered by the evaluator; does nothing while no endpoint runs."""
    if not _running:
        yield None
        return
    with _running[-1].session() as session:
        yield session


def capture_environment() -> dict[str, str]:
    """Variables for a subprocess of this rollout: `subprocess.run(..., env={**os.environ, **capture_environment()})`.

    Empty outside a rollout or without an endpoint.
    """
    session = current_session()
    return {} if session is None else session.environment()


def environment_outside() -> dict[str, str | None] | None:
    """The variables that the running endpoint changed, as they were before it; None without one."""
    return dict(_running[-1]._saved) if _running else None


def _plain_error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}


def _note(context: Context | None, error: Exception) -> None:
    session = None if context is None else context.run(current_session)
    if session is not None and isinstance(error, AgentoptError):
        session.errors.append(error)


async def _json_body(http: Any) -> Any:
    import json

    from agentopt.models._capture_wire import BadBody

    raw = await http.body()
    if len(raw) > _MAX_BODY:
        raise BadBody(f"the body has {len(raw)} bytes, at most {_MAX_BODY} are accepted")
    try:
        return json.loads(raw)
    except ValueError as error:
        raise BadBody(f"the body is not JSON: {error}") from error


def _upstream_key(http: Any) -> str | None:
    """The user's own key: the one the client sent (it may be set in code), else the environment's."""
    sent = http.headers.get("authorization", "").removeprefix("Bearer ").strip()
    for key in (sent, os.environ.get("OPENAI_API_KEY", "")):
        if key and key != PLACEHOLDER_KEY:
            return key
    return None


def _model_for(model: str, http: Any) -> LM:
    """The LM that answers (see the module's text); runs in the caller's context."""
    for config in (_config.current_config(), _config._process):
        if "agent" in config.models:
            return _config.resolve("agent")
    key = _upstream_key(http)
    if model and (key or os.environ.get(UPSTREAM_ENV)):
        from agentopt.models._connect import connect

        return LM(connect(f"openai/{model}", api_key=key), settings=_config.current_config().settings)
    return _config.resolve("agent")


async def _complete(wanted: list[Asked], http: Any, context: Context) -> list[Reply]:
    """The replies to every prompt and sample, one after the other; ends early when the client goes away."""

    async def work() -> list[Reply]:
        from dataclasses import replace

        replies: list[Reply] = []
        for asked in wanted:
            lm = _model_for(asked.model, http)
            for sample in range(asked.samples):
                options = replace(asked.options, sample=asked.options.sample + sample)
                replies.append(
                    await lm.complete(asked.messages, tools=asked.tools, choices=asked.choices, options=options)
                )
        return replies

    return await _while_connected(asyncio.create_task(work(), context=context), http)


async def _while_connected(task: asyncio.Task[T], http: Any) -> T:
    """Await `task`; when the client disconnects, cancel it: nobody pays for a reply nobody reads."""
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            raise RunError("the client closed the connection")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(http: Any) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(asked: Asked, http: Any, context: Context) -> AsyncIterator[str]:
    """Server-sent events. The LM works in a task of its own, in the caller's context."""
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    chunks = Chunks(asked)
    finished: list[Reply] = []

    async def work() -> None:
        earlier = reply_watch.get()

        def keep(request: Request, reply: Reply) -> None:
            finished.append(reply)
            if earlier is not None:
                earlier(request, reply)

        reply_watch.set(keep)
        try:
            lm = _model_for(asked.model, http)
            if asked.tools or asked.choices:
                reply = await lm.complete(
                    asked.messages, tools=asked.tools, choices=asked.choices, options=asked.options
                )
                pieces.put_nowait(chunks.whole(reply))
            else:
                async for piece in lm.stream(asked.messages, options=asked.options):
                    pieces.put_nowait(chunks.piece(piece))
        finally:
            pieces.put_nowait(None)

    task = asyncio.create_task(work(), context=context)
    try:
        begun = False
        while (piece := await pieces.get()) is not None:
            begun = True
            yield piece
        try:
            await task
        except Exception as error:
            if not begun:
                raise  # nothing was sent yet: the client gets a proper status
            _note(context, error)
            yield error_event(error)
        else:
            yield chunks.end(finished[-1] if finished else None)
    finally:
        task.cancel()


async def _begun(events: AsyncIterator[str]) -> tuple[str, AsyncIterator[str]]:
    """Wait for the first event, so that an early failure can still be answered with its status."""
    return await anext(events), events


async def _joined(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for event in rest:
        yield event
