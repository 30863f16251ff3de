"""`agentopt serve keys|status|variants|adapters|drain`: what they find, say and return, 80 columns wide."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentopt.cli import _serve_keys as keys
from agentopt.cli import _serve_remote as remote
from agentopt.cli._serve_remote import Where
from agentopt.errors import RunError, UserError
from agentopt.serving._types import Address, Phase
from agentopt.serving.admin import AdminClient, Control, admin_app
from agentopt.serving.fake_engine import Ready
from agentopt.serving.gateway import serving
from agentopt.serving.metrics import Meter

TOKEN = "an-admin-token-of-a-test"


class Parts:
    """The parts of a server, as little of each as the commands see."""

    def __init__(self) -> None:
        self.in_flight, self.draining, self.stopped = 0, False, threading.Event()
        self.folders: dict[str, str] = {"old": "/old"}
        self.resident, self.loads = 1, 3
        self.engine = Ready(Address(port=1))

    known = property(lambda self: len(self.folders))

    def control(self) -> Control:
        it: Any = self
        return Control(
            self.engine, it, it, Meter(), TOKEN, "base", adapters=it, scores=variants, stop=self.stopped.set,
            base_url="http://127.0.0.1:8000/v1",
        )  # fmt: skip

    async def drain(self, seconds: float) -> bool:
        self.draining = True
        return not self.in_flight

    def entries(self) -> list[dict[str, Any]]:
        return [{"id": "base"}, *({"id": name} for name in self.folders)]

    def taken(self, name: str) -> str | None:
        return None

    def __contains__(self, name: object) -> bool:
        return name in self.folders

    def list(self) -> list[Any]:
        return [Status(name) for name in self.folders]

    async def add(self, name: str, folder: str, *, keep: bool = False) -> None:
        if not os.path.exists(os.path.join(folder, "adapter_config.json")):
            raise UserError(f"{folder}: no adapter_config.json.")
        self.folders[name] = folder

    async def remove(self, name: str) -> None:
        del self.folders[name]


class Status:
    def __init__(self, name: str) -> None:
        self.name = name

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "rank": 16, "bytes": 12_345_678, "resident": True, "users": 2, "loads": 1, "facts": 120,
            "folded": True, "recall": 0.95, "notes": ["made for a base that is not known"], "problem": None,
        }  # fmt: skip


def variants() -> list[dict[str, Any]]:
    base = {
        "model": "support", "variant": "best", "file": "best.json", "hash": "a", "weight": 0.75, "adapter": None,
        "requests": 1200, "errors": 1, "prompt_tokens": 10**6, "completion_tokens": 10**5, "mean_ms": 812.0,
        "feedback": {"n": 40, "mean": 0.4, "interval": [0.2, 0.6], "method": "t"}, "against": None,
    }  # fmt: skip
    told = {"variant": "best", "difference": -0.2, "interval": [-0.31, -0.04], "shown": True}
    few = {"variant": "best", "difference": -0.5, "interval": None, "shown": None}
    return [
        base,
        {**base, "variant": "base", "weight": 0.2, "against": told},
        {**base, "variant": "c", "weight": 0.05, "against": few, "mean_ms": None},
    ]


@contextmanager
def live(parts: Parts, port: int = 8000) -> Generator[str]:
    """The admin side on a real port in another thread, and its run folder in the current one."""
    told: list[int] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(admin_app(parts.control())) as server:
            told.append(server.port)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        url = f"http://127.0.0.1:{told[0]}"
        folder = Path(".agentopt/serve") / str(port)
        folder.mkdir(parents=True)
        about = {"pid": os.getpid(), "base_url": f"http://127.0.0.1:{port}/v1", "admin_url": url, "admin_token": TOKEN}
        (folder / "server.json").write_text(json.dumps(about))
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield url
    finally:
        stop.set()
        thread.join()


@pytest.fixture(autouse=True)
def eighty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("AGENTOPT_ADMIN_TOKEN", raising=False)
    monkeypatch.delenv("AGENTOPT_KEYS", raising=False)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines()), text
    return text


# --- a server that runs ----------------------------------------------------------------------------------------------


def test_a_running_server_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, where = Parts(), Where()
    with live(parts):
        assert remote.status_command(where) == 0
        text = said(capsys)
        assert "engine    fake ready" in text and "models    base, old" in text
        parts.engine.phase, parts.engine.generation = Phase.FAILED, 6
        assert remote.status_command(where, as_json=True) == 1
        assert json.loads(capsys.readouterr().out)["engine"]["generation"] == 6

        assert remote.variants_command(where) == 0
        text = said(capsys)
        assert "base against best: -0.200, 95 % interval -0.310 to -0.040\n" in text
        assert "c against best: -0.500, too little feedback to tell" in text

        (tmp_path / "book").mkdir()
        with pytest.raises(UserError, match=r"book: no adapter_config.json"):
            remote.add_adapter_command(where, "handbook=book")
        with pytest.raises(UserError, match="expected the folder of an adapter, found nothing"):
            remote.add_adapter_command(where, "handbook=none")
        for wrong in ("handbook", "=book", "handbook="):
            with pytest.raises(UserError, match="expected NAME=DIR"):
                remote.add_adapter_command(where, wrong)
        (tmp_path / "book" / "adapter_config.json").touch()
        assert remote.add_adapter_command(where, "handbook=book") == 0
        assert parts.folders["handbook"] == str(tmp_path / "book")
        assert "added handbook (rank 16, 12.3 MB): ask for it as model handbook" in said(capsys)
        assert remote.adapters_command(where) == 0
        assert "handbook    16  12.3 MB" in said(capsys)
        assert remote.remove_adapter_command(where, "handbook") == 0
        with pytest.raises(UserError, match="There is no adapter handbook"):
            remote.remove_adapter_command(where, "handbook")
        capsys.readouterr()

        parts.in_flight = 3
        assert remote.drain_command(where, seconds=0) == 1
        assert "3 requests were still under way after 0 s and are cut off" in said(capsys)
        parts.in_flight = 0
        assert remote.drain_command(where, as_json=True) == 0
        assert json.loads(said(capsys)) == {"drained": True, "in_flight": 0, "stops": True}
        assert parts.stopped.wait(30)
        with pytest.raises(UserError, match="expected seconds"):
            remote.drain_command(where, seconds=float("nan"))


def test_which_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no server runs from"):
        AdminClient.find()
    with live(Parts(), 8000) as url, live(Parts(), 9000):
        with pytest.raises(UserError, match=r"several servers run from here \(ports 8000, 9000\); give --port"):
            AdminClient.find()
        assert AdminClient.find(port=8000).get("/status")["model"] == "base"
        assert AdminClient.find(run_dir=".agentopt/serve/9000").server["base_url"].endswith(":9000/v1")
        with pytest.raises(UserError, match="on port 1"):
            AdminClient.find(port=1)
        with pytest.raises(UserError, match="set AGENTOPT_ADMIN_TOKEN"):
            AdminClient.find(admin=url)
        monkeypatch.setenv("AGENTOPT_ADMIN_TOKEN", TOKEN)
        assert AdminClient.find(admin=f"{url.removeprefix('http://')}/").get("/status")["model"] == "base"
        assert TOKEN not in repr(AdminClient.find(admin=url))
        monkeypatch.setenv("AGENTOPT_ADMIN_TOKEN", "wrong")
        with pytest.raises(UserError, match="the admin token is wrong"):
            AdminClient.find(admin=url).get("/status")
        with pytest.raises(UserError, match="absolute path"):
            remote.add_adapter_command(Where(admin=url), "a=b")
        for wrong in ("ftp://x", "http://", "file:///etc/passwd"):
            with pytest.raises(UserError, match="expected an address"):
                AdminClient.find(admin=wrong)
    with pytest.raises(UserError, match="no server runs"):  # killed: the files are there, nobody holds the locks
        AdminClient.find()


def test_what_answers_but_is_no_admin_side() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunError, match="is it still running"):
            AdminClient(url, TOKEN).get("/status")
        silent.listen()
        with pytest.raises(RunError, match="did not answer within"):
            AdminClient(url, TOKEN).ask("GET", "/status", seconds=0.05)

    async def public(scope: Any, receive: Any, send: Any) -> None:
        body = b'{"error": {"message": "there is nothing at \'/status\'", "code": "not_found"}}'
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    async def ask() -> None:
        async with serving(hello) as server:
            client = AdminClient(f"http://127.0.0.1:{server.port}", TOKEN)
            with pytest.raises(RunError, match="answered 200 and no JSON object"):
                await asyncio.to_thread(client.get, "/status")
        async with serving(public) as server:
            client = AdminClient(f"http://127.0.0.1:{server.port}", TOKEN)
            with pytest.raises(UserError, match="or the public one"):
                await asyncio.to_thread(client.get, "/status")

    asyncio.run(ask())


def test_long_names_fit() -> None:
    console = Console(file=io.StringIO(), width=80)
    long = {"name": "n" * 64, "rank": 256, "bytes": 999_900_000, "resident": False, "users": 1000, "loads": 10**6}
    remote.print_adapters([{**long, "facts": 10**6, "folded": True, "recall": 1.0, "notes": ["n " * 90]}], console)
    remote.print_variants([{**row, "model": "m" * 90, "variant": "v" * 60} for row in variants()], console)
    found: dict[str, Any] = {
        "model": "m" * 70, "base_url": "http://" + "h" * 60, "uptime": 1e6, "in_flight": 10**6, "draining": True,
        "engine": {"name": "transformers", "phase": "restarting", "generation": 12},
        "totals": {"requests": 10**9, "errors": 10**6, "refused": 10**9, "prompt_tokens": 1e12, "completion_tokens": 1},
        "models": [f"adapter-{n}" for n in range(300)], "adapters": {"known": 300, "resident": 8}, "keys": None,
        "capture": {"captured": 1, "dropped": 2, "run_id": "r"}, "warnings": ["w " * 80],
    }  # fmt: skip
    remote.print_status(found, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines()), text
    assert "and 292 more" in text and "1.000" in text and "1000 MB" in text


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no key file: give --keys FILE, or set AGENTOPT_KEYS"):
        keys.list_command(None)
    monkeypatch.setenv("AGENTOPT_KEYS", "keys.db")
    assert keys.create_command("team", None, rpm=60, tpm=10**6, tokens=10**9, models="base, tuned-*", expires=30) == 0
    told = capsys.readouterr()
    secret = told.out.strip()
    assert len(secret) == 46 and secret not in told.err
    assert "It is shown only" in told.err and "60 requests/min" in told.err
    assert keys.create_command("n" * 64, None, as_json=True) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("ak-") and made["models"] == ["*"]
    assert keys.list_command(None) == 0
    text = said(capsys)
    assert secret not in text and "models base,tuned-*; until 20" in " ".join(text.split())
    assert keys.revoke_command("team", None) == 0
    assert "servers that use this file refuse it within a second" in " ".join(said(capsys).split())
    assert keys.revoke_command("team", None) == 0
    assert "was revoked already" in said(capsys)
    assert keys.list_command(None) == 0
    text = said(capsys)
    assert "team" not in text and "1 revoked key not shown: --all" in text
    assert keys.list_command(None, everything=True, as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)["keys"]
    assert [one["state"] for one in listed] == ["revoked", "valid"] and "key" not in listed[0]
    assert keys.revoke_command(made["id"], "keys.db", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["revoked"] is True
