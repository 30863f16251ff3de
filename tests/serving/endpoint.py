"""A whole endpoint in this process, for hostile clients: fake engine, gateway, keys, log, metrics, and raw sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from agentopt.serving._catalog import ServedCatalog
from agentopt.serving._types import FORWARDED
from agentopt.serving.fake_engine import FakeEngine, Ready, Received, Script
from agentopt.serving.gateway import AccessLog, Gateway, Limits, serving
from agentopt.serving.keys import KeyStore, NewKey, StoredKeyring
from agentopt.serving.metrics import Meter

CHAT = "/v1/chat/completions"
INSIDE = "engine-token-that-no-client-may-see"
HELLO: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello wide world"}]}
BODY = json.dumps(HELLO).encode()


@dataclass
class Endpoint:
    """What a test asks and looks at."""

    fake: FakeEngine
    engine: Ready
    gateway: Gateway
    meter: Meter
    keys: KeyStore
    keyring: StoredKeyring
    secret: str
    port: int
    folder: Path
    client: httpx.AsyncClient

    @property
    def asked(self) -> list[Received]:
        """What reached the engine."""
        return list(self.fake.requests)

    async def chat(self, **more: Any) -> httpx.Response:
        """One good request, with the good key."""
        return await self.client.post(CHAT, json=HELLO | more)

    async def raw(self, data: bytes, *, seconds: float = 60.0) -> bytes:
        """Send these bytes on a connection of their own; what comes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                return await reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def log(self) -> list[dict[str, Any]]:
        """Lines of the access log; every one is JSON."""
        return [json.loads(line) for line in (self.folder / "gateway.log").read_text(encoding="utf-8").splitlines()]


@asynccontextmanager
async def endpoint(
    folder: Path,
    *,
    script: Script | None = None,
    limits: Limits | None = None,
    observers: Iterable[Any] = (),
    feedback: Any = None,
    **key: Any,
) -> AsyncGenerator[Endpoint]:
    """Started and stopped with the block; `key`: bounds of the good key."""
    store = KeyStore(folder / "keys.db")
    _, secret = store.create(NewKey("good", **key))
    async with FakeEngine(token=INSIDE, script=script) as fake, StoredKeyring(folder / "keys.db", poll=0.05) as keyring:
        engine = Ready(fake.address, fake.abilities)
        catalog = ServedCatalog(["fake"], engine)
        meter, log = Meter(catalog), AccessLog(folder / "gateway.log")
        gateway = Gateway(
            engine, catalog, keyring=keyring, observers=[meter, log, *observers], feedback=feedback, limits=limits
        )
        try:
            async with serving(gateway, limits=limits) as server:
                good = {"Authorization": f"Bearer {secret}"}
                where = f"http://127.0.0.1:{server.port}"
                async with httpx.AsyncClient(base_url=where, headers=good, timeout=60) as client:
                    yield Endpoint(fake, engine, gateway, meter, store, keyring, secret, server.port, folder, client)
                await gateway.drain(1.0)
        finally:
            gateway.close()
            log.close()


def run(folder: Path, test: Callable[[Endpoint], Awaitable[None]], **options: Any) -> None:
    """One endpoint for one test."""

    async def whole() -> None:
        async with endpoint(folder, **options) as place:
            await test(place)

    asyncio.run(whole())


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for it; the time is only there so that a test that fails ends."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def head(target: str, secret: str | None, *lines: str, method: str = "POST", body: bytes | None = None) -> bytes:
    """A request in bytes; with `body`, its length and type too. The connection ends with it."""
    found = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *lines]
    if secret is not None:
        found.append(f"Authorization: Bearer {secret}")
    if body is not None:
        found += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(found).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def statuses(reply: bytes) -> list[int]:
    """The status of each reply on a connection."""
    return [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]


def only_forwarded(asked: list[Received]) -> bool:
    """Whether the engine was only ever asked what clients may have asked."""
    return all(one.method == "POST" and one.path in FORWARDED for one in asked)
