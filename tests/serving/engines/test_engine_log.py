"""The engine's log: bounded, without the token, and no reason to stop serving when it cannot be written."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from pathlib import Path

import pytest

from agentopt.serving.engines import Event, Warned
from agentopt.serving.engines._log import EngineLog
from tests.serving.engines.running import tiny, watched

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.mark.anyio
async def test_log_is_rotated_and_never_holds_the_token(tmp_path: Path) -> None:
    run = tmp_path / "run"
    engine, _ = watched(tiny("--does", "talks"), run, log_bytes=40_000, log_files=3)
    async with engine:
        await engine.ready()
        token = engine.address.token
        assert token
        assert any(line.startswith("line 3999") for line in engine.log_tail(50))
        assert "my token is ***" in engine.log_tail(50)
    files = sorted(file.name for file in run.glob("engine.log*"))
    assert files == ["engine.log", "engine.log.1", "engine.log.2"]
    assert all(0 < (run / name).stat().st_size <= 40_000 for name in files)
    assert stat.S_IMODE((run / "engine.log").stat().st_mode) == 0o600
    text = (run / "engine.log").read_text(encoding="utf-8")
    assert "my token is ***" in text and token not in text


@needs_full
@pytest.mark.anyio
async def test_engine_serves_while_the_disk_is_full(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "engine.log").symlink_to(FULL)
    engine, told = watched(tiny("--does", "talks"), run, log_bytes=40_000)
    async with engine:
        await engine.ready()  # it wrote far more than a pipe holds: all of it was read
        assert any(line.startswith("line 3999") for line in engine.log_tail(50))
    assert any(
        "lines could not be written (disk full?)" in event.message for event in told if isinstance(event, Warned)
    )


@needs_full
@pytest.mark.anyio
async def test_disk_that_gets_full_while_it_serves_is_told_once(tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    engine, told = watched(tiny("--sick", str(sick)), tmp_path / "run")
    async with engine:
        await engine.ready()
        with FULL.open("ab") as file:
            os.dup2(file.fileno(), _descriptor(tmp_path / "run" / "engine.log"))
        for count in (1, 2):
            (tmp_path / "new").write_text("once", encoding="utf-8")
            os.replace(tmp_path / "new", sick)
            while engine.log_tail().count("well again") < count or not _warned(told):
                await asyncio.sleep(0.01)
        assert engine.generation == 1
    assert len(_warned(told)) == 1


def _warned(told: list[Event]) -> list[str]:
    return [event.message for event in told if isinstance(event, Warned)]


def _descriptor(path: Path) -> int:
    """By which this process holds an open file."""
    return next(int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.readlink() == path)


def _log(place: Path, *, limit: int = 1000, files: int = 3) -> EngineLog:
    return EngineLog(place / "engine.log", limit=limit, files=files)


@needs_full
def test_what_a_full_disk_stops_is_counted_and_what_follows_is_written(tmp_path: Path) -> None:
    (tmp_path / "engine.log").symlink_to(FULL)
    log = _log(tmp_path, limit=200_000)
    for number in range(300):  # more than any buffer holds
        log.feed(f"lost {number} {'x' * 100}\n".encode())
    assert log.dropped == 300 and log.tail(1)[0].startswith("lost 299")
    with (tmp_path / "room").open("ab") as file:  # the same open file, on a disk with room again
        os.dup2(file.fileno(), _descriptor(FULL))
    log.feed(b"kept\n")
    log.close()
    assert log.dropped == 300
    assert (tmp_path / "room").read_text(encoding="utf-8") == "kept\n"


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs pipes of a chosen size")
def test_half_a_line_is_a_lost_one(tmp_path: Path) -> None:
    log = _log(tmp_path, limit=200_000)
    log.feed(b"one\n")
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)  # like a disk with room for a part of a line
    os.set_blocking(writing, False)
    os.dup2(writing, _descriptor(tmp_path / "engine.log"))
    log.feed(b"x" * 6000 + b"\n")
    log.close()
    os.close(reading)
    os.close(writing)
    assert log.dropped == 1


def test_folder_that_is_gone_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    log = _log(tmp_path / "gone")
    log.feed(b"one\ntwo\n")
    assert (log.dropped, log.tail()) == (2, ["one", "two"])
    (tmp_path / "gone").mkdir()
    log.feed(b"three\n")
    log.close()
    assert (tmp_path / "gone" / "engine.log").read_bytes() == b"three\n"


def test_lines_come_in_pieces_and_long_ones_are_cut(tmp_path: Path) -> None:
    heard: list[str] = []
    log = EngineLog(tmp_path / "engine.log", limit=1 << 20, files=1, on_line=heard.append)
    for piece in (b"o", b"ne\nt", b"wo\r\nthree \xff", b"!\n", b"z" * 20_000, b"\nlast"):
        log.feed(piece)
    log.close()
    assert [line for line in heard if "z" not in line] == ["one", "two", "three \ufffd!", "last"]
    long = [line for line in heard if "z" in line]
    assert "".join(long) == "z" * 20_000 and max(map(len, long)) <= 8192
    assert len((tmp_path / "engine.log").read_bytes().splitlines()) == len(heard)
