"""What the gateway's tests share: doubles of catalog, keyring and observer, a house that runs it all, raw sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from agentopt.serving._types import CHAT, Choice, Exchange, Key, Refusal
from agentopt.serving.fake_engine import FakeEngine, Ready
from agentopt.serving.gateway import Gateway, Limits, serving

HELLO = [{"role": "user", "content": "hello wide world"}]
PATIENCE = 60.0
"""Seconds until what has to happen is given up; no test depends on how long it takes."""


class Names:
    """A catalog of the engine's model and what `more` adds: public name -> choice."""

    def __init__(self, more: dict[str, Choice] | None = None) -> None:
        self.choices = {"": Choice("fake"), "fake": Choice("fake"), **(more or {})}
        self.held: list[str] = []

    def entries(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": 1, "owned_by": "test", "root": choice.model, "parent": None}
            for name, choice in self.choices.items()
            if name
        ]

    def choose(self, exchange: Exchange) -> Choice:
        choice = self.choices.get(exchange.asked)
        if choice is None:
            raise Refusal(404, f"there is no model {exchange.asked!r}", code="model_not_found", param="model")
        if choice.variant is not None:
            exchange.notes["X-Agentopt-Variant"] = f"{exchange.asked}/{choice.variant}"
        return choice

    @asynccontextmanager
    async def hold(self, choice: Choice) -> AsyncGenerator[None]:
        self.held.append(f"+{choice.model}")
        try:
            yield
        finally:
            self.held.append(f"-{choice.model}")


class Ring:
    """A keyring in memory: secret -> key."""

    def __init__(self, **keys: Key) -> None:
        self.keys = keys
        self.admitted: list[str] = []
        self.released: list[tuple[str, int]] = []
        self.refusal: Refusal | None = None
        self._told: list[Callable[[str], None]] = []

    def find(self, secret: str) -> Key | None:
        return self.keys.get(secret)

    def admit(self, key: Key) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.admitted.append(key.id)

    def release(self, key: Key, tokens: int) -> None:
        self.released.append((key.id, tokens))

    def watch(self, revoked: Callable[[str], None]) -> None:
        self._told.append(revoked)

    def revoke(self, secret: str) -> None:
        key = self.keys.pop(secret)
        for tell in self._told:
            tell(key.id)


class Notes:
    """An observer that keeps everything."""

    def __init__(self, *, wants: bool = False) -> None:
        self.wants = wants
        self.seen: list[tuple[Exchange, bytes | None]] = []
        self.others: list[Exchange] = []
        self.codes: list[str] = []

    def wants_reply(self, exchange: Exchange) -> bool:
        return self.wants

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        self.seen.append((exchange, reply))

    def aside(self, exchange: Exchange) -> None:
        self.others.append(exchange)

    def refused(self, code: str) -> None:
        self.codes.append(code)

    async def one(self, count: int = 1) -> Exchange:
        """The last exchange, once there are `count`."""
        await until(lambda: len(self.seen) >= count)
        return self.seen[count - 1][0]


@dataclass
class House:
    """A fake engine, the gateway, its server, and a client."""

    fake: FakeEngine
    engine: Ready
    gateway: Gateway
    server: Any
    client: httpx.AsyncClient
    notes: Notes
    names: Names
    trouble: list[str] = field(default_factory=list[str])

    @property
    def port(self) -> int:
        return self.server.port

    async def ask(self, route: str = CHAT, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        if route == CHAT:
            body.setdefault("messages", HELLO)
        return await self.client.post(route, json=body, headers=headers)

    async def raw(self, data: bytes, *, seconds: float = PATIENCE, end: bytes | None = None) -> bytes:
        """Send bytes, read until the server closes or `end` came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            return await read_all(reader, seconds, end)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def read_all(reader: asyncio.StreamReader, seconds: float = PATIENCE, end: bytes | None = None) -> bytes:
    got = b""
    async with asyncio.timeout(seconds):
        with suppress(ConnectionResetError):
            while piece := await reader.read(1 << 16):
                got += piece
                if end is not None and got.endswith(end):
                    break
    return got


async def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


HELD = {"hold_after": 1}
"""A reply that is under way until `fake.go_on()`."""


@asynccontextmanager
async def house(
    *,
    keyring: Any = None,
    names: Names | None = None,
    notes: Notes | None = None,
    feedback: Any = None,
    limits: Limits | None = None,
    fake: dict[str, Any] | None = None,
    abilities: Callable[[Any], Any] = lambda abilities: abilities,
) -> AsyncGenerator[House]:
    notes, names, limits = notes or Notes(), names or Names(), limits or Limits(grace_seconds=0.2)
    trouble: list[str] = []
    async with FakeEngine(**(fake or {})) as engine:
        ready = Ready(engine.address, abilities(engine.abilities))
        gateway = Gateway(ready, names, keyring=keyring, observers=[notes], feedback=feedback, limits=limits)
        async with (
            serving(gateway, limits=limits, log=trouble.append) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE, verify=False) as client,
        ):
            yield House(engine, ready, gateway, server, client, notes, names, trouble)
        gateway.close()
        await asyncio.sleep(0)
    assert trouble == []
    assert gateway.in_flight == 0


def request(body: Any = None, *, path: str = CHAT, more: str = "", host: str = "localhost") -> bytes:
    """A request as bytes."""
    data = json.dumps({"messages": HELLO} if body is None else body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return (head + more + "\r\n").encode() + data


def events(text: str) -> list[Any]:
    """The data of server-sent events; what is not JSON as text."""
    found: list[Any] = []
    for line in text.splitlines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(json.loads(data) if data.startswith("{") else data)
    return found


def words(text: str) -> str:
    """What a chat stream said."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events(text)
        if isinstance(event, dict)
        for choice in event.get("choices", [])
    )
