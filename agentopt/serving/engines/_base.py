"""What the supervised and the external engine have in common: state that the gateway reads, and who is told of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

from agentopt.errors import RunError
from agentopt.serving._types import FORWARDED, Abilities, Address, Phase
from agentopt.serving.engines import _events as events
from agentopt.serving.engines._options import SupervisorOptions
from agentopt.serving.engines._probe import fetch


class EngineBase:
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
        if self._on_event is not None:
            self._on_event(event)

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
        seconds = self.options.health_timeout
        try:
            status, _ = await fetch(self.address, path, timeout=seconds)
        except TimeoutError:
            return f"it gave no answer within {seconds:g} s"
        except OSError as error:
            return f"it cannot be reached ({error.strerror or error})"
        return None if 200 <= status < 300 else f"its health is answered with {status}"

    async def _look(self, known: Abilities) -> Abilities:
        """What an engine that answers says of itself; `known` where it says nothing."""
        models = _json(await self._get("/v1/models"))
        data: Any = models.get("data")
        rows = [cast("dict[str, Any]", row) for row in cast("list[Any]", data or []) if isinstance(row, dict)]
        base = next((row for row in rows if not row.get("parent")), dict[str, Any]())
        paths = _json(await self._get("/openapi.json")).get("paths")
        routes = FORWARDED & set(cast("dict[str, Any]", paths)) if isinstance(paths, dict) else frozenset[str]()
        meta: Any = base.get("meta")  # llama.cpp's place for it
        context = base.get("max_model_len") or (
            cast("dict[str, Any]", meta).get("n_ctx") if isinstance(meta, dict) else 0
        )
        names = [str(row.get("id")) for row in rows]
        if names and known.model and known.model not in names:
            self.tell(events.Warned(f"engine {self.name}: expected the model {known.model!r}, it has {names[0]!r}."))
        return Abilities(
            routes=frozenset(routes) or known.routes,
            model=known.model or (names[0] if names else "model"),
            adapters=known.adapters,
            stream_usage=known.stream_usage,
            context=context if isinstance(context, int) and context > 0 else known.context,
        )

    async def _get(self, path: str) -> bytes:
        with suppress(OSError, TimeoutError):
            status, body = await fetch(self.address, path, timeout=self.options.health_timeout)
            if status == 200:
                return body
        return b""


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
