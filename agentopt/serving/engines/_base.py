"""What the supervised and the external engine have in common: state that the gateway reads, and who is told of it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

from agentopt.errors import RunError
from agentopt.serving._types import FORWARDED, Abilities, Address, Listed, Phase
from agentopt.serving.engines import _events as events
from agentopt.serving.engines._options import SupervisorOptions
from agentopt.serving.engines._probe import fetch

MODELS = "/v1/models"
_log = logging.getLogger("agentopt.serving.engines")


class EngineBase(ABC):
    """State of one engine. All methods are called on the event loop."""

    def __init__(
        self, name: str, abilities: Abilities, options: SupervisorOptions, on_event: events.OnEvent | None
    ) -> None:
        self.name = name
        self.abilities: Abilities = abilities
        self.options = options
        self.phase = Phase.STARTING
        self.address = Address()
        self.generation: int = 0
        self.reason: str | None = None
        """Why it is not ready, where that is known."""
        self.restarts = 0
        """How often it was ready again after it was not."""
        self.started: float | None = None
        """When it became ready; of the monotonic clock."""
        self._explained = False
        """The reason says all: nobody needs to read the log."""
        self._on_event = on_event
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._suspected = asyncio.Event()
        self._changed = asyncio.Event()

    @abstractmethod
    async def start(self) -> None:
        """Begin; returns at once."""

    @abstractmethod
    async def aclose(self) -> None:
        """End. May be called twice."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def on_start(self, callback: Callable[[], Awaitable[None]]) -> None:
        """`callback` is awaited whenever the engine has started and answers, before requests are forwarded to it."""
        self._callbacks.append(callback)

    def suspect(self, why: str) -> None:
        """A request found it dead or silent: look at its health now instead of at the next interval."""
        del why  # the health says more, and says it once
        if self.phase is Phase.READY:
            self._suspected.set()

    async def changed(self) -> None:
        """Returns at the next change of `phase`."""
        await self._changed.wait()

    async def ready(self) -> None:
        """Returns when requests can be forwarded.

        Raises:
            RunError: it has failed for good, or was stopped; with the reason, and the last lines of its log where those
                say more.
        """
        while self.phase is not Phase.READY:
            if self.phase in (Phase.FAILED, Phase.STOPPED):
                tail = "" if self._explained else "".join(f"\n    {line}" for line in self.log_tail(12))
                why = f"engine {self.name}: {self.reason or 'it was stopped'}"
                raise RunError(f"{why}; the end of its log:{tail}" if tail else f"{why}.")
            await self.changed()

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of its log; none where it is not ours."""
        del lines
        return []

    def tell(self, event: events.Event) -> None:
        """Tell whoever wants to know."""
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001  # whoever listens (a terminal that is gone) must not end the engine
            _log.exception("engine %s: telling %s failed", self.name, event.kind)

    def _become(self, phase: Phase) -> None:
        if phase is self.phase:
            return
        self.phase = phase
        self.started = time.monotonic() if phase is Phase.READY else None
        self._suspected.clear()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _prepare(self) -> None:
        """Let those who asked for it prepare an engine that has just started."""
        for callback in self._callbacks:
            try:
                await callback()
            except Exception as error:  # noqa: BLE001  # whatever it is, the engine itself is fine
                self.tell(events.Warned(f"engine {self.name}: after its start: {error}"))

    async def _health(self, path: str) -> str | None:
        """None when it is well, else what is wrong."""
        return (await self._asked(path))[0]

    async def _asked(self, path: str) -> tuple[str | None, bytes]:
        """What is wrong with its answer, None where nothing is, and the answer."""
        seconds = self.options.health_timeout
        try:
            status, body = await fetch(self.address, path, timeout=seconds)
        except TimeoutError:
            return f"it gave no answer within {seconds:g} s", b""
        except OSError as error:
            return f"it cannot be reached ({error.strerror or error})", b""
        return (None if 200 <= status < 300 else self._refused(path, status)), body

    def _refused(self, path: str, status: int) -> str:
        return f"its {path} is answered with {status}"

    async def _look(self, known: Abilities) -> Abilities:
        """What an engine that answers says of itself; `known` where it says nothing."""
        listed = listed_models(await self._get(MODELS))
        routes = await self._routes()
        base = next((one for one in listed if one.parent is None), None)
        names = [one.name for one in listed]
        if names and known.model and known.model not in names:
            self.tell(events.Warned(f"engine {self.name}: expected the model {known.model!r}, it has {names[0]!r}."))
        context = base.context if base is not None else None
        return replace(
            known,
            routes=routes or known.routes,
            model=known.model or (names[0] if names else "model"),
            context=context or known.context,
        )

    async def _routes(self) -> frozenset[str]:
        """Of `FORWARDED`, those that it says it has; empty where it says nothing."""
        paths = _json(await self._get("/openapi.json")).get("paths")
        return FORWARDED & set(cast("dict[str, Any]", paths)) if isinstance(paths, dict) else frozenset[str]()

    async def _get(self, path: str) -> bytes:
        with suppress(OSError, TimeoutError):
            status, body = await fetch(self.address, path, timeout=self.options.health_timeout)
            if status == 200:
                return body
        return b""


def listed_models(body: bytes) -> tuple[Listed, ...]:
    """The models in an answer to GET /v1/models, each name once."""
    data: Any = _json(body).get("data")
    found: dict[str, Listed] = {}
    for row in cast("list[Any]", data) if isinstance(data, list) else []:
        fields: dict[str, Any] = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
        name, parent = fields.get("id"), fields.get("parent")
        if isinstance(name, str) and name:
            found.setdefault(
                name, Listed(name, parent if isinstance(parent, str) and parent else None, _context(fields))
            )
    return tuple(found.values())


def _context(row: dict[str, Any]) -> int | None:
    meta: Any = row.get("meta")  # llama.cpp's place for it
    found: Any = row.get("max_model_len") or (
        cast("dict[str, Any]", meta).get("n_ctx") if isinstance(meta, dict) else None
    )
    return found if isinstance(found, int) and found > 0 else None


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
