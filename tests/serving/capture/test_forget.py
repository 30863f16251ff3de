"""Forgetting: what is too old or asked for goes, whole, also while a server writes; the rest stays and agrees."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentopt.graph import Trace
from agentopt.serving._types import Key, Refusal
from agentopt.serving.capture import Capturing, Chosen, FeedbackStore, Recorder, forget, forget_old
from agentopt.store import Forgotten, Store
from tests.serving.capture.kit import answer, exchange, put

pytestmark = pytest.mark.anyio
DAY = 86_400.0


async def until(done: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not done():
            await anyio.sleep(0.02)


@asynccontextmanager
async def running(path: Path, **options: Any) -> AsyncGenerator[tuple[Recorder, FeedbackStore]]:
    """A recorder between its start and its end, and where its feedback goes."""
    recorder = Recorder(path, **options)
    recorder.start()
    try:
        yield recorder, FeedbackStore(recorder)
        assert await recorder.settled(120)
    finally:
        assert await recorder.aclose() == 0


def opened(recorder: Recorder) -> Store:
    assert recorder.store is not None
    return recorder.store


def age(path: Path, *ids: str, days: float = 100) -> None:
    """As if these exchanges, and what was said of them, had come so many days ago."""
    with sqlite3.connect(path, timeout=30) as connection:
        for one in ids:
            connection.execute("UPDATE exchanges SET created = created - ? WHERE id = ?", (days * DAY, one))
            connection.execute("UPDATE feedback SET time = time - ? WHERE exchange_id = ?", (days * DAY, one))
            connection.execute("UPDATE traces SET created = created - ? WHERE id = ?", (days * DAY, one))
    connection.close()


def agreed(path: Path) -> set[str]:
    """The exchanges in the store, after a look whether each is in its trace and each call of a trace has one."""
    with Store.open(path) as store:
        found = store.exchanges()
        calls: set[tuple[str, str]] = set()
        for run in store.traffic_runs():
            for trace_id in store.traces(run):
                trace = Trace.from_dict(store.trace(trace_id) or {})
                calls |= {(trace_id, (op.meta or {})["request_id"]) for op in trace.find(kind="lm")}
        assert {(row["trace_id"], row["id"]) for row in found} == calls
        ids = {row["id"] for row in found}
        assert {row["exchange_id"] for row in store.feedback()} <= ids
        return ids


async def test_what_is_too_old_goes_at_the_start_and_again_later(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    singles = [exchange(f"single {place}") for place in range(3)]
    turns = [exchange(f"turn {place}", session="s") for place in range(3)]
    async with running(path) as (first, sink):
        for place, turn in enumerate(turns):
            put(first, turn, reply=answer(f"reply {place}"))
        put(first, *singles)
        assert await first.settled(120)
        await sink.give({"request_id": singles[0].id, "text": "said of the old one"}, None)
        await sink.give({"request_id": singles[2].id, "text": "said of the new one"}, None)
        notkept = exchange("never stored")
        first.wants_reply(notkept)
        await sink.give({"request_id": notkept.id, "text": "said of nothing"}, None)
    with Store.open(path) as store:
        store.create_run("empty", {"kind": "serve"}, status="done")
        store.create_run("tuning", {"program": "p"})
        store.put_trace("tuning", "mine", {"old": True})
    age(path, singles[0].id, turns[0].id, turns[2].id, notkept.id)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET created = 0 WHERE id IN ('empty', 'tuning')")
        connection.execute("UPDATE traces SET created = 0 WHERE id = 'mine'")
    connection.close()

    async with running(path, days=30.0, limits=Capturing(forget_every=0.05)) as (recorder, sink):
        store = opened(recorder)
        await until(lambda: store.run("empty") is None)
        assert {row["id"] for row in store.exchanges()} == {turns[1].id, singles[1].id, singles[2].id}
        assert [row["text"] for row in store.feedback()] == ["said of the new one"]
        trace = Trace.from_dict(store.trace((store.exchange(turns[1].id) or {})["trace_id"]) or {})
        assert [(op.kind, op.output, op.parent_op) for op in trace.ops] == [
            ("lm", "reply 1", 1),
            ("agent", "reply 1", None),
        ]
        assert store.trace("mine") == {"old": True} and store.run("tuning") is not None
        assert store.run(recorder.run_id) is not None and store.run(first.run_id) is not None
        with pytest.raises(Refusal) as refusal:
            await sink.give({"request_id": singles[0].id, "score": 1}, None)
        assert refusal.value.status == 404
        age(path, singles[1].id)
        await until(lambda: store.exchange(singles[1].id) is None)
        await until(lambda: recorder.status()["forgotten"] == 4)
    assert agreed(path) == {turns[1].id, singles[2].id}


@pytest.mark.parametrize("at_once", [False, True], ids=["before", "while it is written"])
async def test_what_is_deleted_from_an_open_session_does_not_come_back(tmp_path: Path, at_once: bool) -> None:
    path = tmp_path / "s.db"
    turns = [exchange(f"turn {place}", session="s") for place in range(4)]

    class Meddled(Store):
        """Somebody deletes the first turn just when the trace that still has it is about to be written."""

        armed = False

        def put_trace(self, run_id: str, trace_id: str, payload: dict[str, Any]) -> None:
            if self.armed:
                self.armed = False
                self.flush()
                delete(turns[0].id)
            super().put_trace(run_id, trace_id, payload)

    def delete(*requests: str) -> None:
        with Store.open(path) as other:
            assert sum((part.exchanges for part in forget(other, Chosen(requests=requests))), 0) == len(requests)

    meddled = [Meddled.open(path)]
    async with running(path, opener=lambda: meddled[0]) as (recorder, sink):
        for turn in turns[:2]:
            put(recorder, turn)
            assert await recorder.settled(120)
        if at_once:
            meddled[0].armed = True
        else:
            delete(turns[0].id)
        put(recorder, turns[2])
        assert await recorder.settled(120)
        for _ in range(2):  # what was said of it is refused, and is not there
            with pytest.raises(Refusal) as refusal:
                await sink.give({"request_id": turns[0].id, "expected": "x"}, None)
            assert refusal.value.status == 404
        await sink.give({"request_id": turns[1].id, "score": 1}, None)
        assert agreed(path) == {turns[1].id, turns[2].id}
        delete(turns[1].id, turns[2].id)
        assert agreed(path) == set()
        put(recorder, turns[3])
    assert agreed(path) == {turns[3].id}


async def test_all_of_a_session_of_a_key_or_of_a_request_goes_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    one, two = Key("k1", "one"), Key("k2", "two")
    given = {
        name: exchange(name, session=session, key=key)
        for name, session, key in [
            ("a", "s", one),
            ("b", "s", two),
            ("c", "t", one),
            ("d", None, one),
            ("e", None, two),
        ]
    }
    ids = {name: item.id for name, item in given.items()}
    async with running(path) as (recorder, sink):
        put(recorder, *given.values())
        assert await recorder.settled(120)
        for name in "de":
            await sink.give({"request_id": ids[name], "score": 1}, two if name == "e" else one)
        store = opened(recorder)
        assert sum(forget(store, Chosen(session="s", key="k1")), Forgotten()) == Forgotten(1, 1)
        assert agreed(path) == {ids[name] for name in "bcde"}
        assert sum(forget(store, Chosen(requests=(ids["d"], "req_none"))), Forgotten()) == Forgotten(1, 1, 1)
        assert agreed(path) == {ids[name] for name in "bce"}
        assert sum(forget(store, Chosen(key="k2")), Forgotten()) == Forgotten(2, 2, 1)
        assert agreed(path) == {ids["c"]}
        assert sum(forget(store, Chosen(session="s", requests=(ids["c"],))), Forgotten()) == Forgotten()


async def test_deleting_while_a_server_writes_leaves_both_in_agreement(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    stop = threading.Event()
    gone = 0

    def delete() -> None:
        nonlocal gone
        with Store.open(path) as other:
            while not stop.is_set():
                gone += sum((part.exchanges for part in forget(other, Chosen(session="s1"))), 0)
                gone += sum((part.exchanges for part in forget_old(other, time.time() + 1)), 0)

    deleter = threading.Thread(target=delete)
    async with running(path) as (recorder, _):
        deleter.start()
        try:
            for _ in range(8):
                put(recorder, *[exchange("x", session=f"s{place}" if place else None) for place in range(4)])
                assert await recorder.settled(120)
            await until(lambda: gone > 0)
        finally:
            stop.set()
            deleter.join(60)
        assert recorder.captured == 32 and recorder.dropped == 0 and recorder.trouble is None
    assert gone and len(agreed(path)) == 32 - gone


def test_kill_9_between_two_batches_leaves_an_agreeing_store(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    code = """
import sys, time
from agentopt.serving.capture import Recorder, forget_old
from tests.serving.capture.kit import exchange, put
recorder = Recorder(sys.argv[1])
recorder.start()
put(recorder, *[exchange("hello", session=f"s{place // 50}" if place % 2 else None) for place in range(300)])
while recorder.queued:
    time.sleep(0.01)
