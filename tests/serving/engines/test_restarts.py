"""When an engine is started again, after which pause, and when no more."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError
from agentopt.serving._types import Phase
from agentopt.serving.engines import Died, Event, Failed, Hung, Starting, Supervisor, SupervisorOptions, Waiting, fetch
from tests.serving.engines.running import PATIENCE, QUICK, alive, kinds, tiny, watched

pytestmark = pytest.mark.anyio


async def _killed(engine: Supervisor) -> None:
    """Kill it, and wait until it is ready again."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await engine.changed()
    await engine.ready()


async def test_killed_engine_is_started_again_and_prepared_before_it_is_ready(tmp_path: Path) -> None:
    engine, told = watched(tiny(), tmp_path / "run")
    phases: list[Phase] = []

    async def prepare() -> None:
        assert (await fetch(engine.address, "/v1/models"))[0] == 200
        phases.append(engine.phase)

    engine.on_start(prepare)
    async with engine:
        await engine.ready()
        assert phases == [Phase.STARTING]
        first, address = engine.pid, engine.address
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await engine.changed()
        assert engine.phase is Phase.RESTARTING and "signal 9" in (engine.reason or "")
        await engine.ready()
        assert phases == [Phase.STARTING, Phase.RESTARTING]
        assert engine.pid != first and engine.generation == 2 and engine.restarts == 1 and engine.reason is None
        assert engine.address.socket != address.socket and engine.address.token != address.token
    assert [kind for kind in kinds(told) if kind != "progress"] == [
        *("starting", "ready", "died", "waiting", "starting", "ready", "stopped")
    ]


@pytest.mark.parametrize(("stable", "pauses"), [(0.0, [0.02, 0.02, 0.02]), (3600.0, [0.02, 0.04, 0.05])])
async def test_pause_doubles_until_an_engine_was_stable(tmp_path: Path, stable: float, pauses: list[float]) -> None:
    engine, told = watched(tiny(), tmp_path / "run", stable_after=stable, failed_starts=2)
    async with engine:
        await engine.ready()
        for _ in pauses:  # more than `failed_starts`: those that were ready do not count
            await _killed(engine)
        assert engine.generation == 4
    assert [event.seconds for event in told if isinstance(event, Waiting)] == pauses
    assert [event.attempt for event in told if isinstance(event, Starting)] == [1, 1, 1, 1]


@pytest.mark.parametrize("suspected", [False, True])
async def test_engine_that_stands_still_is_found_and_replaced(tmp_path: Path, suspected: bool) -> None:
    interval = 3600.0 if suspected else 0.05
    engine, told = watched(
        tiny(), tmp_path / "run", health_interval=interval, health_timeout=0.8, hung_after=1.0, stop_grace=1.0
    )
    async with engine:
        await engine.ready()
        pid = engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        if suspected:
            engine.suspect("a request was not answered")
        while engine.phase is Phase.READY:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)  # again and again: whoever stops and wakes the whole suite wakes it too
            await asyncio.sleep(0.02)
        assert engine.phase is Phase.RESTARTING and "no answer" in (engine.reason or "")
        await engine.ready()
        assert not alive(pid) and engine.generation >= 2
    assert any(isinstance(event, Hung) for event in told)


