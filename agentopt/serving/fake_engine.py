"""A shipped double: an engine with vLLM's HTTP surface and no model, on asyncio's transports alone.

It repeats the last message, streams at a given rate, loads adapters by name, and breaks as engines break when a request
(or `POST /control`) says so. The routes that must never be reachable from outside answer anybody, as the real one's do.
`FakeEngine` runs in a test; `python -m agentopt.serving.fake_engine --port 8001` runs as a process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any, cast

from agentopt.serving._fake_connection import CLOSED, OPEN, Connection, Received
from agentopt.serving._fake_stream import Script
from agentopt.serving._types import FORWARDED, Abilities, Address, Phase

__all__ = ["CLOSED", "OPEN", "FakeEngine", "Ready", "Received", "Script", "Settings", "main"]

_SCRIPT = {one.name for one in fields(Script)}


@dataclass(slots=True)
class Settings:
    """What can be changed while it runs, by `FakeEngine.settings` or `POST /control`."""

    script: Script = field(default_factory=Script)
    """For requests that say nothing else."""
    healthy: bool = True
    load_seconds: float = 0.0
    """An adapter takes so long to load."""
    load_status: int = 200
    """What loading an adapter answers; anything else than 200 refuses it."""
    slots: int | None = None
    """Adapters at a time; one more is refused."""


class FakeEngine:
    """The engine in this process: `async with FakeEngine() as fake:`, then `fake.address`, `fake.requests`."""

    def __init__(
        self,
        *,
        socket: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        model: str = "fake",
        routes: frozenset[str] = FORWARDED,
        script: Script | None = None,
        control: bool = False,
        keep: int = 10_000,
    ) -> None:
        """`routes`: of `FORWARDED`, those it has; `keep`: how many requests it remembers."""
        self.address = Address(host=host, port=port, socket=socket, token=token)
        self.model = model
        self.routes = routes
        self.settings = Settings(script or Script())
        self.control = control
        self.requests: deque[Received] = deque(maxlen=keep)
        self.adapters: dict[str, str] = {}
        """Name -> folder of what is loaded."""
        self.loads: list[str] = []
        """"+name" and "-name", in order."""
        self.count = 0
        self.running = 0
        self.prompt_tokens = self.completion_tokens = 0
        self._held: list[Callable[[], None]] = []
        self._server: asyncio.Server | None = None
        self._open: set[Connection] = set()

    @property
    def abilities(self) -> Abilities:
        """What a gateway should know of it."""
        return Abilities(routes=self.routes, model=self.model, adapters=True)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._open)

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; after `kill`, at the same address again."""
        loop = asyncio.get_running_loop()
        if self.address.socket is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.address.socket)
            self._server = await loop.create_unix_server(lambda: Connection(self), self.address.socket, backlog=1024)
            return
        host, port = self.address.host, self.address.port
        self._server = await loop.create_server(lambda: Connection(self), host, port, backlog=1024)
        self.address = replace(self.address, port=int(self._server.sockets[0].getsockname()[1]))

    async def kill(self) -> None:
        """As if the process was gone: every connection breaks, nobody listens, adapters are forgotten."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._open):
            connection.transport.abort()
        self.adapters.clear()
        self._held.clear()
        await asyncio.sleep(0)  # the aborted transports close in the next turn of the loop
        await asyncio.sleep(0)

    def hold(self, go_on: Callable[[], None]) -> None:
        """A reply waits until `go_on` of this engine is called."""
        self._held.append(go_on)

    def go_on(self) -> None:
        """Every reply that `hold_after` holds goes on."""
        held, self._held = self._held, []
        for one in held:
            one()

    def joined(self, connection: Connection) -> None:
        """A connection was opened."""
        self._open.add(connection)

    def left(self, connection: Connection) -> None:
        """A connection is gone."""
        self._open.discard(connection)

    def script_of(self, body: dict[str, Any]) -> Script:
        """The engine's script, changed by the request's own."""
        given: Any = body.get("fake")
        known = {k: v for k, v in cast("dict[str, Any]", given).items() if k in _SCRIPT} if given else {}
        script = replace(self.settings.script, **known)
        return script if self.control else replace(script, exit_after=None)

    def models(self) -> dict[str, Any]:
        """The list of models: the base, then the loaded adapters."""
        base: dict[str, Any] = {"id": self.model, "object": "model", "created": 0, "owned_by": "fake", "parent": None}
        rows = [base] + [base | {"id": name, "parent": self.model} for name in self.adapters]
        return {"object": "list", "data": rows}

    def metrics(self) -> str:
        """A few of vLLM's lines."""
        values = {
            "vllm:num_requests_running": ("gauge", self.running),
            "vllm:num_requests_waiting": ("gauge", 0),
            "vllm:prompt_tokens_total": ("counter", self.prompt_tokens),
            "vllm:generation_tokens_total": ("counter", self.completion_tokens),
        }
        label = f'{{model_name="{self.model}"}}'
        return "".join(f"# TYPE {name} {kind}\n{name}{label} {value}\n" for name, (kind, value) in values.items())

    def openapi(self) -> dict[str, Any]:
        """The paths it has; what a supervisor reads to learn what it can do."""
        posts = [*self.routes, *CLOSED, *OPEN]
        paths: dict[str, Any] = {path: {"post": {"responses": {"200": {"description": "ok"}}}} for path in posts}
        paths |= {path: {"get": {"responses": {"200": {"description": "ok"}}}} for path in ("/v1/models", "/health")}
        return {"openapi": "3.1.0", "info": {"title": "fake engine", "version": "1"}, "paths": paths}

    def steer(self, change: dict[str, Any]) -> None:
        """What `POST /control` does: {"fake": {...}}, {"healthy": false}, {"freeze": seconds}, {"go_on": true}, ..."""
        if "exit" in change:
            os._exit(int(change["exit"]))
        if "freeze" in change:
            time.sleep(float(change["freeze"]))
        if change.get("go_on"):
            self.go_on()
        if "fake" in change:
            self.settings.script = Script(**change["fake"])
        for name in ("healthy", "load_seconds", "load_status", "slots"):
            if name in change:
                setattr(self.settings, name, change[name])


