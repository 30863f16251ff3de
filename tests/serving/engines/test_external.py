"""An engine that somebody else runs: found, lost, found again; and what its URL may be."""

from __future__ import annotations

import anyio
import pytest

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, Address, Listed, Phase
from agentopt.serving.engines import Event, ExternalEngine, SupervisorOptions, Warned, fetch
from agentopt.serving.engines._base import listed_models
from agentopt.serving.engines._external import parse_upstream
from agentopt.serving.fake_engine import FakeEngine
from tests.serving.engines.running import kinds

TIMES = SupervisorOptions(health_interval=0.02, health_timeout=20.0, hung_after=20.0)


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
async def test_all_models_are_known_and_those_that_come_and_go() -> None:
    async with FakeEngine(model="base") as fake:
        fake.adapters["book"] = "folder"
        async with ExternalEngine(f"http://127.0.0.1:{fake.address.port}", options=TIMES) as engine:
            await engine.ready()
            assert engine.abilities.model == "base" and engine.abilities.others == (Listed("book", parent="base"),)
            del fake.adapters["book"]
            fake.adapters["map"] = "folder"
            with anyio.fail_after(20):
                while [one.name for one in engine.abilities.others] != ["map"]:
                    await anyio.sleep(0.01)
            assert engine.generation == 1
            fake.model = "another"  # the base was replaced
            with anyio.fail_after(20):
                while not engine.abilities.model.startswith("another"):
                    await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_the_base_that_is_asked_for_stays_and_is_missed() -> None:
    told: list[Event] = []
    async with FakeEngine(model="base") as fake:
        fake.adapters["book"] = "folder"
        url = f"http://127.0.0.1:{fake.address.port}"
        async with ExternalEngine(url, model="book", options=TIMES) as engine:
            await engine.ready()
            assert engine.abilities.model == "book" and [one.name for one in engine.abilities.others] == ["base"]
        async with ExternalEngine(url, model="gone", options=TIMES, on_event=told.append) as engine:
            await engine.ready()
            assert engine.abilities.model == "gone"
    assert [one.message for one in told if isinstance(one, Warned)] == [
        "engine external: expected the model 'gone', it has 'base'."
    ]


def test_an_odd_list_of_models_is_read_as_far_as_it_goes() -> None:
    assert listed_models(b"no json") == listed_models(b'{"data": 7}') == listed_models(b"[]") == ()
    body = b'{"data": [7, {"id": ""}, {"id": 3}, {"id": "a", "parent": 7, "meta": {"n_ctx": 64}}, {"id": "a"}]}'
    assert listed_models(body) == (Listed("a", context=64),)


@pytest.mark.anyio
async def test_wrong_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.serving.engines._external._AGAIN", 0.02)
    told: list[Event] = []
    async with FakeEngine(token="right") as fake:
        url = f"http://127.0.0.1:{fake.address.port}"
        async with ExternalEngine(url, "wrong", options=TIMES, on_event=told.append) as engine:
            while not told:
                await fetch(fake.address, "/health")
            assert engine.phase is Phase.STARTING
            assert "401; its key belongs into AGENTOPT_UPSTREAM_TOKEN" in (engine.reason or "")


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
