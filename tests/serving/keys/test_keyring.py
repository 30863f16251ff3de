"""The keyring of a running server: limits, revocation, and whatever happens to its file meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.serving._types import Key, Keyring, Refusal
from agentopt.serving.keys import Clock, KeyStore, NewKey, StoredKeyring, may_ask
from agentopt.serving.keys._budgets import Use
from agentopt.serving.keys._file import hash_of
from agentopt.serving.keys._watch import KeyFile, Look, Used


class Time:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.wall, self.ticks = time.time(), 1000.0
        self.clock = Clock(lambda: self.wall, lambda: self.ticks)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.ticks += seconds


async def until(true: Callable[[], bool]) -> None:
    """Wait, generously, for what another thread does."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.01)


def ring(path: Path, times: Time | None = None) -> StoredKeyring:
    return StoredKeyring(path, clock=None if times is None else times.clock, poll=0.01, flush=0.02)


def make(path: Path, **limits: object) -> str:
    return KeyStore(path).create(NewKey(**{"name": "team", **limits}))[1]  # type: ignore[arg-type]


def refusal(keyring: StoredKeyring, key: Key) -> Refusal:
    with pytest.raises(Refusal) as caught:
        keyring.admit(key)
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


# --- who may ask -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_only_the_secret_finds_its_key(path: Path) -> None:
    secret = make(path)
    keyring: Keyring = ring(path)
    found = keyring.find(secret)
    assert found is not None and found.name == "team"
    stored = KeyStore(path).list()[0]
    for wrong in (
        "",
        "ak-",
        secret[:-1],
        secret + "A",
        secret.upper(),
        stored.hash.hex(),
        found.id,
        "x" * 10**6,
        "\ud800",
    ):
        assert keyring.find(wrong) is None
    await ring(path).close()


def test_models_are_globs_of_whole_names() -> None:
    key = Key("k", "n", models=("base", "tuned-*", "org/?odel"))
    asked = ["base", "base2", "tuned-", "tuned-a/b", "org/model", "org/mmodel", "Base", ""]
    assert [may_ask(key, name) for name in asked] == [True, False, True, True, True, False, False, False]
    assert may_ask(Key("k", "n"), "any/thing:at-all")


@pytest.mark.anyio
async def test_a_thousand_wrong_keys_leave_nothing_in_memory(path: Path) -> None:
    make(path)
    keyring = ring(path)
    wrong = [f"ak-{n:043d}" for n in range(2000)]
    tracemalloc.start()
    try:
        for secret in wrong[:1000]:
            assert keyring.find(secret) is None
        before = tracemalloc.get_traced_memory()[0]
        for secret in wrong[1000:]:
            assert keyring.find(secret) is None
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
    finally:
        tracemalloc.stop()
    await keyring.close()


@pytest.mark.anyio
async def test_a_key_revoked_by_another_process_ends_at_once(path: Path) -> None:
    secret = make(path)
    async with ring(path) as keyring:
        ended: list[str] = []

        def broken(key: str) -> None:
            raise RuntimeError("a watcher with a fault")

        keyring.watch(broken)
        keyring.watch(ended.append)
        key = keyring.find(secret)
        assert key is not None
        keyring.admit(key)
        KeyStore(path).revoke("team")
        await until(lambda: ended == [key.id])
        assert keyring.find(secret) is None
        assert refusal(keyring, key).status == 401  # found before, admitted after
        keyring.release(key, 7)  # what was under way still counts
        await until(lambda: KeyStore(path).list()[0].tokens == 7)
        other = make(path, name="new")
        await until(lambda: keyring.find(other) is not None)


