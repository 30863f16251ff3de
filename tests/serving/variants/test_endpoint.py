"""Tuned prompts through the whole gateway: what the engine gets, what the client sees, what is counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import agentopt as ao
from agentopt.serving._catalog import ServedCatalog
from agentopt.serving._shortening import Shortening
from agentopt.serving._types import CHAT, COMPLETIONS
from agentopt.serving.fake_engine import FakeEngine, Ready
from agentopt.serving.gateway import Gateway, serving
from agentopt.serving.variants import VariantScores, load_candidates

pytestmark = pytest.mark.anyio

HELLO = [{"role": "user", "content": "hello wide world"}]


@dataclass
class Home:
    """A fake engine behind a gateway that serves a tuned prompt."""

    fake: FakeEngine
    client: httpx.AsyncClient
    scores: VariantScores

    async def ask(self, route: str = CHAT, **body: Any) -> httpx.Response:
        return await self.client.post(route, json={"messages": HELLO, **body})

    @property
    def sent(self) -> Any:
        return self.fake.requests[-1].json()


@asynccontextmanager
async def home(specs: Sequence[str], shortening: Shortening | None = None, name: str = "fake") -> AsyncGenerator[Home]:
    async with FakeEngine(model="inner") as fake:
        engine = Ready(fake.address, fake.abilities)
        engine.name = name
        virtual = load_candidates(specs, warn=lambda _: None)
        scores = VariantScores(virtual)
        catalog = ServedCatalog(["smol"], engine, virtual=virtual, shortening=shortening)
        gateway = Gateway(engine, catalog, observers=[scores])
        try:
            async with serving(gateway) as server:
                url = f"http://127.0.0.1:{server.port}"
                async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                    yield Home(fake, client, scores)
        finally:
            gateway.close()


def best(tmp_path: Path, **values: Any) -> Path:
    demos = [{"input": "in", "output": "out", "source": ""}]
    return ao.Candidate({"served.system": "Be kind.", "served.demos": demos, **values}).save(tmp_path / "best.json")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tuned_prompt_answers_under_its_name(tmp_path: Path, stream: bool) -> None:
    async with home([f"kind={best(tmp_path)}"]) as at:
        reply = await at.ask(model="kind", stream=stream)
        assert reply.status_code == 200
        assert reply.headers["x-agentopt-variant"] == "kind/best"
        assert at.sent["model"] == "inner"
        assert [turn["content"] for turn in at.sent["messages"]] == ["Be kind.", "in", "out", "hello wide world"]
        await at.ask(model="smol")
        assert at.sent["messages"] == HELLO
        listed = (await at.client.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["smol", "kind"]
        (row,) = at.scores.rows()
        assert row["requests"] == 1
        assert row["completion_tokens"] == 3


async def test_variants_are_counted_apart_and_a_session_keeps_its_own(tmp_path: Path) -> None:
    async with home([f"kind={best(tmp_path)}", "kind=base"]) as at:
        for number in range(24):
            session = f"s{number % 8}"
            reply = await at.client.post(
                CHAT, json={"model": "kind", "messages": HELLO}, headers={"X-Agentopt-Session": session}
            )
            label = reply.headers["x-agentopt-variant"].removeprefix("kind/")
            assert (len(at.sent["messages"]) == 4) == (label == "best")
        counts = {row["variant"]: row["requests"] for row in at.scores.rows()}
        assert sum(counts.values()) == 24
        assert all(count and count % 3 == 0 for count in counts.values()), "each session asked three times"


async def test_what_does_not_fit_a_tuned_prompt_never_reaches_the_engine(tmp_path: Path) -> None:
    async with home([f"kind={best(tmp_path)}"]) as at:
        reply = await at.ask(COMPLETIONS, model="kind", prompt="hi")
        assert reply.status_code == 400
        assert "made of chat turns" in reply.json()["error"]["message"]
        reply = await at.ask(model="kind", agentopt={"variables": {"x": 1}})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "agentopt.variables"
        assert not at.fake.requests
        assert at.scores.rows()[0]["requests"] == 0
        assert (await at.ask(model="kinder")).status_code == 404


async def test_the_clients_system_prompt_is_shortened_and_the_tuned_one_is_not(tmp_path: Path) -> None:
    long = " ".join(f"Parcels of region {n} leave on day {n % 7}, and the driver calls ahead." for n in range(40))
    tuned = "Tuned. " + long
    spec = f"kind={best(tmp_path, **{'served.system': tuned})}"
    async with Shortening(100, tokenizer="words") as shortening, home([spec], shortening) as at:
        messages = [{"role": "system", "content": long}, *HELLO]
        first = await at.ask(model="kind", messages=messages)
        assert "x-agentopt-capsule" not in first.headers
        await shortening.settled()
        second = await at.ask(model="kind", messages=messages)
        before, after = map(int, second.headers["x-agentopt-capsule"].split("->"))
        assert before > 100 >= after
        system = at.sent["messages"][0]["content"]
        assert system.startswith(tuned)
        assert len(system) < len(tuned) + len(long) / 2
        assert at.sent["messages"][-1:] == HELLO


async def test_an_engine_that_repeats_the_cue_is_not_quoted(tmp_path: Path) -> None:
    spec = f"kind={best(tmp_path, **{'served.cue': 'Well:'})}"
    async with home([spec], name="embedded") as at:
        reply = await at.ask(model="kind", fake={"text": "Well: hello"})
        assert reply.json()["choices"][0]["message"]["content"] == " hello"
        assert int(reply.headers["content-length"]) == len(reply.content)
        plain = await at.ask(model="smol", fake={"text": "Well: hello"})
        assert plain.json()["choices"][0]["message"]["content"] == "Well: hello"
    async with home([spec], name="vllm") as at:
        reply = await at.ask(model="kind", fake={"text": "Well: hello"})
        assert reply.json()["choices"][0]["message"]["content"] == "Well: hello"
        assert at.sent["continue_final_message"] is True
