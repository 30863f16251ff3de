"""Request keys: every field that decides the reply changes the key, nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.graph import Usage
from agentopt.models import LMOptions, Reply, Request, ToolCall

texts = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
options = st.builds(
    LMOptions,
    temperature=st.floats(0, 2),
    max_tokens=st.integers(1, 100),
    seed=st.none() | st.integers(0, 5),
    stop=st.lists(texts, max_size=2).map(tuple),
    top_p=st.none() | st.floats(0, 1),
    timeout=st.floats(1, 100),
    sample=st.integers(0, 3),
    extra=st.dictionaries(texts, json_values, max_size=2),
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts}), max_size=3
)
requests = st.builds(
    Request,
    model=texts,
    messages=messages.map(tuple),
    tools=st.lists(st.dictionaries(texts, json_values, max_size=2), max_size=2).map(tuple),
    schema=st.none() | st.dictionaries(texts, json_values, max_size=2),
    choices=st.none() | st.lists(texts, min_size=1, max_size=3).map(tuple),
    options=options,
)


def decides(request: Request) -> str:
    return json.dumps(request.to_dict(), sort_keys=True)


@given(requests, requests)
def test_keys_are_equal_exactly_when_what_decides_the_reply_is_equal(one: Request, other: Request) -> None:
    assert (one.key() == other.key()) == (decides(one) == decides(other))


@given(requests, st.data())
def test_each_option_but_the_timeout_is_in_the_key(request: Request, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["temperature", "max_tokens", "seed", "stop", "top_p", "sample", "timeout"]))
    value = getattr(data.draw(options), name)
    changed = replace(request, options=replace(request.options, **{name: value}))
    same = name == "timeout" or json.dumps(value) == json.dumps(getattr(request.options, name))
    assert (changed.key() == request.key()) == same


@given(requests)
def test_keys_survive_a_json_round_trip_of_the_messages(request: Request) -> None:
    copied = replace(request, messages=tuple(json.loads(json.dumps(request.messages))))
    assert copied.key() == request.key()
    assert len(request.key()) == 64


def test_whole_numbers_are_the_same_as_floats() -> None:
    one, other = (
        Request("m", (), options=LMOptions(temperature=1)),
        Request("m", (), options=LMOptions(temperature=1.0)),
    )
    assert one.key() == other.key()


@pytest.mark.parametrize("change", [{"sample": 1}, {"seed": 2}])
def test_temperature_samples_differ_by_sample_and_seed(change: dict[str, Any]) -> None:
    base = Request("m", ({"role": "user", "content": "x"},), options=LMOptions(temperature=1.0, seed=1))
    assert replace(base, options=replace(base.options, **change)).key() != base.key()


def test_keys_are_stable_between_releases() -> None:
    request = Request("m", ({"role": "user", "content": "é"},), choices=("a", "b"), options=LMOptions(seed=1))
    assert request.key() == "df8f864f3506aed2cbb857910a84fa71f42feef618c38ad38145f8a2289fbc33"


replies = st.builds(
    Reply,
    text=st.text(),
    tool_calls=st.lists(
        st.builds(ToolCall, texts, texts, st.dictionaries(texts, json_values, max_size=2), st.none() | texts),
        max_size=2,
    ).map(tuple),
    usage=st.builds(Usage, *[st.integers(0, 1000)] * 6),
    cost=st.none() | st.floats(0, 10),
    finish_reason=texts,
    logprobs=st.none() | st.dictionaries(texts, st.floats(-10, 0), max_size=3),
    model=texts,
)


@given(replies)
def test_replies_round_trip_through_json(reply: Reply) -> None:
    assert Reply.from_dict(json.loads(json.dumps(reply.to_dict()))) == reply
