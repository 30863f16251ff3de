"""An engine that is started, watched, and started again: what it does wrong, and what its supervisor makes of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from agentopt.errors import RunError, UserError
from agentopt.serving._types import CHAT, Phase
from agentopt.serving.engines import Failed, Hung, Progress, Starting, Warned, fetch, launch_fake
from agentopt.serving.engines import _supervisor as module
from tests.serving.engines.running import PATIENCE, alive, gone, kinds, tiny, watched

pytestmark = pytest.mark.anyio


async def test_engine_is_ready_knows_its_abilities_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    engine, told = watched(tiny(), run)
    async with engine:
        assert engine.phase is Phase.STARTING
        await engine.ready()
        assert (engine.phase, engine.generation, engine.restarts) == (Phase.READY, 1, 0)
        assert engine.abilities.routes == {CHAT} and engine.abilities.context == 77
        assert engine.address.socket is not None and engine.address.token
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert (await fetch(engine.address, "/v1/models"))[0] == 200
        pid, socket = engine.pid, Path(engine.address.socket)
        assert pid is not None and alive(pid)
    assert engine.phase is Phase.STOPPED and engine.pid is None
    assert not alive(pid) and not socket.exists()
    assert kinds(told) == ["starting", "progress", "ready", "stopped"]
    assert next(event for event in told if isinstance(event, Progress)).what == "loading weights, 50%"
    await engine.aclose()  # a second time does nothing
    assert kinds(told)[-1:] == ["stopped"]


async def test_killed_engine_is_started_again_and_prepared_before_it_is_ready(tmp_path: Path) -> None:
    engine, told = watched(tiny(), tmp_path / "run")
    phases: list[Phase] = []

    async def prepare() -> None:
        assert (await fetch(engine.address, "/v1/models"))[0] == 200
        phases.append(engine.phase)

    engine.on_start(prepare)
    async with engine:
        await engine.ready()
        first, address = engine.pid, engine.address
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await engine.changed()
        assert engine.phase is Phase.RESTARTING and "signal 9" in (engine.reason or "")
        await engine.ready()
        assert engine.pid != first and engine.generation == 2 and engine.restarts == 1 and engine.reason is None
        assert engine.address != address  # a new socket and a new token
    assert phases == [Phase.STARTING, Phase.RESTARTING]
    assert [kind for kind in kinds(told) if kind != "progress"] == [
        *("starting", "ready", "died", "waiting", "starting", "ready", "stopped")
    ]


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
        await engine.changed()
        assert engine.phase is Phase.RESTARTING and "no answer" in (engine.reason or "")
        await engine.ready()
        assert not alive(pid) and engine.generation >= 2
    assert any(isinstance(event, Hung) for event in told)


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
    assert kinds(told).count("starting") == 3
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


async def test_engine_that_ignores_term_is_killed(tmp_path: Path) -> None:
    engine, _ = watched(tiny("--does", "ignores_term"), tmp_path / "run", stop_grace=0.2)
    async with engine:
        await engine.ready()
        pid = engine.pid
        assert pid is not None
    assert not alive(pid)


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
            os.kill(_parent(pids[0]), signal.SIGKILL)
        if end != "close":
            await engine.changed()
            await engine.ready()
            assert engine.generation == 2
        if end == "watchdog":  # nobody is left who could adopt what fled into a session of its own
            os.kill(pids.pop(), signal.SIGKILL)
        if end != "close":
            assert gone(pids)
    assert gone(pids)


async def test_callback_that_fails_is_told_and_the_engine_serves(tmp_path: Path) -> None:
    engine, told = watched(tiny(), tmp_path / "run")

    async def prepare() -> None:
        raise RunError("the adapter is gone")

    engine.on_start(prepare)
    async with engine:
        await engine.ready()
    assert [event.message for event in told if isinstance(event, Warned)] == [
        "engine tiny: after its start: the adapter is gone"
    ]


async def test_sockets_of_a_crash_are_removed_and_a_path_too_long_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "engine-00ff00.sock").touch()
    engine, _ = watched(tiny(), run)
    async with engine:
        await engine.ready()
        assert not (run / "engine-00ff00.sock").exists()
    deep = tmp_path / ("d" * 120)
    short = Path(tempfile.mkdtemp(prefix="s-"))
    request.addfinalizer(lambda: shutil.rmtree(short))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short))
    for free in (True, False):
        engine, _ = watched(tiny(), deep)
        async with engine:
            await engine.ready()
            assert (await fetch(engine.address, "/v1/models"))[0] == 200
            if free:
                assert engine.address.socket is not None
                place = Path(engine.address.socket).parent
                assert place.parent == short and stat.S_IMODE(place.stat().st_mode) == 0o700
                place.chmod(0o755)  # others could reach a socket in it: as if they had made it first
            else:
                assert engine.address.socket is None and engine.address.port > 0


async def test_run_folder_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine, _ = watched(tiny(), tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"run folder .*cannot be written.*--run-dir"):
        await engine.start()
    await engine.aclose()


async def test_one_engine_per_folder_and_the_next_one_waits_for_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = watched(tiny(), tmp_path / "run")
    async with first:
        await first.ready()
        monkeypatch.setattr(module, "_FORMER", 0.1)
        second, _ = watched(tiny(), tmp_path / "run", stop_grace=0.1)
        async with second:
            with pytest.raises(RunError, match="an engine of another server running in it"):
                await second.ready()
        monkeypatch.setattr(module, "_FORMER", PATIENCE)
        third, told = watched(tiny(), tmp_path / "run")
        await third.start()
        while not any(isinstance(event, Progress) and "to end" in event.what for event in told):
            await asyncio.sleep(0.01)
        await first.aclose()
        await third.ready()
        await third.aclose()


async def test_log_is_rotated_and_never_holds_the_token(tmp_path: Path) -> None:
    run = tmp_path / "run"
    engine, _ = watched(tiny("--does", "talks"), run, log_bytes=40_000, log_files=3)
    async with engine:
        await engine.ready()
        assert any(line.startswith("line 3999") for line in engine.log_tail(50))
    files = sorted(file.name for file in run.glob("engine.log*"))
    assert files == ["engine.log", "engine.log.1", "engine.log.2"]
    assert all(0 < (run / name).stat().st_size <= 40_000 for name in files)
    assert stat.S_IMODE((run / "engine.log").stat().st_mode) == 0o600
    engine, _ = watched(tiny("--does", "leaks"), tmp_path / "other")
    async with engine:
        await engine.ready()
        token = engine.address.token
        assert token
    text = (tmp_path / "other" / "engine.log").read_text(encoding="utf-8")
    assert "my token is ***" in text and token not in text


async def test_engine_does_not_get_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PROVIDER_API_KEY", "sk-secret")
    monkeypatch.setenv("AGENTOPT_ADMIN_TOKEN", "admin-secret")
    monkeypatch.setenv("SOME_SETTING", "kept")
    engine, _ = watched(tiny(), tmp_path / "run")
    async with engine:
        await engine.ready()
        given = Path(f"/proc/{engine.pid}/environ").read_text(encoding="utf-8")
        arguments = Path(f"/proc/{engine.pid}/cmdline").read_text(encoding="utf-8")
    assert "sk-secret" not in given and "admin-secret" not in given and "SOME_SETTING=kept" in given
    assert engine.address.token and engine.address.token not in arguments


async def test_closing_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    engine, told = watched(tiny("--does", "never_ready"), tmp_path / "run")
    await engine.start()
    while not (pids := [event.pid for event in told if isinstance(event, Starting)]):
        await asyncio.sleep(0.01)
    await engine.aclose()
    assert not alive(pids[0])
    with pytest.raises(RunError, match="was stopped"):
        await engine.ready()


async def test_shipped_double_is_supervised_with_all_its_routes(tmp_path: Path) -> None:
    engine, _ = watched(launch_fake("--chunks", "3", model="base"), tmp_path / "run")
    async with engine:
        await engine.ready()
        assert engine.abilities.model == "base" and "/v1/messages" in engine.abilities.routes
        body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "one two"}]}).encode()
        status, reply = await fetch(engine.address, CHAT, method="POST", body=body)
    assert status == 200 and json.loads(reply)["choices"][0]["message"]["content"]


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


@pytest.mark.parametrize("run", ["asyncio.run", "__import__('uvloop').run"])
async def test_nothing_of_an_engine_outlives_a_server_that_is_killed(tmp_path: Path, run: str) -> None:
    file = tmp_path / "pids"
    root = Path(__file__).parents[3]
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER.replace("{run}", run), str(tmp_path / "run"), str(file), "has_children"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert server.stdout is not None
    assert await server.stdout.readline() == b"ready\n"
    pids = json.loads(file.read_text(encoding="utf-8"))
    pids.append(_parent(pids[0]))
    assert all(alive(pid) for pid in pids)
    server.kill()
    await server.wait()
    assert gone(pids)
    engine, _ = watched(tiny(), tmp_path / "run")  # and its folder can be used again
    async with engine:
        await engine.ready()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
