"""One session with everything on: afterwards no secret is in any file, any output or any command line."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import zlib
from pathlib import Path

import pytest

from agentopt.serving.keys import KeyStore, NewKey
from tests.acceptance.served import ENVIRONMENT, asked, server

HELLO = [{"role": "user", "content": "one two three"}]
OPTIONS = ("double", "--engine", "fake", "--keys", "keys.db", "--capture", "--store", "store.db", "--run-dir", "run")
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


def token(pid: int) -> str:
    """The engine's, which is in its environment alone."""
    for pair in Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0"):
        name, _, value = pair.partition("=")
        if name in ("AGENTOPT_ENGINE_TOKEN", "VLLM_API_KEY"):
            return value
    raise AssertionError("the engine has no token")


def stored(path: Path) -> str:
    """Everything in a store; the bodies of traces are compressed there."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        cells = [cell for name in tables for row in connection.execute(f"SELECT * FROM {name}") for cell in row]
    texts: list[str] = []
    for cell in cells:
        try:
            texts.append(zlib.decompress(cell).decode())
        except (TypeError, zlib.error):
            texts.append(str(cell))
    return "\n".join(texts)


@NEEDS_PROC
def test_no_secret_is_left_anywhere(tmp_path: Path) -> None:
    _, good = KeyStore(tmp_path / "keys.db").create(NewKey("good"))
    wrong, admin = "ak-" + "W0" * 21 + "w", "admin-token-of-this-test"
    seen: list[str] = []
    with server(
        tmp_path, *OPTIONS, "--", "--control", environment=ENVIRONMENT | {"AGENTOPT_ADMIN_TOKEN": admin}
    ) as running:
        serving = running.serving()
        base, engine_pid = serving["base_url"], running.engine_pid
        inside = token(engine_pid)
        for key in (good, wrong):
            chat = f"{base}/chat/completions"
            message = [{"role": "user", "content": f"my key is {key}, and Authorization: Bearer {key}"}]
            for body in (
                {"messages": HELLO},
                {"messages": message, "stream": True},
                {"messages": message, "user": key, "model": key},
                {"messages": HELLO, "fake": {"status": 500}},
                {"messages": HELLO, "fake": {"garbage": True}},
            ):
                status, headers, _ = asked(chat, body, key=key, **{"X-Request-Id": key, "X-Custom": key})
                seen.append(str(headers))
                asked(f"{chat}?key={key}", body, **{"X-Agentopt-Session": key})
            rated = headers["x-request-id"]
            asked(f"{base}/feedback", {"request_id": rated, "score": "up", "text": f"with {key}"}, key=key)
            asked(f"{base}/models/{key}", key=key)
            asked(f"{base}/messages", {"messages": HELLO, "max_tokens": 3}, **{"x-api-key": key})
        assert status == 401
        for path in ("/metrics", "/status", "/openapi.json"):
            status, headers, body = asked(serving["admin_url"] + path, key=admin)
            assert status == 200
            seen.append(f"{headers} {body}")
            assert asked(serving["admin_url"] + "/status", key=wrong)[0] == 401
        for pid in (running.process.pid, engine_pid):
            seen.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode())
        assert asked(f"{base}/chat/completions", {"messages": HELLO, "fake": {"exit_after": 0}}, key=good)[0] == 502
        running.until("ready", generation=2)
        again = token(running.engine_pid)
        assert running.stop(signal.SIGTERM) == 0
        seen.append(str(running.told))
    kept = stored(tmp_path / "store.db")
    seen.append(kept)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"engine.log", "gateway.log", "keys.db", "store.db", "stderr.txt"} <= {path.name for path in files}
    for secret in (good, wrong, inside, again, admin):
        assert not [text for text in seen if secret in text]
        assert not [path.name for path in files if secret.encode() in path.read_bytes()]
    assert inside != again
    assert "one two three" in kept
    assert "my key is" in kept
    assert b"one two three" not in (tmp_path / "run" / "gateway.log").read_bytes()