@pytest.mark.anyio
async def test_keys_expire_by_the_clock_of_the_day(path: Path) -> None:
    secret, times = make(path, expires_days=1), Time()
    async with ring(path, times) as keyring:
        ended: list[str] = []
        keyring.watch(ended.append)
        assert keyring.find(secret) is not None and keyring.known == 1
        times.wall += 86400  # also when the clock jumps
        assert keyring.find(secret) is None and keyring.known == 0
        await until(lambda: len(ended) == 1)
        times.wall -= 86400  # and when it is set right again
        assert keyring.find(secret) is not None
        await until(lambda: bool(keyring._file._valid))
        times.wall += 90000
        await until(lambda: len(ended) == 2)


# --- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_requests_a_minute(path: Path) -> None:
    secret, times = make(path, requests_per_minute=6), Time()
    keyring = ring(path, times)
    key = keyring.find(secret)
    assert key is not None
    for _ in range(6):
        keyring.admit(key)
        keyring.release(key, 0)
    refused = refusal(keyring, key)
    assert (refused.status, refused.kind, refused.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert refused.retry_after == 10
    times.wall -= 10**6  # a clock set back changes nothing
    times.ticks += 9
    assert refusal(keyring, key).retry_after == 1
    times.ticks += 1
    keyring.admit(key)
    assert refusal(keyring, key).retry_after == 10
    times.ticks += 10**6  # no more than a minute's worth is saved up
    for _ in range(6):
        keyring.admit(key)
    refusal(keyring, key)
    await keyring.close()


@pytest.mark.anyio
async def test_tokens_a_minute_may_be_overdrawn_once_and_are_waited_off(path: Path) -> None:
    secret, times = make(path, tokens_per_minute=60), Time()
    keyring = ring(path, times)
    key = keyring.find(secret)
    assert key is not None
    keyring.admit(key)
    keyring.admit(key)
    keyring.release(key, 100)
    refused = refusal(keyring, key)
    assert refused.retry_after == 41 and "60 tokens a minute" in str(refused)
    keyring.release(key, 20)
    times.ticks += 41
    assert refusal(keyring, key).retry_after == 20
    times.ticks += 20
    keyring.admit(key)
    await keyring.close()


@pytest.mark.anyio
async def test_requests_at_a_time(path: Path) -> None:
    secret = make(path, concurrency=2, requests_per_minute=3)
    keyring = ring(path, Time())
    key = keyring.find(secret)
    assert key is not None
    keyring.admit(key)
    keyring.admit(key)
    assert refusal(keyring, key).retry_after == 1
    keyring.release(key, 1)
    keyring.admit(key)  # the refused one took nothing of the three a minute
    keyring.release(key, 1)
    assert "3 times a minute" in str(refusal(keyring, key))
    await keyring.close()


@pytest.mark.anyio
async def test_a_budget_survives_a_restart_and_is_shared_by_servers(path: Path) -> None:
    secret = make(path, token_budget=100)
    async with ring(path) as first, ring(path) as second:
        key = first.find(secret)
        assert key is not None
        for _ in range(2):
            first.admit(key)
            first.release(key, 25)
        second.admit(key)
        second.release(key, 30)
        await until(lambda: first.used(key.id) == second.used(key.id) == 80)
        first.admit(key)
        first.release(key, 20)
    keyring = ring(path)
    refused = refusal(keyring, key)
    assert (refused.status, refused.kind, refused.code) == (429, "insufficient_quota", "insufficient_quota")
    assert refused.retry_after is None
    stored = KeyStore(path).list()[0]
    assert (stored.requests, stored.tokens, stored.state()) == (4, 100, "used up")
    assert stored.last_used is not None
    await keyring.close()


@given(
    st.integers(1, 50),
    st.lists(st.one_of(st.just(None), st.floats(0, 200)), max_size=200),
)
def test_no_stretch_of_time_lets_through_more_than_burst_and_rate(rate: int, steps: list[float | None]) -> None:
    key, use, now = Key("k", "n", requests_per_minute=rate), Use(), 0.0
    admitted: list[float] = []
    for step in steps:
        if step is not None:
            now += step
            continue
        try:
            use.admit(key, 0, now)
        except Refusal as refused:
            assert refused.retry_after is not None
        else:
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= rate + (admitted[last] - start) * rate / 60 + 1e-6


# --- the file meanwhile ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_file_is_deleted_and_comes_back_revoked(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = make(path)
    async with ring(path) as keyring:
        ended: list[str] = []
        keyring.watch(ended.append)
        key = keyring.find(secret)
        assert key is not None
        aside = path.with_name("aside.db")
        path.rename(aside)
        await until(lambda: keyring.trouble is not None)
        assert "the key file is gone" in (keyring.trouble or "")
        assert keyring.find(secret) == key
        keyring.admit(key)
        keyring.release(key, 11)
        KeyStore(aside).revoke("team")
        await asyncio.sleep(0.1)
        assert not path.exists()  # looking and writing make no empty file
        aside.rename(path)
        await until(lambda: ended == [key.id])
        await until(lambda: KeyStore(path).list()[0].tokens == 11)
        await until(lambda: keyring.trouble is None)
        assert keyring.find(secret) is None
    said = [record.getMessage() for record in caplog.records]
    assert sum("the key file is gone" in line for line in said) == 1  # not with every look
    assert any("can be read again" in line for line in said)


@pytest.mark.anyio
@pytest.mark.parametrize("garbage", [b"", b"garbage" * 1000, None])
async def test_the_file_is_damaged_and_repaired(path: Path, garbage: bytes | None) -> None:
    secret = make(path)
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    async with ring(path) as keyring:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if garbage is None else garbage)
        await until(lambda: keyring.trouble is not None)
        key = keyring.find(secret)
        assert key is not None
        keyring.admit(key)
        keyring.release(key, 3)
        KeyStore(copy).revoke("team")
        path.write_bytes(copy.read_bytes())
        await until(lambda: keyring.find(secret) is None)
        await until(lambda: keyring.trouble is None and KeyStore(path).list()[0].tokens == 3)


