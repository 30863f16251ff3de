"""The recorder: what goes through a gateway is in the store, what does not fit is counted, and nothing ever blocks."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES, Key
from agentopt.serving.capture import Capturing, Recorder, Redaction
from agentopt.store import Store, StoreError
from tests.serving.capture.kit import answer, captured, exchange, put, traces
from tests.serving.gateway.kit import Ring, until

pytestmark = pytest.mark.anyio


async def test_every_route_whole_and_streamed_becomes_a_trace(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db", model="fake")
    said = "the quick brown fox"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": said}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": turns, "temperature": 0.5, "user": "someone"}),
        (COMPLETIONS, {"prompt": said}),
        (RESPONSES, {"instructions": "be brief", "input": said}),
        (MESSAGES, {"system": "be brief", "messages": turns[1:], "max_tokens": 50}),
    ]
    async with captured(recorder) as (here, _):
        for route, body in bodies:
            for stream in (False, True):
                done = await here.ask(route, **body, stream=stream)
                assert done.status_code == 200, done.text
                assert done.headers["x-agentopt-feedback"] == "/v1/feedback"
        await here.ask(EMBEDDINGS, input=said)
    found = [trace.ops[0] for trace in traces(recorder.store_path, recorder.run_id)]
    assert recorder.captured == len(found) == 8
    for op in found:
        assert (op.kind, op.output, op.error) == ("lm", said, None)
        assert op.usage is not None and op.usage.input_tokens > 0 and op.usage.output_tokens == 4
        assert op.meta is not None and op.meta["model"] == "fake" and "reply" not in op.meta
        assert op.duration is not None and op.duration > 0
        assert op.inputs == ({"prompt": said} if op.meta["route"] == COMPLETIONS else {"messages": turns})
    assert found[0].meta is not None and found[0].meta["sampling"] == {"temperature": 0.5}
    assert "someone" not in str([op.to_dict() for op in found]), "who the user is, is not kept"
    with Store.open(recorder.store_path) as store:
        run = store.run(recorder.run_id)
        assert run is not None and (run.status, run.summary["captured"]) == ("done", 8)


async def test_a_session_is_one_trace_with_edges(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    async with captured(recorder) as (here, _):
        headers = {"X-Agentopt-Session": "run-7"}
        first = await here.ask(headers=headers, messages=[{"role": "user", "content": "plan the whole trip"}])
        said = first.json()["choices"][0]["message"]["content"]
        turns = [{"role": "user", "content": "book it"}, {"role": "assistant", "content": said}]
        await here.ask(headers=headers, messages=[*turns, {"role": "user", "content": "now"}])
        await here.ask(headers=headers, messages=[{"role": "user", "content": "else"}])
        await here.ask(headers={"X-Agentopt-Session": "run-8"})
    first_trace, other = sorted(traces(recorder.store_path, recorder.run_id), key=len, reverse=True)
    assert [op.kind for op in first_trace.ops] == ["lm", "lm", "lm", "agent"]
    assert first_trace.ops[1].parents == ((0, "text"),)
    assert first_trace.ops[2].parents == ((1, "after"),)
    assert [op.parent_op for op in first_trace.ops] == [3, 3, 3, None]
    assert first_trace.ops[3].meta == {"session": "run-7"} and len(other) == 2
    assert first_trace.usage.calls == 3


async def test_failures_and_broken_off_streams_say_what_they_are(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    async with captured(recorder) as (here, _):
        await here.ask(fake={"status": 400})
        await here.ask(stream=True, fake={"die_after": 2})
        await here.ask(model="nobody")  # refused before any engine: not captured
    refused, broken = [trace.ops[0] for trace in traces(recorder.store_path, recorder.run_id)]
    assert refused.error is not None and refused.error.message
    assert broken.error is not None and broken.error.type == "engine_died"
    assert (broken.output or "").strip() == "hello wide"
    assert broken.meta is not None and broken.meta["reply"] == "broken off"


async def test_tool_calls_several_choices_and_secrets(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    asked = exchange("I am me@example.com", session="s.4111111111111111")
    asked.body["tools"] = [{"type": "function", "function": {"name": "mail", "description": "to me@example.com"}}]
    asked.body["metadata"] = {"who": "me@example.com"}
    call = {"function": {"name": "mail", "arguments": '{"to": "me\\u0040example.com", "card": 4111111111111111}'}}
    choices = [
        {"index": 0, "message": {"content": None, "tool_calls": [call]}},
        {"index": 1, "message": {"content": "b"}},
    ]
    recorder.start()
    put(recorder, asked, reply=json.dumps({"choices": choices}).encode())
    assert recorder.close() == 0
    (trace,) = traces(recorder.store_path, recorder.run_id)
    op = trace.ops[0]
    assert op.output["tool_calls"][0]["arguments"] == {"to": "[email]", "card": "[card]"}
    assert op.meta is not None and op.meta["other_choices"] == ["b"]
    stored = json.dumps(trace.to_dict())
    assert "[email]" in stored and "me@" not in stored and "4111" not in stored


async def test_who_opts_out_is_not_captured_and_sessions_are_sampled_whole(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db", sample=0.5)
    async with captured(recorder) as (here, _):
        await here.ask(headers={"X-Agentopt-Capture": "off", "X-Agentopt-Session": "a"})
        for number in range(24):
            for _turn in range(2):
                await here.ask(headers={"X-Agentopt-Session": f"s{number}"})
    sizes = [len(trace.find(kind="lm")) for trace in traces(recorder.store_path, recorder.run_id)]
    assert set(sizes) == {2} and 4 < len(sizes) < 20
    with pytest.raises(UserError, match="more than 0"):
        Recorder(tmp_path / "s.db", sample=0)


async def test_sessions_are_bounded_and_end_by_themselves(tmp_path: Path) -> None:
    limits = Capturing(sessions=3, session_calls=4, session_idle=0.05)
    recorder = Recorder(tmp_path / "s.db", limits=limits)
    recorder.start()
    put(recorder, *[exchange(session="long") for _ in range(10)])
    put(recorder, *[exchange(session=f"s{number}") for number in range(20)])
    assert await recorder.settled()
    await until(lambda: recorder.status()["sessions"] == 0)
    put(recorder, exchange(session="long"))
    assert recorder.close() == 0
    sizes = sorted(len(trace.find(kind="lm")) for trace in traces(recorder.store_path, recorder.run_id))
    assert sizes == [1] * 21 + [2, 4, 4]
    assert recorder.captured == 31


async def test_sessions_of_two_keys_do_not_mix(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    ring = Ring(one=Key("k1", "one"), two=Key("k2", "two"))
    async with captured(recorder, keyring=ring) as (here, _):
        for secret in ("one", "two", "one"):
            await here.ask(headers={"Authorization": f"Bearer {secret}", "X-Agentopt-Session": "same"})
    assert sorted(len(trace.find(kind="lm")) for trace in traces(recorder.store_path, recorder.run_id)) == [1, 2]


async def test_a_reply_or_an_exchange_that_is_too_long(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db", limits=Capturing(exchange_bytes=1000))
    recorder.start()
    long = exchange()
    recorder.wants_reply(long)
    recorder.ended(long, None)
    put(recorder, exchange("x" * 2000))
    assert recorder.close() == 0
    (trace,) = traces(recorder.store_path, recorder.run_id)
    assert trace.ops[0].output is None and (trace.ops[0].meta or {})["reply"] == "longer than what is kept"
    assert recorder.drops == {"too large": 1}


class Broken:
    """Opens the store; while `failing` every write to it raises, as with a full disk."""

    def __init__(self, path: Path, *, opens: bool = False) -> None:
        self.path = path
        self.failing = False
        self.opens = opens
        self.opened = 0

    def __call__(self) -> Store:
        self.opened += 1
        if self.failing and not self.opens:
            raise StoreError("The disk that holds the store is full; free some space.")
        store = Store.open(self.path)
        for name in ("put_trace", "put_exchange", *(() if self.opens else ("flush",))):
            setattr(store, name, self._checked(getattr(store, name)))
        return store

    def _checked(self, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self.failing:
                raise StoreError("The disk that holds the store is full; free some space.")
            return method(*arguments)

        return call


async def test_a_full_disk_is_told_once_and_capture_goes_on_when_there_is_room(tmp_path: Path) -> None:
    told: list[str] = []
    opener = Broken(tmp_path / "s.db")
    recorder = Recorder(opener=opener, limits=Capturing(queue=30), on_warning=told.append, on_news=told.append)
    recorder.start()
    put(recorder, exchange())
    assert await recorder.settled()
    opener.failing = True
    for _ in range(200):
        put(recorder, exchange())
    await until(lambda: recorder.trouble is not None)
    put(recorder, *[exchange() for _ in range(200)])
    assert recorder.store is None
    opener.failing = False
    assert await recorder.settled()
    assert recorder.close() == 0 and recorder.trouble is None
    assert recorder.captured + recorder.dropped == 401
    assert recorder.dropped > 200 and set(recorder.drops) == {"queue full"}
    assert len(told) == 2 and "disk" in told[0] and "goes on" in told[1]
    assert len(traces(str(tmp_path / "s.db"), recorder.run_id)) == recorder.captured


async def test_sqlite_finds_the_disk_full_and_nothing_is_lost_when_room_is_made(tmp_path: Path) -> None:
    pages = [40]

    def opener() -> Store:
        store = Store.open(tmp_path / "s.db")
        if pages:  # the first time the file may not grow further
            store._writer._connection.execute(f"PRAGMA max_page_count = {pages.pop()}")
        return store

    told: list[str] = []
    recorder = Recorder(opener=opener, on_warning=told.append)
    recorder.start()
    put(recorder, *[exchange(os.urandom(800).hex()) for _ in range(300)])
    assert await recorder.settled()
    assert recorder.close() == 0 and recorder.captured == 300 and recorder.dropped == 0
    assert len(told) == 1 and "is full" in told[0]
    assert len(traces(str(tmp_path / "s.db"), recorder.run_id)) == 300


async def test_a_store_that_opens_but_takes_no_writes_is_told_of_once(tmp_path: Path) -> None:
    told: list[str] = []
    opener = Broken(tmp_path / "s.db", opens=True)
    recorder = Recorder(opener=opener, on_warning=told.append, on_news=told.append)
    recorder.start()
    opener.failing = True
    put(recorder, exchange())
    await until(lambda: opener.opened >= 2)
    assert len(told) == 1 and recorder.trouble is not None
    assert recorder.close() == 1 and recorder.captured == 0


async def test_requests_are_answered_while_the_store_fails(tmp_path: Path) -> None:
    opener = Broken(tmp_path / "s.db")
    recorder = Recorder(opener=opener)
    async with captured(recorder) as (here, _):
        opener.failing = True
        await here.ask()
        await until(lambda: recorder.trouble is not None)
        assert (await here.ask()).status_code == 200
        refused = await here.client.post("/v1/feedback", json={"request_id": "req_" + "0" * 32, "score": 1})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        opener.failing = False


async def test_a_start_on_a_full_disk_only_warns_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    told: list[str] = []
    opener = Broken(tmp_path / "s.db")
    opener.failing = True
    recorder = Recorder(opener=opener, on_warning=told.append)
    recorder.start()
    put(recorder, exchange())
    assert recorder.close() == 1, "what cannot be stored at the end is said to be lost"
    assert len(told) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder"):
        Recorder(tmp_path / "folder").start()
    (tmp_path / "notes.txt").write_text("This is no database at all, and longer than its header.")
    with pytest.raises(UserError, match=r"--capture: .*notes.txt is not an agentopt store"):
        Recorder(tmp_path / "notes.txt").start()
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8").startswith("This is"), "it is left as it was"


async def test_a_store_that_another_process_locks_is_waited_for(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    put(recorder, *[exchange() for _ in range(50)])
    await anyio.sleep(0.3)
    assert recorder.queued == 50
    other.execute("COMMIT")
    other.close()
    assert await recorder.settled()
    assert recorder.close() == 0 and recorder.captured == 50


async def test_a_burst_is_queued_or_dropped_and_counted_but_never_waited_for(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db", limits=Capturing(queue=500))
    recorder.start()
    put(recorder, *[exchange(f"text {number}", session=f"s{number % 50}") for number in range(3000)])
    assert recorder.close(60) == 0
    assert recorder.captured + recorder.dropped == 3000 and recorder.captured >= 500
    with Store.open(tmp_path / "s.db") as store:
        assert len(store.exchanges(recorder.run_id)) == recorder.captured


async def test_an_exchange_nobody_foresaw_is_counted_and_the_next_one_is_captured(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    strange = exchange()
    strange.body = {"messages": [{"role": "user", "content": object()}], "tools": 7}
    put(recorder, strange)
    broken = exchange()
    broken.use = 5  # type: ignore[assignment]  # whatever a later version of the gateway might do
    put(recorder, broken, exchange())
    assert recorder.close() == 0
    assert recorder.captured == 2 and recorder.drops == {"unreadable": 1}


async def test_own_redaction_patterns_are_applied(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db", redact=Redaction.of(["Falcon"]))
    recorder.start()
    put(recorder, exchange("about Falcon"), reply=answer("Falcon flies"))
    assert recorder.close() == 0
    (trace,) = traces(recorder.store_path, recorder.run_id)
    assert "Falcon" not in json.dumps(trace.to_dict()) and trace.output == "[redacted] flies"


def test_kill_9_leaves_what_was_stored(tmp_path: Path) -> None:
    code = """
import sys
from agentopt.serving.capture import Recorder
from tests.serving.capture.kit import exchange, put
recorder = Recorder(sys.argv[1])
recorder.start()
print(recorder.run_id, flush=True)
while True:
    put(recorder, exchange("hello"), exchange("hello", session="s"))
    while recorder.queued:
        pass
    print(recorder.captured, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s.db")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        counts = [int(process.stdout.readline()) for _ in range(3)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    found = traces(str(tmp_path / "s.db"), run_id)
    assert sum(len(trace.find(kind="lm")) for trace in found) >= counts[-1] == 6
