"""An engine that is started, watched, and started again: what it does wrong, and what its supervisor makes of it."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from agentopt.errors import RunError, UserError
from agentopt.serving._types import CHAT, Phase
from agentopt.serving.engines import Progress, Warned, fetch, launch_fake
from agentopt.serving.engines import _supervisor as module
from tests.serving.engines.running import PATIENCE, alive, kinds, tiny, watched

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


async def test_engine_does_not_get_our_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PROVIDER_API_KEY", "sk-secret")
    monkeypatch.setenv("AGENTOPT_ADMIN_TOKEN", "admin-secret")
    for name in ("PGPASSWORD", "DJANGO_SECRET_KEY", "some_provider_key", "APP_DATABASE_URL"):
        monkeypatch.setenv(name, "sk-secret")
    monkeypatch.setenv("SOME_SETTING", "kept")
    engine, _ = watched(tiny(), tmp_path / "run")
    async with engine:
        await engine.ready()
        given = Path(f"/proc/{engine.pid}/environ").read_text(encoding="utf-8")
        arguments = Path(f"/proc/{engine.pid}/cmdline").read_text(encoding="utf-8")
    assert "sk-secret" not in given and "admin-secret" not in given and "SOME_SETTING=kept" in given
    assert engine.address.token and engine.address.token not in arguments


async def test_shipped_double_is_supervised_with_all_its_routes(tmp_path: Path) -> None:
    engine, _ = watched(launch_fake("--chunks", "3", model="base"), tmp_path / "run")
    async with engine:
        await engine.ready()
        assert engine.abilities.model == "base" and "/v1/messages" in engine.abilities.routes
        body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "one two"}]}).encode()
        status, reply = await fetch(engine.address, CHAT, method="POST", body=body)
    assert status == 200 and json.loads(reply)["choices"][0]["message"]["content"]