@pytest.mark.anyio
async def test_the_file_is_locked_for_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.serving.keys._watch._WAIT", 0.02)
    secret = make(path)
    async with ring(path) as keyring:
        key = keyring.find(secret)
        assert key is not None
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        keyring.admit(key)
        keyring.release(key, 5)
        await until(lambda: "locked" in (keyring.trouble or ""))
        assert keyring.find(secret) == key and keyring.used(key.id) == 5
        other.execute("UPDATE keys SET revoked = 1.0")
        other.execute("COMMIT")
        other.close()
        await until(lambda: keyring.find(secret) is None and keyring.trouble is None)
        await until(lambda: KeyStore(path).list()[0].tokens == 5)


@pytest.mark.anyio
async def test_an_older_copy_brings_no_revoked_key_back(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret, other = make(path), make(path, name="other")
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    async with ring(path) as keyring:
        KeyStore(path).revoke("team")
        await until(lambda: keyring.find(secret) is None)
        with caplog.at_level(logging.WARNING):
            os.replace(copy, path)
            await until(lambda: any("stay revoked" in record.getMessage() for record in caplog.records))
        assert keyring.find(secret) is None and keyring.find(other) is not None


@pytest.mark.anyio
async def test_a_new_file_in_the_place_of_the_old_one_counts(path: Path) -> None:
    secret = make(path)
    async with ring(path) as keyring:
        ended: list[str] = []
        keyring.watch(ended.append)
        key = keyring.find(secret)
        assert key is not None
        keyring.admit(key)
        path.unlink()
        fresh = make(path)
        await until(lambda: keyring.find(fresh) is not None)
        assert keyring.find(secret) is None and ended == [key.id]
        keyring.release(key, 9)
        await until(lambda: not keyring._dirty)
        with sqlite3.connect(path) as connection:  # nobody there to be charged
            assert connection.execute("SELECT * FROM usage").fetchall() == []
        connection.close()


@pytest.mark.anyio
async def test_a_copy_written_over_the_file_is_seen_by_its_date(path: Path) -> None:
    """SQLite tells changes by a counter in the file: a copy may have the same one."""
    secret = make(path)
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    KeyStore(copy).revoke("team")
    before, after = path.read_bytes(), bytearray(copy.read_bytes())
    assert after[24:28] != before[24:28]
    after[24:28], after[92:96] = before[24:28], before[92:96]
    async with ring(path) as keyring:
        await asyncio.sleep(0.05)
        path.write_bytes(after)
        await until(lambda: keyring.find(secret) is None)


def test_usage_is_not_written_into_a_file_that_is_not_there_any_more(path: Path) -> None:
    make(path)
    file = KeyFile(path)
    used = {file.snapshot.by_id[key].key.id: Used(1, 50, 1.0) for key in file.snapshot.by_id}
    aside = path.rename(path.with_name("aside.db"))
    assert not file.write(used)
    shutil.copy(aside, path)
    assert not file.write(used)  # another file, until the next look
    assert file.look().snapshot is not None and file.write(used) and file.write(used)
    file.close()
    assert [KeyStore(one).list()[0].tokens for one in (path, aside)] == [50, 0]


@pytest.mark.anyio
async def test_a_disk_that_hangs_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, go_on, told = make(path), threading.Event(), list[str]()
    monkeypatch.setattr("agentopt.serving.keys._ring._SILENT", 0.2)
    keyring = StoredKeyring(path, poll=0.01, on_warning=told.append)
    look = keyring._file.look

    def hanging() -> Look:
        go_on.wait()
        return look()

    monkeypatch.setattr(keyring._file, "look", hanging)
    await keyring.start()
    await until(lambda: "has not answered for" in (keyring.trouble or ""))
    assert keyring.find(secret) is not None
    await keyring.close()
    assert "does not answer; what keys used last is lost" in told[-1]
    go_on.set()
    await until(lambda: all(thread.name != "agentopt-keys" for thread in threading.enumerate()))
    keyring._file.close()


@pytest.mark.anyio
async def test_warnings_go_where_they_are_wanted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(path)
    told: list[tuple[str, bool]] = []
    here = asyncio.get_running_loop()

    def tell(text: str) -> None:
        told.append((text, asyncio.get_running_loop() is here))

    path.chmod(0o666)
    async with StoredKeyring(path, poll=0.01, on_warning=tell):
        path.unlink()
        await until(lambda: len(told) == 2)
    assert "chmod 600" in told[0][0] and "the key file is gone" in told[1][0]
    assert all(on_loop for _, on_loop in told) and not caplog.records


@pytest.mark.anyio
async def test_what_could_not_be_written_is_said_at_the_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = make(path)
    keyring = ring(path)
    await keyring.start()
    key = keyring.find(secret)
    assert key is not None
    path.unlink()
    keyring.admit(key)
    keyring.release(key, 5)
    await keyring.close()
    assert any("could not be written and is lost" in record.getMessage() for record in caplog.records)


@pytest.mark.anyio
async def test_ten_thousand_keys(path: Path) -> None:
    make(path)
    rows = [(f"k-{n:010x}", f"n{n}", hash_of(f"s{n}"), '["*"]', None, None, 100, None, 1.0 + n) for n in range(10_000)]
    with sqlite3.connect(path) as connection:
        connection.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)", rows)
    connection.close()
    async with ring(path) as keyring:
        assert keyring.known == 10_001
        for n in range(0, 10_000, 7):
            key = keyring.find(f"s{n}")
            assert key is not None and key.name == f"n{n}"
            keyring.admit(key)
            keyring.release(key, n % 100)
        KeyStore(path).revoke("n7")
        await until(lambda: keyring.find("s7") is None)
    assert sum(one.tokens for one in KeyStore(path).list()) == sum(n % 100 for n in range(0, 10_000, 7))


@pytest.mark.anyio
async def test_a_file_that_others_may_write_is_warned_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(path)
    path.chmod(0o666)
    await ring(path).close()
    assert "chmod 600" in caplog.text
