"""An engine that somebody else runs: found, lost, found again; and what its URL may be."""

from __future__ import annotations

import pytest

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, Address, Phase
from agentopt.serving.engines import Event, ExternalEngine, SupervisorOptions, fetch
from agentopt.serving.engines._external import parse_upstream
from agentopt.serving.fake_engine import FakeEngine
from tests.serving.engines.running import kinds

TIMES = SupervisorOptions(health_interval=0.02, health_timeout=5.0, hung_after=5.0)


@pytest.mark.anyio
async def test_engine_is_found_lost_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.serving.engines._external._AGAIN", 0.02)
    told: list[Event] = []
    prepared: list[int] = []
    async with FakeEngine(token="t", model="base", routes=frozenset({CHAT})) as fake:
        url = f"http://127.0.0.1:{fake.address.port}/v1"
        async with ExternalEngine(url, "t", options=TIMES, on_event=told.append) as engine:

            async def prepare() -> None:
                prepared.append(engine.generation)

            engine.on_start(prepare)
            await engine.ready()
            assert engine.abilities.model == "base" and engine.abilities.routes == {CHAT}
            assert not engine.abilities.adapters
            await fake.kill()
            engine.suspect("the connection was refused")
            await engine.changed()
            assert engine.phase is Phase.RESTARTING and "cannot be reached" in (engine.reason or "")
            await fake.start()
            await engine.ready()
            assert engine.generation == 2 and engine.restarts == 1 and prepared == [1, 2]
        assert engine.phase is Phase.STOPPED
    assert [one for one in kinds(told) if one != "waiting"] == ["ready", "died", "ready", "stopped"]


@pytest.mark.anyio
async def test_wrong_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.serving.engines._external._AGAIN", 0.02)
    told: list[Event] = []
    async with FakeEngine(token="right") as fake:
        url = f"http://127.0.0.1:{fake.address.port}"
        async with ExternalEngine(url, "wrong", options=TIMES, on_event=told.append) as engine:
            while not told:
                await fetch(fake.address, "/health")
            assert engine.phase is Phase.STARTING and "401" in (engine.reason or "")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8000/v1", Address("host", 8000)),
        ("https://host/openai/v1/", Address("host", 443, tls=True, prefix="/openai")),
        ("http://[::1]:80", Address("::1", 80)),
        ("unix:///run/engine.sock", Address("localhost", socket="/run/engine.sock")),
    ],
)
def test_urls(url: str, address: Address) -> None:
    assert parse_upstream(url) == address


@pytest.mark.parametrize(
    "url",
    ["host:8000", "ftp://host", "http://", "http://user:pw@host", "http://host?x=1", "unix://x", "http://h:99999"],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="expected http://HOST:PORT/v1"):
        parse_upstream(url)
