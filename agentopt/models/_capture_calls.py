"""Who sent a captured request: the link between a plain OpenAI client's HTTP call and the rollout that made it.

Rollouts run concurrently in one process and share one environment, so the base URL cannot tell them apart. In-process
clients: while a capture endpoint runs, `send` of httpx (and httpx2, where loaded) notes the caller's context for
requests to that endpoint, and only those, and adds one header with a one-time id; everything else passes untouched.
The endpoint then works in that very context: candidate, recording, meters, seeds and models of the caller, so the call
appears inside the op that made it. Subprocesses: `Session.base_url` has the rollout's token in its path.
"""

from __future__ import annotations

import functools
import importlib
import secrets
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any

HEADER = "x-agentopt-call"
_OTHERS = ("httpx2",)


@dataclass(frozen=True, slots=True)
class Session:
    """One rollout's stay at the endpoint."""

    token: str
    base_url: str
    """For a process that this rollout starts: calls to it belong to this rollout. Pass `environment()` as its env."""
    api_key: str
    context: Context = field(repr=False)
    errors: list[Exception] = field(default_factory=list[Exception], repr=False)
    """What went wrong with this rollout's calls, in order; the program may have swallowed its client's exception."""

    def environment(self) -> dict[str, str]:
        """Variables for a subprocess of this rollout, to be laid over os.environ."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_BASE": self.base_url, "OPENAI_API_KEY": self.api_key}


_session: ContextVar[Session | None] = ContextVar("agentopt_capture_session", default=None)


def current_session() -> Session | None:
    """The session of this context, or None outside one."""
    return _session.get()


class Unattributed(Exception):
    """A request that belongs to no rollout, or could belong to several; the text says what to do."""


class Register:
    """Open sessions and calls under way of one endpoint. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._calls: dict[str, Context] = {}

    @contextmanager
    def session(self, base_url: Callable[[str], str], api_key: str) -> Generator[Session]:
        """Open a session for the `with` block; calls made in its context (or to its URL) belong to it."""
        token = secrets.token_hex(8)
        context = copy_context()
        session = Session(token, base_url(token), api_key, context)
        context.run(_session.set, session)
        with self._lock:
            self._sessions[token] = session
        reset = _session.set(session)
        try:
            yield session
        finally:
            _session.reset(reset)
            with self._lock:
                self._sessions.pop(token, None)

    @contextmanager
    def call(self) -> Generator[str]:
        """Keep the caller's context under a one-time id until the response has arrived."""
        identity = secrets.token_hex(8)
        with self._lock:
            self._calls[identity] = copy_context()
        try:
            yield identity
        finally:
            with self._lock:
                self._calls.pop(identity, None)

    def context_of(self, identity: str | None, token: str | None) -> Context:
        """The context in which to answer a request.

        Raises:
            Unattributed: several rollouts are active and the request names none, or names one that has ended.
        """
        with self._lock:
            context = self._calls.get(identity or "")
            sessions = list(self._sessions.values())
            named = self._sessions.get(token or "")
        if context is not None and (context.get(_session) is not None or not sessions):
            return context.copy()
        if named is not None:
            return named.context.copy()
        if token is not None:
            raise Unattributed("the rollout this address belonged to has ended; a background process outlived it")
        if len(sessions) == 1:
            return sessions[0].context.copy()
        if not sessions:
            return copy_context()
        raise Unattributed(
            f"{len(sessions)} rollouts run at once and this request does not say which it belongs to: it came from a "
            "thread without context (start it with agentopt.ThreadPoolExecutor or agentopt.bind_context), from a "
            "subprocess (give it the environment of agentopt.models.capture_environment()), or from an HTTP library "
            "other than httpx; or run with --concurrency 1"
        )


_active: dict[tuple[str, int], Register] = {}
"""Address of each running endpoint → its register."""
_undo: list[Callable[[], None]] = []
_patching = threading.Lock()


def watch(host: str, port: int, register: Register) -> None:
    """Begin to mark requests of in-process clients to this address."""
    with _patching:
        _active[(host, port)] = register
        if not _undo:
            for name in ("httpx", *(name for name in _OTHERS if name in sys.modules)):
                _patch(importlib.import_module(name))


def unwatch(host: str, port: int) -> None:
    """Stop marking; with the last endpoint gone the libraries are as they were."""
    with _patching:
        _active.pop((host, port), None)
        if not _active:
            while _undo:
                _undo.pop()()


def _register_for(request: Any) -> Register | None:
    url = request.url
    return _active.get((url.host, url.port or 80)) if _active else None


def _patch(library: Any) -> None:
    client, async_client = library.Client, library.AsyncClient
    send: Callable[..., Any] = client.send
    async_send: Callable[..., Any] = async_client.send

    @functools.wraps(send)
    def marked(self: Any, request: Any, **options: Any) -> Any:
        register = _register_for(request)
        if register is None:
            return send(self, request, **options)
        with register.call() as identity:
            request.headers[HEADER] = identity
            return send(self, request, **options)

    @functools.wraps(async_send)
    async def async_marked(self: Any, request: Any, **options: Any) -> Any:
        register = _register_for(request)
        if register is None:
            return await async_send(self, request, **options)
        with register.call() as identity:
            request.headers[HEADER] = identity
            return await async_send(self, request, **options)

    client.send, async_client.send = marked, async_marked

    def undo() -> None:
        client.send, async_client.send = send, async_send

    _undo.append(undo)
