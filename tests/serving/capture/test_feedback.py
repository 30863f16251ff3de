"""Feedback: what a user may say, about which request, by whose key; durable, redacted, and the newest one counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agentopt.serving._types import Choice, Key, Refusal
from agentopt.serving.capture import FeedbackStore, GivenFeedback, Recorder
from agentopt.store import Store
from tests.serving.capture.kit import captured, exchange, put
from tests.serving.gateway.kit import Names, Ring

pytestmark = pytest.mark.anyio


async def test_feedback_by_http_is_stored_and_told_to_the_listeners(tmp_path: Path) -> None:
    told: list[GivenFeedback] = []
    recorder = Recorder(tmp_path / "s.db")
    names = Names({"triage": Choice("fake", variant="best")})
    async with captured(recorder, names=names) as (here, sink):
        sink.listeners.append(told.append)
        done = await here.ask(model="triage")
        request = done.headers["x-request-id"]
        given: list[dict[str, Any]] = [
            {"score": "down", "text": "ask me@example.com"},
            {"score": 0.5, "expected": "better"},
            {"expected": {"call": ["me@example.com"]}},
        ]
        said = None
        for body in given:
            said = await here.client.post("/v1/feedback", json={"request_id": request, **body})
            assert said.status_code == 200, said.text
        assert said is not None and said.json()["object"] == "feedback" and said.json()["expected"] is True
        assert list(sink.scores()) == [("triage", "best", 0.5)]
    assert [(item.score, item.before, item.variant) for item in told] == [
        (-1.0, None, "best"),
        (0.5, -1.0, "best"),
        (None, 0.5, "best"),
    ]
    with Store.open(tmp_path / "s.db") as store:
        rows = store.feedback(request)
    assert [row.get("text") for row in rows] == ["ask [email]", None, None]
    assert rows[2]["expected"] == {"call": ["[email]"]} and rows[0]["key"] is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "request_id"),
        ({"request_id": "req_" + "0" * 32}, "at least one"),
        ({"request_id": "req_" + "0" * 32, "score": 1.5}, "from -1 to 1"),
        ({"request_id": "req_" + "0" * 32, "score": True}, "from -1 to 1"),
        ({"request_id": "req_" + "0" * 32, "score": "great"}, "from -1 to 1"),
        ({"request_id": "req_" + "0" * 32, "text": 5}, "a text"),
        ({"request_id": "req_" + "0" * 32, "expected": "x" * 70_000}, "65536"),
        ({"request_id": "1; DROP TABLE feedback", "score": 1}, "request_id"),
        ({"request_id": "req_" + "0" * 32, "score": 1, "rating": 5}, "'rating'"),
    ],
)
async def test_malformed_feedback_is_refused_with_what_was_expected(
    body: dict[str, Any], said: str, tmp_path: Path
) -> None:
    sink = FeedbackStore(Recorder(tmp_path / "s.db"))
    with pytest.raises(Refusal, match=said) as refusal:
        await sink.give(body, None)
    assert refusal.value.status == 400


async def test_only_the_key_that_asked_may_speak_and_the_unknown_and_the_foreign_look_alike(tmp_path: Path) -> None:
    one, two = Key("k1", "one"), Key("k2", "two")
    recorder = Recorder(tmp_path / "s.db")
    async with captured(recorder, keyring=Ring(one=one, two=two)) as (here, sink):
        done = await here.ask(headers={"Authorization": "Bearer one"})
        hidden = await here.ask(headers={"Authorization": "Bearer one", "X-Agentopt-Capture": "no"})
        request = done.headers["x-request-id"]
        refusals: list[str] = []
        for request_id, key in ((request, two), (request, None), ("req_" + "0" * 32, one)):
            with pytest.raises(Refusal) as refusal:
                await sink.give({"request_id": request_id, "score": 1}, key)
            assert refusal.value.status == 404
            refusals.append(str(refusal.value).replace(request_id, ""))
        assert len(set(refusals)) == 1
        with pytest.raises(Refusal):
            await sink.give({"request_id": hidden.headers["x-request-id"], "score": 1}, one)
        assert (await sink.give({"request_id": request, "score": 1}, one))["score"] == 1.0


async def test_feedback_on_the_traffic_of_an_earlier_server_and_on_what_was_not_sampled(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "s.db")
    first.start()
    asked = exchange()
    put(first, asked)
    assert first.close() == 0
    second = Recorder(tmp_path / "s.db", sample=1e-9)
    second.start()
    unsampled = exchange()
    put(second, unsampled)
    sink = FeedbackStore(second)
    for request in (asked.id, unsampled.id):
        await sink.give({"request_id": request, "score": "up"}, None)
    assert second.captured == 0 and second.close() == 0
    with Store.open(tmp_path / "s.db") as store:
        assert {row["exchange_id"] for row in store.feedback()} == {asked.id, unsampled.id}
        assert [row["id"] for row in store.exchanges(rated=True)] == [asked.id]


async def test_feedback_on_one_request_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    asked = exchange()
    put(recorder, asked)
    sink = FeedbackStore(recorder)
    for _ in range(16):
        await sink.give({"request_id": asked.id, "score": 0}, None)
    with pytest.raises(Refusal, match="16 pieces"):
        await sink.give({"request_id": asked.id, "score": 0}, None)
    assert recorder.close() == 0


async def test_feedback_that_comes_together_is_bounded_and_replaces_one_by_one(tmp_path: Path) -> None:
    told: list[GivenFeedback] = []
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    asked = exchange()
    put(recorder, asked)
    sink = FeedbackStore(recorder, listeners=[told.append])
    scores = [number / 100 for number in range(40)]
    refused = 0

    async def give(score: float) -> None:
        nonlocal refused
        try:
            await sink.give({"request_id": asked.id, "score": score}, None)
        except Refusal:
            refused += 1

    async with asyncio.TaskGroup() as group:
        for score in scores:
            group.create_task(give(score))
    assert refused == 24
    assert [one.before for one in told] == [None, *[one.score for one in told[:-1]]]
    assert recorder.close() == 0


async def test_feedback_is_durable_when_it_is_answered(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "s.db")
    recorder.start()
    asked = exchange()
    put(recorder, asked)
    await FeedbackStore(recorder).give({"request_id": asked.id, "text": "fine"}, None)
    with Store.open(tmp_path / "s.db") as other:
        assert json.dumps(other.feedback(asked.id)).count("fine") == 1
    assert recorder.close() == 0
