"""Whatever dies first, nothing of an engine is left: the engine stopped, its server killed, its watchdog killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agentopt.errors import RunError
from agentopt.serving.engines import Starting
from tests.serving.engines.running import PATIENCE, alive, gone, parent, tiny, watched

pytestmark = pytest.mark.anyio


async def test_engine_that_ignores_term_is_killed(tmp_path: Path) -> None:
    engine, _ = watched(tiny("--does", "ignores_term"), tmp_path / "run", stop_grace=0.2)
    async with engine:
        await engine.ready()
        pid = engine.pid
        assert pid is not None
    assert not alive(pid)


async def test_engine_that_stands_still_is_closed_in_order_with_its_group(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    launch = tiny("--does", "orderly", "--pids", str(file))
    engine, _ = watched(launch, tmp_path / "run", health_interval=3600.0, stop_grace=PATIENCE)
    async with engine:
        await engine.ready()
        pids = json.loads(file.read_text(encoding="utf-8"))
        assert len(pids) == 2
        os.killpg(pids[0], signal.SIGSTOP)
    assert not any(alive(pid) for pid in pids)
    assert "ended in order" in engine.log_tail(50), "it was not woken, so it was killed after the grace"


@pytest.mark.parametrize("end", ["close", "kill", "watchdog"])
async def test_children_of_an_engine_end_with_it_wherever_they_fled(tmp_path: Path, end: str) -> None:
    file = tmp_path / "pids"
    engine, _ = watched(tiny("--does", "has_children", "--pids", str(file)), tmp_path / "run", stop_grace=0.5)
    async with engine:
        await engine.ready()
        pids = json.loads(file.read_text(encoding="utf-8"))
        assert len(pids) == 3 and all(alive(pid) for pid in pids)
        if end == "kill":
            os.kill(pids[0], signal.SIGKILL)
        elif end == "watchdog":
            os.kill(parent(pids[0]), signal.SIGKILL)
        if end != "close":
            await engine.changed()
            await engine.ready()
            assert engine.generation == 2
        if end == "watchdog":  # nobody is left who could adopt what fled into a session of its own
            os.kill(pids.pop(), signal.SIGKILL)
        if end != "close":
            assert gone(pids)
    assert gone(pids)


async def test_watchdog_that_is_asked_to_end_ends_its_engine_in_order(tmp_path: Path) -> None:
    engine, _ = watched(tiny("--does", "orderly"), tmp_path / "run", stop_grace=PATIENCE)
    async with engine:
        await engine.ready()
        pid = engine.pid
        assert pid is not None
        os.kill(parent(pid), signal.SIGTERM)
        await engine.changed()
        assert not alive(pid)
        assert "ended in order" in (tmp_path / "run" / "engine.log").read_text(encoding="utf-8")


async def test_helpers_of_a_dead_engine_may_clean_up(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    engine, _ = watched(tiny("--does", "has_helper", "--pids", str(file)), tmp_path / "run", stop_grace=PATIENCE)
    async with engine:
        await engine.ready()
        pids = json.loads(file.read_text(encoding="utf-8"))
        os.kill(pids[0], signal.SIGKILL)
        await engine.changed()
        await engine.ready()
        assert not alive(pids[1])
        assert "helper cleaned up" in (tmp_path / "run" / "engine.log").read_text(encoding="utf-8")


async def test_closing_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, told = watched(tiny("--does", "never_ready"), tmp_path / "run")
    await engine.start()
    while not (pids := [event.pid for event in told if isinstance(event, Starting)]):
        await asyncio.sleep(0.01)
    await engine.aclose()
    assert not alive(pids[0])
    with pytest.raises(RunError, match="was stopped"):
        await engine.ready()


async def test_closing_while_a_sick_engine_is_ended_waits_until_all_of_it_is_gone(tmp_path: Path) -> None:
    file, sick = tmp_path / "pids", tmp_path / "sick"
    launch = tiny("--does", "has_children", "--pids", str(file), "--sick", str(sick))
    engine, told = watched(launch, tmp_path / "run", hung_after=0.0, stop_grace=0.5)
    async with engine:
        await engine.ready()
        pids = json.loads(file.read_text(encoding="utf-8"))
        sick.touch()
        await engine.changed()
        async with asyncio.TaskGroup() as group:  # twice, as when somebody is impatient
            group.create_task(engine.aclose())
            group.create_task(engine.aclose())
        assert not any(alive(pid) for pid in pids)
    assert [event.kind for event in told].count("starting") == 1


# --- its server is killed --------------------------------------------------------------------------------------------

SERVER = """
import asyncio, sys
from pathlib import Path
from tests.serving.engines.running import tiny, watched

async def main():
    engine, _ = watched(tiny("--does", sys.argv[3], "--pids", sys.argv[2]), Path(sys.argv[1]), stop_grace=0.5)
    async with engine:
        await engine.ready()
        print("ready", flush=True)
        await asyncio.sleep(600)

{run}(main())
"""


@asynccontextmanager
async def _server(place: Path, does: str, run: str = "asyncio.run") -> AsyncGenerator[asyncio.subprocess.Process]:
    """A process with a supervised engine; its pids and its watchdog's are in the file "pids"."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER.replace("{run}", run), str(place / "run"), str(place / "pids"), does),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"ready\n"
    try:
        yield server
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


def _pids(place: Path) -> list[int]:
    pids = json.loads((place / "pids").read_text(encoding="utf-8"))
    return [*pids, parent(pids[0])]


@pytest.mark.parametrize("run", ["asyncio.run", "__import__('uvloop').run"])
async def test_nothing_of_an_engine_outlives_a_server_that_is_killed(tmp_path: Path, run: str) -> None:
    async with _server(tmp_path, "has_children", run) as server:
        pids = _pids(tmp_path)
        assert all(alive(pid) for pid in pids)
        server.kill()
        await server.wait()
        assert gone(pids)
    engine, _ = watched(tiny(), tmp_path / "run")  # and its folder can be used again
    async with engine:
        await engine.ready()


async def test_engine_ends_when_its_server_and_its_watchdog_are_killed_at_once(tmp_path: Path) -> None:
    async with _server(tmp_path, "ignores_term") as server:
        pid, watchdog = _pids(tmp_path)
        os.kill(watchdog, signal.SIGSTOP)  # it does not see its server's end
        server.kill()
        await server.wait()
        assert alive(pid)
        os.kill(watchdog, signal.SIGKILL)
        assert gone([pid, watchdog])
    engine, _ = watched(tiny(), tmp_path / "run")
    async with engine:
        await engine.ready()


CARELESS = """
import asyncio, sys
from pathlib import Path
from tests.serving.engines.running import tiny, watched

async def main():
    engine, _ = watched(tiny(), Path(sys.argv[1]))
    await engine.start()
    await engine.ready()
    print(engine.pid)

asyncio.run(main())
"""


def test_a_loop_that_ends_before_its_engine_is_closed_does_not_wait_for_ever(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", CARELESS, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert gone([int(done.stdout)])