for part in forget_old(recorder.store, time.time() + 1):
    print(part.exchanges, flush=True)
    if part.exchanges and sys.stdin.readline() == "":
        break
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        gone = int(process.stdout.readline())
        process.stdin.write("\n")
        process.stdin.flush()
        gone += int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    assert 0 < gone < 300 and len(agreed(path)) == 300 - gone
    with Store.open(path) as store:
        assert sum((part.exchanges for part in forget_old(store, time.time() + 1)), 0) == 300 - gone
    assert agreed(path) == set()


def test_a_trace_that_cannot_be_read_goes_with_all_its_exchanges(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store.open(path) as store:
        store.put_trace("run", "ses_1", {"format": "of tomorrow"})
        for name in "ab":
            store.put_exchange("run", name, "ses_1", {"session": "s"})
        store.put_exchange("run", "c", "ses_2", {"session": "s"})
        assert sum(forget(store, Chosen(requests=("a",))), Forgotten()).exchanges == 2
        assert store.trace("ses_1") is None and [row["id"] for row in store.exchanges()] == ["c"]


def test_nothing_of_it_is_left_in_the_file_and_its_space_is_given_back(tmp_path: Path) -> None:
    def fill(store: Store) -> list[str]:
        ids = [f"req_{place}" for place in range(100)]
        for name in ids:
            store.put_trace("run", name, {"text": os.urandom(8000).hex()})
            store.put_exchange("run", name, name, {"session": f"session-of-{name}"})
        store.flush()
        return ids

    new, old = tmp_path / "new.db", tmp_path / "old.db"
    connection = sqlite3.connect(old)
    connection.execute("PRAGMA auto_vacuum = NONE")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("DROP TABLE t")
    connection.close()
    sizes: dict[Path, list[int]] = {}
    for path in (new, old):
        with Store.open(path) as store:
            ids = fill(store)
        full = path.stat().st_size
        with Store.open(path) as store:
            assert sum((part.exchanges for part in forget(store, Chosen(before=time.time() + 1))), 0) == len(ids)
            while store.release():
                pass
        left = path.stat().st_size
        assert b"session-of-req" not in path.read_bytes()
        with Store.open(path) as store:
            store.compact()
        sizes[path] = [full, left, path.stat().st_size]
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,), "from now on pages can be given back"
        connection.close()
    assert sizes[new][1] < sizes[new][0] / 5, "given back as it was deleted"
    assert sizes[old][1] > sizes[old][0] / 2 and sizes[old][2] < sizes[old][0] / 5, "an older file when it is rewritten"
