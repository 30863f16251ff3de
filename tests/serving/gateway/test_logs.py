"""The access log: what stands in it, what never does, and what a full disk does to it."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, Exchange, Key
from agentopt.serving.gateway import AccessLog
from tests.serving.gateway.kit import HELLO, Ring, house

pytestmark = pytest.mark.anyio
FIELDS = {
    "time", "request_id", "client_request_id", "client", "key", "route", "model", "variant", "adapter", "status",
    "error", "stream", "ms", "first_ms", "prompt_tokens", "completion_tokens", "bytes_in", "bytes_out",
}  # fmt: skip
SECRET = "ak-" + "S3cret_-" * 5 + "abc"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


async def test_a_line_says_what_happened_and_holds_neither_text_nor_secret(tmp_path: Path) -> None:
    path = tmp_path / "gateway.log"
    log = AccessLog(path)
    mine = {"authorization": f"Bearer {SECRET}"}
    async with house(keyring=Ring(**{SECRET: Key("key_1", "me")}), fake={"token": "inner-token"}) as home:
        home.gateway.observers = (*home.gateway.observers, log)
        private = [{"role": "user", "content": "my private words"}]
        good = await home.ask(messages=private, headers={**mine, "x-request-id": "mine-7"})
        await home.ask(messages=private, stream=True, headers=mine, fake={"die_after": 1})
        await home.ask(messages=private, headers={"authorization": f"Bearer {SECRET}x"})
        await home.ask(messages=private, model=SECRET, user="private user", headers=mine)
        for odd in (SECRET, "my private words"):
            await home.ask(messages=private, headers={**mine, "x-request-id": odd, "x-agentopt-session": odd})
            await home.client.get(f"/v1/{odd}", headers=mine)
            await home.client.get(f"/{odd}?key={SECRET}", headers=mine)
            await home.client.get(f"/v1/models/{odd}", headers=mine)
        await home.client.get("/health")
    log.close()
    found = lines(path)
    assert all(set(line) == FIELDS for line in found)
    first = found[0]
    assert first["request_id"] == good.headers["x-request-id"]
    assert (first["client_request_id"], first["key"], first["route"]) == ("mine-7", "key_1", CHAT)
    assert (first["status"], first["error"], first["prompt_tokens"], first["completion_tokens"]) == (200, None, 3, 3)
    assert 0 <= first["first_ms"] <= first["ms"]
    assert [line["error"] for line in found[1:4]] == ["engine_died", "invalid_api_key", "model_not_found"]
    assert found[1]["stream"]
    assert {line["route"] for line in found[4:]} == {CHAT, "other", "/v1/models/{id}"}
    text = path.read_text("utf-8")
    for secret in (SECRET, "private", "inner-token", "S3cret"):
        assert secret not in text
    assert path.stat().st_mode & 0o777 == 0o600


async def test_text_is_logged_only_where_it_is_asked_for() -> None:
    stream = io.StringIO()
    log = AccessLog(None, stream=stream, log_text=True)
    async with house() as home:
        home.gateway.observers = (log,)
        await home.ask(messages=HELLO)
    line = json.loads(stream.getvalue())
    assert line["request"] == {"messages": HELLO}
    assert "hello wide world" in line["reply"]


def test_long_files_are_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "gateway.log"
    log = AccessLog(path, max_bytes=1000, keep=2)
    for number in range(60):
        log.event("test", number=number)
    log.close()
    kept = sorted(tmp_path.iterdir())
    assert [one.name for one in kept] == ["gateway.log", "gateway.log.1", "gateway.log.2"]
    assert all(one.stat().st_size <= 1000 for one in kept)
    numbers = [line["number"] for one in reversed(kept) for line in lines(one)]
    assert numbers == list(range(numbers[0], 60))


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.log"
    log = AccessLog(path)

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(3):
            log.ended(Exchange("req_1", CHAT, "1.1.1.1"), None)
    assert log.lost == 3
    log.event("again")
    log.close()
    assert lines(path)[0] == {"event": "lines_lost", "count": 3}
    assert lines(path)[1]["event"] == "again"


def test_a_file_that_cannot_be_written_is_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the access log"):
        AccessLog(tmp_path / "missing" / "gateway.log")


def test_half_a_line_of_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.log"
    log = AccessLog(path)
    log.event("before")
    write = os.write
    with monkeypatch.context() as patch:

        def full(file: int, data: bytes) -> int:
            if len(data) < 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, data[: len(data) - 20])

        patch.setattr(os, "write", full)
        log.event("during", text="x" * 50)
    log.event("after")
    log.close()
    assert [line["event"] for line in lines(path)] == ["before", "lines_lost", "after"]


def test_a_log_that_cannot_be_put_aside_grows_on(tmp_path: Path) -> None:
    path = tmp_path / "gateway.log"
    (tmp_path / "gateway.log.1" / "in the way").mkdir(parents=True)
    log = AccessLog(path, max_bytes=200, keep=1)
    for number in range(20):
        log.event("one", number=number)
    log.close()
    assert [line["number"] for line in lines(path)] == list(range(20))
