"""The store: what is put in comes out, in any process, after any kill, and every failure is one sentence."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import AgentoptError, UserError
from agentopt.store import Store, StoreError
from agentopt.store._connect import migrations

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PAYLOAD = st.dictionaries(st.text(max_size=8), JSON, max_size=5)


def evaluation(example: str, **more: Any) -> dict[str, Any]:
    return {
        "candidate_hash": "c",
        "dataset_id": "d",
        "example_id": example,
        "repeat": 0,
        "seed": 0,
        "score": 1.0,
        **more,
    }


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@settings(max_examples=40, deadline=None)
@given(payload=PAYLOAD)
def test_every_json_payload_comes_back_equal(payload: dict[str, Any]) -> None:
    with Store.open(":memory:") as store:
        store.create_run("run", payload)
        store.update_run("run", summary=payload)
        store.append_event("run", "kind", payload)
        store.put_candidate("run", "c", payload)
        store.put_trace("run", "t", payload)
        store.put_capsule("key", payload)
        store.put_reply("ab" * 32, payload, model="m", request=payload)
        row = store.run("run")
        assert row is not None and row.config == row.summary == payload
        assert [event.payload for event in store.events("run")] == [payload]
        assert store.candidates("run") == {"c": payload}
        assert store.trace("t") == store.get_capsule("key") == store.get_reply("ab" * 32) == payload


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:
        store.put_reply("k", {"text": "\ud83d"}, model="m")
        assert store.get_reply("k") == {"text": "\ud83d"}


def test_evaluations_are_upserted_by_their_key_and_filtered() -> None:
    with Store.open(":memory:") as store:
        store.put_evaluations("run", [evaluation("a"), evaluation("b"), evaluation("a", candidate_hash="other")])
        store.put_evaluations("run", [evaluation("a", score=0.25)])
        rows = store.evaluations("run", "c", "d")
        assert {row["example_id"]: row["score"] for row in rows} == {"a": 0.25, "b": 1.0}
        assert len(store.evaluations("run")) == 3
        assert store.evaluations("other run") == []


def test_equal_example_ids_of_two_datasets_do_not_cross_gepa_425() -> None:
    with Store.open(":memory:") as store:
        store.put_evaluations(
            "run", [evaluation("0", dataset_id="train"), evaluation("0", dataset_id="val", score=0.0)]
        )
        assert [row["score"] for row in store.evaluations("run", "c", "val")] == [0.0]


def test_event_numbers_follow_the_order_of_the_calls_also_within_one_commit() -> None:
    with Store.open(":memory:") as store:
        numbers: list[tuple[int, int]] = []

        def append(value: int) -> None:
            numbers.append((store.append_event("run", "k", {"value": value}), value))

        threads = [threading.Thread(target=append, args=(value,)) for value in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        by_seq = {event.seq: event.payload["value"] for event in store.events("run")}
        assert by_seq == dict(numbers)
        last = max(by_seq)
        assert [event.seq for event in store.events("run", after=last - 1)] == [last]


def test_runs_are_found_by_a_unique_prefix() -> None:
    with Store.open(":memory:") as store:
        store.create_run("abc-1", {})
        store.create_run("abd-2", {})
        assert getattr(store.run("abc"), "id", None) == "abc-1"
        assert store.run("x") is None
        assert store.run("") is None
        with pytest.raises(UserError, match="beginning of 2 runs"):
            store.run("ab")
        with pytest.raises(UserError, match="already has a run 'abc-1'"):
            store.create_run("abc-1", {})
        store.update_run("abc-1", status="done")
        assert [(row.id, row.status) for row in store.runs()] == [("abc-1", "done"), ("abd-2", "running")]


@pytest.mark.anyio
async def test_64_concurrent_replies_share_commits_and_are_durable(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store.open(path) as store:

        async def put(number: int) -> None:
            await store.aput_reply(f"{number}", {"n": number}, model="m", request={"n": number})
            with sqlite3.connect(path) as other:  # another connection sees it at once
                assert other.execute("SELECT count(*) FROM replies WHERE key = ?", (str(number).encode(),)).fetchone()[
                    0
                ]
            other.close()

        async with anyio.create_task_group() as tasks:
            for number in range(64):
                tasks.start_soon(put, number)
        assert store.get_reply("63") == {"n": 63}


@pytest.mark.anyio
async def test_a_cancelled_waiter_leaves_the_writer_working() -> None:
    with Store.open(":memory:") as store:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await store.aput_reply("a", {}, model="m")
        await store.aput_reply("b", {"b": 1}, model="m")
        assert store.get_reply("b") == {"b": 1}


def test_several_processes_write_and_read_at_the_same_time(tmp_path: Path) -> None:
    code = """
