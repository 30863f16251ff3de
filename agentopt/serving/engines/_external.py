"""An engine that somebody else runs, behind a URL: its health is watched, nothing is started or stopped."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from urllib.parse import urlsplit

from agentopt.errors import UserError
from agentopt.serving._types import Abilities, Address, Phase
from agentopt.serving.engines import _events as events
from agentopt.serving.engines._base import MODELS, EngineBase, listed_models
from agentopt.serving.engines._options import SupervisorOptions

_AGAIN = 1.0
"""Seconds until an engine that gave no good answer is asked again."""


class ExternalEngine(EngineBase):
    """An `Engine` at a URL, with the same methods as `Supervisor`.

    Its health is its list of models: every OpenAI-compatible server has one, it also says whether the token is right,
    and so a model that comes or goes there is known here at the next look.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        model: str | None = None,
        options: SupervisorOptions | None = None,
        on_event: events.OnEvent | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            url: `http(s)://host[:port][/prefix][/v1]`, or `unix:///path` for a Unix socket.
            token: sent as `Authorization: Bearer`.
            model: the engine's name of its base model; None: the first one in its list that is no adapter.
            options: `health_interval`, `health_timeout` and `hung_after` are used.
            on_event: told what happens, on the event loop.

        Raises:
            UserError: the URL is none.
        """
        super().__init__("external", Abilities(model=model or ""), options or SupervisorOptions(), on_event)
        self.url = url
        self.pid: int | None = None
        self.address = parse_upstream(url, token)
        self._wanted = model
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to watch it; `ready` waits until it answers."""
        if self._task is not None:
            raise RuntimeError("an engine is watched once")
        self._task = asyncio.create_task(self._run(), name="external engine")

    async def aclose(self) -> None:
        """Watch it no longer. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self.phase is not Phase.STOPPED:
            self._become(Phase.STOPPED)
            self.tell(events.Stopped(self.name))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        since, answered, misses = loop.time(), loop.time(), 0
        while True:
            trouble, models = await self._asked(MODELS)
            now = loop.time()
            if trouble is None:
                answered, misses = now, 0
                self._read(models)
                if self.phase is not Phase.READY:
                    await self._welcome(now - since)
            else:
                misses += 1
                self._doubt(trouble, misses, now - answered)
                if self.phase is Phase.READY:
                    since = now
            await self._pause(self.options.health_interval if misses == 0 else _AGAIN)

    def _refused(self, path: str, status: int) -> str:
        hints = {
            401: "; its key belongs into AGENTOPT_UPSTREAM_TOKEN",
            404: "; is --upstream an OpenAI-compatible server?",
        }
        return f"{super()._refused(path, status)}{hints.get(status, '')}"

    def _read(self, models: bytes) -> None:
        """Learn from its list what it serves; an empty list takes nothing back."""
        listed = {one.name: one for one in listed_models(models)}
        if not listed:
            return
        model = self._wanted or self.abilities.model
        if model not in listed:
            first = next((one.name for one in listed.values() if one.parent is None), next(iter(listed)))
            if self._wanted is None:
                model = first
            elif self.phase is not Phase.READY:
                self.tell(events.Warned(f"engine {self.name}: expected the model {model!r}, it has {first!r}."))
        base = listed.pop(model, None)
        self.abilities = replace(
            self.abilities,
            model=model,
            others=tuple(listed.values()),
            context=base.context if base is not None else self.abilities.context,
        )

    async def _welcome(self, seconds: float) -> None:
        self.abilities = replace(self.abilities, routes=await self._routes() or Abilities().routes)
        self.generation += 1
        self.restarts = self.generation - 1
        await self._prepare()
        self.reason = None
        self._become(Phase.READY)
        self.tell(events.Ready(self.name, seconds, self.generation))

    def _doubt(self, trouble: str, misses: int, silent: float) -> None:
        """It gave no good answer. One that refuses connections is gone; one that is slow is given time."""
        first, self.reason = self.reason is None, trouble
        if self.phase is Phase.READY:
            gone = "cannot be reached" in trouble or silent >= self.options.hung_after
            if misses >= 2 and gone:
                self._become(Phase.RESTARTING)
                self.tell(events.Died(self.name, trouble, 0.0, None))
        elif first:
            self.tell(events.Waiting(_AGAIN, misses + 1, trouble))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._suspected.wait()
        self._suspected.clear()


def parse_upstream(url: str, token: str | None = None) -> Address:
    """Where a URL points to.

    Raises:
        UserError: it is not of the form that `ExternalEngine` takes.
    """
    wanted = f"upstream {url!r}: expected http://HOST:PORT/v1, https://HOST/v1 or unix:///PATH"
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise UserError(f"{wanted} ({error}).") from error
    if parts.scheme == "unix":
        if parts.netloc or not parts.path:
            raise UserError(f"{wanted}; a path of a Unix socket begins with a third slash.")
        return Address(host="localhost", socket=parts.path, token=token)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{wanted}.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(f"{wanted}, without a user, a query or a fragment; the key is given apart.")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Address(host=parts.hostname, port=port or (443 if tls else 80), tls=tls, prefix=prefix, token=token)