async def test_engine_that_is_not_well_is_killed_without_being_asked(tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    launch = tiny("--does", "orderly", "--sick", str(sick))
    engine, told = watched(launch, tmp_path / "run", hung_after=0.0, stop_grace=PATIENCE)
    async with engine:
        await engine.ready()
        sick.touch()
        await engine.changed()
        sick.unlink()
        assert "its /health is answered with 503" in (engine.reason or "")
        await engine.ready()
        assert "ended in order" not in (tmp_path / "run" / "engine.log").read_text(encoding="utf-8")
    assert kinds(told).count("hung") == 1 and kinds(told).count("died") == 0


async def test_one_bad_answer_is_none(tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    engine, _ = watched(tiny("--sick", str(sick)), tmp_path / "run", hung_after=0.0)
    async with engine:
        await engine.ready()
        (tmp_path / "new").write_text("once", encoding="utf-8")
        os.replace(tmp_path / "new", sick)
        while "well again" not in engine.log_tail():
            assert engine.phase is Phase.READY
            await fetch(engine.address, "/v1/models")
        assert engine.generation == 1


async def test_engine_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    engine, told = watched(tiny("--does", "never_ready"), tmp_path / "run", start_timeout=0.3, failed_starts=2)
    async with engine:
        with pytest.raises(RunError, match=r"started 2 times and never got ready.*not ready within 0.3 s"):
            await engine.ready()
        assert engine.phase is Phase.FAILED and engine.pid is None
        pids = [event.pid for event in told if isinstance(event, Starting)]
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)
    assert kinds(told)[-2:] == ["failed", "stopped"]


async def test_engine_that_dies_at_start_is_tried_again_and_its_reason_is_told(tmp_path: Path) -> None:
    engine, told = watched(tiny("--does", "raises"), tmp_path / "run")
    async with engine:
        with pytest.raises(RunError, match=r"3 times.*ValueError: the weights are of another model") as failed:
            await engine.ready()
    assert "Traceback" in str(failed.value)  # the end of the log
    assert [event.attempt for event in told if isinstance(event, Starting)] == [1, 2, 3]
    last = next(event for event in told if isinstance(event, Failed))
    assert any("another model" in line for line in last.tail)


async def test_mistake_in_the_arguments_fails_at_once(tmp_path: Path) -> None:
    engine, told = watched(tiny("--colour", "red"), tmp_path / "run")
    async with engine:
        with pytest.raises(RunError, match=r"does not know the argument --colour red given after `--`\.$"):
            await engine.ready()
    assert kinds(told).count("starting") == 1


async def test_program_that_does_not_exist_fails_at_once(tmp_path: Path) -> None:
    engine, told = watched(tiny(program="/nowhere/python"), tmp_path / "run")
    async with engine:
        with pytest.raises(RunError, match="cannot start /nowhere/python: No such file"):
            await engine.ready()
    assert kinds(told).count("failed") == 1


async def test_what_is_wrong_for_good_at_the_first_start_may_be_an_accident_later(tmp_path: Path) -> None:
    """An engine that was ready once is tried again whatever its last words were."""
    file = tmp_path / "fails"
    engine, told = watched(tiny("--fails-while", str(file)), tmp_path / "run", failed_starts=2)
    async with engine:
        await engine.ready()
        file.touch()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="started 2 times and never got ready: the engine refused an argument"):
            await _until_failed(engine)
    assert kinds(told).count("starting") == 3


async def test_each_life_has_its_own_reason_and_its_own_count(tmp_path: Path) -> None:
    file = tmp_path / "fails"
    engine, told = watched(tiny("--fails-while", str(file)), tmp_path / "run", failed_starts=1_000_000)
    async with engine:
        await engine.ready()
        file.touch()
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await engine.changed()
        while not any(isinstance(event, Died) and "refused an argument" in event.why for event in told):
            await asyncio.sleep(0.01)
        file.unlink()
        await engine.ready()
        os.kill(engine.pid, signal.SIGKILL)
        await engine.changed()
        assert "signal 9" in (engine.reason or "")
        await engine.ready()
    assert [event.attempt for event in told if isinstance(event, Starting)][-1] == 1


async def _until_failed(engine: Supervisor) -> None:
    await engine.changed()
    await engine.ready()


async def test_a_listener_that_fails_does_not_end_the_engine(tmp_path: Path) -> None:
    def gone(event: Event) -> None:
        raise BrokenPipeError

    engine = Supervisor(tiny(), run_dir=tmp_path / "run", options=SupervisorOptions(**QUICK), on_event=gone)
    async with engine:
        await engine.ready()
        await _killed(engine)
        assert engine.restarts == 1


async def test_a_mistake_of_ours_is_a_life_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, told = watched(tiny(), tmp_path / "run")
    look = Supervisor._watch

    async def once(*arguments: Any) -> str:
        monkeypatch.setattr(Supervisor, "_watch", look)
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(Supervisor, "_watch", once)
    async with engine:
        await engine.ready()
        while engine.generation < 2:
            await engine.changed()
        await engine.ready()
    assert "unforeseen" in next(event.why for event in told if isinstance(event, Waiting))