@dataclass(slots=True)
class Ready:
    """An `Engine` that is just there: what a gateway needs of a supervisor, for an address that is served already."""

    address: Address
    abilities: Abilities = field(default_factory=Abilities)
    name: str = "fake"
    phase: Phase = Phase.READY
    generation: int = 1
    suspected: list[str] = field(default_factory=list[str])
    """Why the gateway found it dead or silent."""

    def suspect(self, why: str) -> None:
        """Remember it."""
        self.suspected.append(why)


async def _run(engine: FakeEngine) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with engine:
        where = engine.address.socket or f"{engine.address.host}:{engine.address.port}"
        sys.stdout.write(f"fake engine listens at {where}\n")
        sys.stdout.flush()
        await stop.wait()


def main(arguments: list[str] | None = None) -> None:
    """Run as a process until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="fake_engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--uds", help="path of a Unix socket; else --host and --port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, printed")
    parser.add_argument("--token", default=os.environ.get("VLLM_API_KEY"), help="asked for under /v1 (VLLM_API_KEY)")
    parser.add_argument("--model", default="fake", help="name of the base model")
    parser.add_argument("--chunks", type=int, default=0, help="words of a reply; 0: as many as the last message has")
    parser.add_argument("--rate", type=float, default=0.0, help="words per second and reply; 0: at once")
    parser.add_argument("--slots", type=int, help="adapters at a time")
    parser.add_argument("--control", action="store_true", help="serve /control, and obey exit_after")
    told = parser.parse_args(arguments)
    script = Script(chunks=told.chunks, rate=told.rate)
    engine = FakeEngine(
        socket=told.uds, host=told.host, port=told.port, token=told.token, model=told.model, script=script,
        control=told.control, keep=100,
    )  # fmt: skip
    engine.settings.slots = told.slots
    with suppress(ImportError):
        import uvloop

        uvloop.run(_run(engine))
        return
    asyncio.run(_run(engine))


if __name__ == "__main__":
    main()
