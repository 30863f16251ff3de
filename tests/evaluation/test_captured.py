"""Captured traffic and trace files as data: what becomes a row, what is the label, and what must not leak."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, load_dataset, split_dataset
from agentopt.graph import OpRecord, Trace
from agentopt.store import Store

Turns = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Traffic:
    """Writes exchanges as a server does."""

    def __init__(self, path: Path) -> None:
        self.store = Store.open(path)
        self.store.create_run("run", {"kind": "serve"})
        self.count = 0

    def add(
        self, messages: Turns, answer: Any, *, asked: str = "m", said: dict[str, Any] | None = None, **meta: Any
    ) -> str:
        return self.session([(messages, answer, said)], asked=asked, **meta)[0]

    def session(
        self,
        calls: list[tuple[Turns, Any, dict[str, Any] | None]],
        *,
        asked: str = "m",
        variant: str | None = "a",
        **meta: Any,
    ) -> list[str]:
        ids: list[str] = []
        ops: list[OpRecord] = []
        for messages, reply, said in calls:
            self.count += 1
            request = f"req_{self.count:032x}"
            facts = {"request_id": request, "asked": asked, "model": "base", **meta}
            ops.append(OpRecord(len(ops), "lm", "lm", inputs={"messages": messages}, output=reply, meta=facts))
            ids.append(request)
            self.store.put_exchange("run", request, ids[0], {"asked": asked, "model": "base", "variant": variant})
            if said is not None:
                self.store._writer.put_wait(*_feedback(request, said))  # what aput_feedback does, without a loop
        self.store.put_trace("run", ids[0], Trace(ops).to_dict())
        return ids


def _feedback(request: str, said: dict[str, Any]) -> tuple[Any, Any]:
    from agentopt.store._traffic import _PUT_FEEDBACK

    return _PUT_FEEDBACK, [("run", request, 0.0, json.dumps(said))]


@pytest.fixture
def traffic(tmp_path: Path) -> Any:
    made = Traffic(tmp_path / "s.db")
    yield made
    made.store.close()


def test_given_answers_and_liked_replies_are_expected_and_nothing_else_is_a_row(traffic: Traffic) -> None:
    traffic.add([user("one")], "bad", said={"score": -1, "expected": "good"})
    traffic.add([user("two")], "liked", said={"score": 0.5, "text": "nice"})
    traffic.add([user("three")], "disliked", said={"score": -1})
    traffic.add([user("four")], "unknown")
    data = load_dataset("captured", store=traffic.store)
    assert [(row.inputs["message"], row.expected) for row in data] == [("one", "good"), ("two", "liked")]
    assert "self_agreement" not in data[0].meta
    assert data[1].meta["self_agreement"] is True and data[1].meta["text"] == "nice"
    assert data[1].meta["request_id"].startswith("req_")


def test_the_newest_feedback_counts_and_a_rating_does_not_undo_an_answer(traffic: Traffic) -> None:
    first = traffic.add([user("one")], "r", said={"score": 1})
    traffic.store._writer.put_wait(*_feedback(first, {"expected": "fixed"}))
    second = traffic.add([user("two")], "r", said={"score": 1})
    traffic.store._writer.put_wait(*_feedback(second, {"score": -0.5}))
    assert [row.expected for row in load_dataset("captured", store=traffic.store)] == ["fixed"]


def test_what_was_answered_is_never_an_input_whatever_the_program_takes(traffic: Traffic) -> None:
    traffic.add([user("one")], "SECRET", said={"score": 1, "text": "SECRET"})

    def anything(**columns: Any) -> None: ...

    for signature in (None, inspect.signature(anything)):
        for source in ("captured", "captured-all"):
            row = load_dataset(source, store=traffic.store, signature=signature)[0]
            assert "SECRET" not in json.dumps(dict(row.inputs))
            assert row.expected == "SECRET"


def test_all_traffic_without_expected_answers_or_with_the_reply_as_the_label(traffic: Traffic) -> None:
    traffic.add([user("one")], "a")
    traffic.add([user("two")], "half", reply="broken off")
    traffic.add([user("three")], "", said={"expected": "c"})
    everything = load_dataset("captured-all", store=traffic.store)
    assert [(row.inputs["message"], row.expected) for row in everything] == [("one", None), ("three", "c")]
    assert load_dataset("captured-all", store=traffic.store, label="reply")[0].expected == "a"


def test_columns_for_ones_own_program_and_for_the_ready_one(traffic: Traffic) -> None:
    turns = [{"role": "system", "content": "be brief"}, user("a"), assistant("b"), user("c")]
    traffic.add(turns, "d", said={"score": 1})
    row = load_dataset("captured", store=traffic.store)[0]
    assert row.inputs["messages"] == turns and row.inputs["system"] == "be brief"
    assert (row.inputs["message"], row.inputs["history"]) == ("c", turns[:-1])

    def route(ticket: str) -> None: ...

    own = load_dataset("captured", store=traffic.store, signature=inspect.signature(route), inputs=["ticket=message"])
    assert dict(own[0].inputs) == {"ticket": "c"}


def test_tool_calls_are_compared_as_text_and_images_give_no_row(traffic: Traffic) -> None:
    call = {"id": "x", "name": "f", "arguments": {"b": 1, "a": 2}, "raw": None}
    traffic.add([user("one")], {"text": "", "tool_calls": [call]}, said={"score": 1})
    traffic.add([{"role": "user", "content": [{"type": "image_url"}]}], "r", said={"score": 1})
    (row,) = load_dataset("captured", store=traffic.store)
    assert json.loads(row.expected) == [{"name": "f", "arguments": {"a": 2, "b": 1}}]


def test_the_model_is_the_one_that_was_asked_for_exactly(traffic: Traffic) -> None:
    traffic.add([user("one")], "a", asked="org/triage:v2", said={"score": 1})
    traffic.add([user("two")], "b", asked="other", said={"score": 1})
    traffic.add([user("three")], "c", asked="other", variant="b", said={"score": 1})
    traffic.add([user("four")], "d", asked="base", variant=None, said={"score": 1})
    for source, expected in (
        ("captured:org/triage:v2", ["a"]),
        ("captured:other", ["b", "c"]),
        ("captured:other/a", ["b"]),
        ("captured:base", ["d"]),  # it wrote all four, and three of them with a tuned prompt
        ("captured-all:base", ["d"]),
    ):
        rows = load_dataset(source, store=traffic.store)
        assert [row.meta["reply"] for row in rows] == expected
    assert len(load_dataset("/some/folder/captured:org/triage:v2", store=traffic.store)) == 1, "a path was made of it"
    for nobody in ("captured:nobody", "captured:base/None", "captured:other/c"):
        with pytest.raises(UserError, match="there are exchanges of base, org/triage:v2, other"):
            load_dataset(nobody, store=traffic.store)
    traffic.add([user("five")], "e", asked="other/a", variant=None, said={"score": 1})
    (row,) = load_dataset("captured:other/a", store=traffic.store)
    assert row.meta["reply"] == "e", "a model of that name goes before a variant"


def test_without_a_store_traffic_or_feedback_the_sentence_says_what_to_do(tmp_path: Path, traffic: Traffic) -> None:
    with pytest.raises(UserError, match=r"no store here.*--capture"):
        load_dataset("captured", store=tmp_path / "none.db")
    with pytest.raises(UserError, match="no captured exchange with feedback"):
        load_dataset("captured", store=traffic.store)
    traffic.add([user("one")], "a", said={"score": -1})
    with pytest.raises(UserError, match="none of them has an expected answer"):
        load_dataset("captured", store=traffic.store)


def conversations(traffic: Traffic) -> Dataset:
    """Twelve conversations of three exchanges: each holds the replies to the earlier ones."""
    for number in range(12):
        turns: Turns = [{"role": "system", "content": f"time {number}"}]
        for step in range(3):
            turns = [*turns, user(f"question {number}.{step}")]
            traffic.add(list(turns), f"answer {number}.{step}", said={"score": 1})
            turns = [*turns, assistant(f"answer {number}.{step}")]
            turns[0] = {"role": "system", "content": f"time {number}.{step}"}
    return load_dataset("captured", store=traffic.store)


def test_a_test_answer_never_stands_in_a_training_input(traffic: Traffic) -> None:
    train, val, test = split_dataset(conversations(traffic), seed=3)
    assert len(train) == 18 and len(val) == len(test) == 9
    shown = json.dumps([dict(row.inputs) for row in (*train, *val)])
    assert not any(row.expected in shown for row in test)


def test_calls_of_one_session_stay_together_also_without_a_common_beginning(traffic: Traffic) -> None:
    for number in range(8):
        plan = f"plan {number}"
        calls: list[tuple[Turns, Any, dict[str, Any] | None]] = [
            ([user(f"make a plan for {number}")], plan, {"score": 1}),
            ([user(f"carry out: {plan}")], f"done {number}", {"score": 1}),
        ]
        traffic.session(calls)
    parts = split_dataset(load_dataset("captured", store=traffic.store), seed=1)
    for part in parts:
        assert len({row.meta["agentopt.group"] for row in part}) * 2 == len(part)


def test_equal_questions_in_two_sessions_stay_together(traffic: Traffic) -> None:
    traffic.session([([user("hi")], "hello", {"score": 1}), ([user("x")], "y", {"score": 1})])
    traffic.session([([user("hi")], "hey", {"score": 1}), ([user("p")], "q", {"score": 1})])
    traffic.add([user("other")], "z", said={"score": 1})
    groups = [row.meta["agentopt.group"] for row in load_dataset("captured", store=traffic.store)]
    assert len(set(groups[:4])) == 1 and groups[4] != groups[0]


def test_a_trace_file_gives_the_inputs_of_its_agents_and_hides_what_they_returned(tmp_path: Path) -> None:
    @ao.agent
    def triage(ticket: str, hint: str = "") -> str:
        return f"about {ticket}"

    with ao.record() as recording:
        triage("a parcel")
        triage("a letter", hint="short")
    recording.trace.save(tmp_path / "a.trace.jsonl")
    signature = inspect.signature(triage)
    data = load_dataset(tmp_path / "a.trace.jsonl", signature=signature)
    assert [dict(row.inputs) for row in data] == [
        {"ticket": "a parcel", "hint": ""},
        {"ticket": "a letter", "hint": "short"},
    ]
    assert [row.expected for row in data] == [None, None]
    labelled = load_dataset(tmp_path / "a.trace.jsonl", signature=signature, label="reply")
    assert [row.expected for row in labelled] == ["about a parcel", "about a letter"]


def test_a_trace_file_of_bare_model_calls_gives_their_messages(tmp_path: Path) -> None:
    lm = ao.FunctionLM(lambda request: "yes", name="yes")
    ao.configure(models={"agent": lm})
    with ao.record() as recording:
        ao.lm("agent").complete_sync(system="be brief", user="really?")
    recording.trace.save(tmp_path / "b.trace.jsonl")
    (row,) = load_dataset(tmp_path / "b.trace.jsonl", label="reply")
    assert (row.inputs["message"], row.inputs["system"], row.expected) == ("really?", "be brief", "yes")
    (tmp_path / "c.trace.jsonl").write_text('{"ticket": "x"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="must be a trace header"):
        load_dataset(tmp_path / "c.trace.jsonl")
