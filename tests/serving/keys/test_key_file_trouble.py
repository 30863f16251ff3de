"""The keyring of a running server, and whatever happens to its file meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from agentopt.serving.keys import KeyStore, StoredKeyring
from agentopt.serving.keys._file import hash_of
from agentopt.serving.keys._watch import KeyFile, Look, Used
from tests.serving.keys.rings import make, ring, until


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