import sys
from agentopt.store import Store
path, name = sys.argv[1:]
with Store.open(path) as store:
    for number in range(50):
        store.put_reply(f"{name}-{number}", {"n": number}, model="m")
        assert store.get_reply(f"{name}-{number}") == {"n": number}
    store.append_event("run", name, {})
"""
    path = str(tmp_path / "s.db")
    writers = [subprocess.Popen([sys.executable, "-c", code, path, name]) for name in ("a", "b", "c")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with Store.open(path) as store:
        assert all(store.get_reply(f"{name}-{number}") for name in "abc" for number in range(50))
        assert len(store.events("run")) == 3


def test_kill_9_while_writing_leaves_a_readable_store_with_every_acknowledged_reply(tmp_path: Path) -> None:
    code = """
import sys
from agentopt.store import Store
store = Store.open(sys.argv[1])
for number in range(100000):
    store.put_trace("run", str(number), {"x": "y" * 2000})
    store.put_reply(str(number), {"n": number}, model="m")
    print(number, flush=True)
"""
    path = str(tmp_path / "s.db")
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = -1
        for line in process.stdout:
            last = int(line)
            if last >= 25:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    with Store.open(path) as store:
        assert [store.get_reply(str(number)) for number in range(last + 1)] == [{"n": n} for n in range(last + 1)]
        assert store.trace("0") == {"x": "y" * 2000}
        store.put_reply("after", {}, model="m")


def test_rows_queued_by_a_program_that_never_closes_are_kept(tmp_path: Path) -> None:
    code = """
