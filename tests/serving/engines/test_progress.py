"""An engine whose health is good while it computes nothing: found when a request found it silent, and replaced."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from agentopt.serving._types import CHAT, COMPLETIONS, Abilities
from agentopt.serving.engines import Event, Hung, Launch, Supervisor, fetch
from agentopt.serving.engines._progress import stalled
from tests.serving.engines.running import PATIENCE, kinds, tiny, watched

pytestmark = pytest.mark.anyio

COUNTERS = re.compile(r"^tokens_total .*$", re.MULTILINE)
ABLE = Abilities(routes=frozenset({CHAT, COMPLETIONS}), model="tiny")


def able(stuck: Path) -> Launch:
    return replace(tiny("--stuck", str(stuck)), abilities=ABLE, counters=COUNTERS)


async def until_asked(engine: Supervisor, times: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while sum("asked for a token" in line for line in engine.log_tail(100)) < times:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("counters", ["told", "silent"])
async def test_engine_that_computes_nothing_is_replaced_although_its_health_is_good(
    counters: str, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    engine, told = watched(able(stuck), tmp_path / "run", token_within=0.2)
    async with engine:
        await engine.ready()
        stuck.write_text(counters, encoding="utf-8")
        assert (await fetch(engine.address, "/health"))[0] == 200
        assert not any(isinstance(event, Hung) for event in told), "nobody had asked anything"
        async with asyncio.timeout(PATIENCE):
            while engine.generation == 1:
                engine.suspect("a request was not answered")
                await asyncio.sleep(0.05)
        stuck.unlink()
        await engine.ready()
        assert engine.generation == 2
    assert [event.why for event in told if isinstance(event, Hung)] == [
        "its health is good, but it wrote no token for anybody in 0.4 s"
    ]


async def test_engine_that_is_busy_for_others_is_left_alone(tmp_path: Path) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("busy", encoding="utf-8")
    engine, told = watched(able(stuck), tmp_path / "run", token_within=0.1)
    async with engine:
        await engine.ready()
        for times in (1, 2, 3):
            engine.suspect("a request was not answered")
            await until_asked(engine, times)
        assert engine.generation == 1
    assert "hung" not in kinds(told)


async def test_engine_that_answers_is_well(tmp_path: Path) -> None:
    engine, _ = watched(able(tmp_path / "never"), tmp_path / "run")
    async with engine:
        await engine.ready()
        assert await stalled(engine.address, ABLE, COUNTERS, PATIENCE) is None
        await until_asked(engine, 1)


@pytest.mark.parametrize("what", ["no completions", "no counters", "no metrics"])
async def test_where_it_cannot_be_told_nothing_is_done(tmp_path: Path, what: str) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text("", encoding="utf-8")
    told: list[Event]
    engine, told = watched(able(stuck), tmp_path / "run")
    async with engine:
        await engine.ready()
        abilities = replace(ABLE, routes=frozenset({CHAT})) if what == "no completions" else ABLE
        counters = re.compile("nothing of the kind") if what == "no counters" else COUNTERS
        address = replace(engine.address, token="wrong") if what == "no metrics" else engine.address
        assert await stalled(address, abilities, counters, 0.05) is None
    assert "hung" not in kinds(told)