import sys
from agentopt.store import Store
store = Store.open(sys.argv[1])
store.put_candidate("run", "c", {"v": 1})
"""
    done = run_python(code, str(tmp_path / "s.db"))
    assert (done.returncode, done.stderr) == (0, "")
    with Store.open(tmp_path / "s.db") as store:
        assert store.candidates("run") == {"c": {"v": 1}}


def test_disk_full_is_one_sentence_for_the_waiter_and_for_everybody_after(tmp_path: Path) -> None:
    with Store.open(tmp_path / "s.db") as store:
        store._writer._connection.execute("PRAGMA max_page_count = 30")
        with pytest.raises(StoreError, match=r"disk that holds the store .*s\.db is full; free some space"):
            for number in range(200):
                store.put_reply(str(number), {"text": "x" * 4000}, model="m")
        with pytest.raises(StoreError, match="is full"):
            store.put_candidate("run", "c", {})
        assert store.get_reply("0") is not None, "what was acknowledged stays readable"
        with pytest.raises(StoreError, match="is full"):
            store.close()


def test_a_file_size_limit_is_one_sentence(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from agentopt.errors import AgentoptError
from agentopt.store import Store
store = Store.open(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    for number in range(500):
        store.put_reply(str(number), {"text": "x" * 4000}, model="m")
except AgentoptError as error:
    print(error)
    raise SystemExit(7)
"""
    done = run_python(code, str(tmp_path / "s.db"))
    assert done.returncode == 7, done.stderr
    assert done.stdout.count("\n") == 1 and "s.db" in done.stdout and "space" in done.stdout


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    Store.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(UserError, match="schema version 999; this agentopt knows versions up to"):
        Store.open(path)


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(UserError, match="of another program"):
        Store.open(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]
    connection.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all, just text" * 100, b"SQLite format 3\x00" + b"\xff" * 5000]
)
def test_a_file_that_is_no_store_is_one_sentence_with_the_fix(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(content)
    with pytest.raises(AgentoptError, match=r"s\.db .*(AGENTOPT_DB|move it away)"):
        Store.open(path)


def test_a_damaged_page_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with Store.open(path) as store:
        store.put_evaluations("run", [evaluation(str(number), text="x" * 300) for number in range(500)])
    data = bytearray(path.read_bytes())
    data[8192 : len(data) - 4096] = b"\xa5" * (len(data) - 12288)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"), Store.open(path) as store:
        store.evaluations("run")
        store.traces("run")
        store.events("run")


def test_a_folder_or_an_impossible_path_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        Store.open(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be made"):
        Store.open(tmp_path / "file" / "deeper" / "s.db")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s.db")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.runs()
    with pytest.raises(StoreError, match="is closed"):
        store.put_candidate("run", "c", {})


def test_the_default_path_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open() as store:
        assert store.path == ".agentopt/agentopt.db"
    monkeypatch.setenv("AGENTOPT_DB", str(tmp_path / "elsewhere.db"))
    with Store.open() as store:
        assert store.path == str(tmp_path / "elsewhere.db")


def test_a_row_without_json_form_is_refused_before_it_is_queued() -> None:
    with Store.open(":memory:") as store:
        with pytest.raises(TypeError):
            store.put_candidate("run", "c", {"x": object()})
        store.put_candidate("run", "c", {"x": 1})
        assert store.candidates("run") == {"c": {"x": 1}}


@pytest.mark.anyio
async def test_captured_exchanges_and_feedback_come_back_in_order() -> None:
    with Store.open(":memory:") as store:
        store.put_exchange("run", "b", "trace", {"model": "m"})
        store.put_exchange("run", "a", "trace", {"model": "n"})
        store.put_exchange("other", "c", "t2", {})
        assert [row["id"] for row in store.exchanges()] == ["b", "a", "c"]
        assert [row["trace_id"] for row in store.exchanges("other")] == ["t2"]
        await store.aput_feedback("run", "a", {"score": 1.0})
        await store.aput_feedback("run", "gone", {"score": 0.5})
        assert [row["id"] for row in store.exchanges(rated=True)] == ["a"]
        assert [row["score"] for row in store.feedback(run_id="run")] == [1.0, 0.5]
        assert [row["exchange_id"] for row in store.feedback("gone")] == ["gone"]
        found = store.exchange("b")
        assert found is not None and found["model"] == "m" and store.exchange("x") is None


def test_a_store_of_the_first_version_is_migrated_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(migrations()[1])
        connection.execute("INSERT INTO traces VALUES ('t', 'run', 1.0, ?)", (zlib.compress(b'{"x": 1}'),))
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA application_id = 0x41474F50")
    connection.close()
    with Store.open(path) as store:
        assert store.trace("t") == {"x": 1}
        store.put_exchange("run", "e", "t", {})
        assert store.exchange("e") is not None


def test_migrations_are_numbered_without_gaps() -> None:
    assert list(migrations()) == list(range(1, len(migrations()) + 1))


def test_64_candidates_on_1000_examples_stay_under_200_mb(tmp_path: Path) -> None:
    reply = {"text": "billing", "tool_calls": [], "usage": {"input_tokens": 300}, "cost": 0.0, "model": "m"}
    turns = [
        {"role": "user", "content": f"example {n}: " + "a ticket that a customer wrote in some words " * 12}
        for n in range(7)
    ]
    request = {"model": "m", "messages": turns, "options": {"temperature": 0.0, "max_tokens": 512}}
    trace = {
        "records": [{"id": n, "op": "classify", "inputs": {"ticket": "words " * 60}, "output": "x"} for n in range(6)]
    }
    rows = 1000  # a 64th of the run
    with Store.open(tmp_path / "s.db") as store:
        for number in range(rows):
            feedback = "Expected 'billing', but the output is 'shipping'."
            store.put_evaluations("run", [evaluation(f"{number:016x}", output="shipping", feedback=feedback)])
            if number % 2:  # failures
                store.put_trace("run", f"{number:016x}", {**trace, "seed": number})
        store.flush()
        for chunk in range(0, rows, 250):
            statement_rows = [(f"{n:064x}", reply, {**request, "sample": n}) for n in range(chunk, chunk + 250)]
            threads = [
                threading.Thread(target=store.put_reply, args=(key, body), kwargs={"model": "m", "request": asked})
                for key, body, asked in statement_rows
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    size = (tmp_path / "s.db").stat().st_size
    assert size * 64 < 200e6, json.dumps({"bytes": size})
