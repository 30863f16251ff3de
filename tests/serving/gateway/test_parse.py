"""Bodies as hostile clients write them: refused with 400 and a sentence, or passed on as they are."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.serving._types import CHAT, COMPLETIONS, EMBEDDINGS, FORWARDED, RESPONSES, Refusal
from agentopt.serving.gateway._parse import check_shape, headers_of, label, model_of, parse_body, stream_of
from tests.serving.gateway.kit import HELLO, house

pytestmark = pytest.mark.anyio
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
BAD = {
    b"": "not JSON",
    b"{": "not JSON",
    b"[]": "JSON object",
    b'"text"': "JSON object",
    b"null": "JSON object",
    b'{"a":1}x': "not JSON",
    b"{'a':1}": "not JSON",
    b'{"a":NaN}': "NaN",
    b'{"a":[-Infinity]}': "Infinity",
    b'{"a":1e999}': "double precision",
    b'{"model":"x","model":"y"}': "'model' twice",
    b'{"a":{"b":1,"b":2}}': "'b' twice",
    b'{"a":"\xff"}': "UTF-8",
    b'\xef\xbb\xbf{"a":1}': "not JSON",
    '{"a":1}'.encode("utf-16"): "UTF-8",
    b'{"a":"\\ud800"}': "surrogate",
    b'{"\\uDFFF":1}': "surrogate",
    b'{"a":' + b"[" * 100 + b"]" * 100 + b"}": "nested",
    b'{"a":' * 50_000: "nested",
    b"[" * 2_000_000: "brackets",
    b'{"a":[' + b"[]," * 300_000 + b"0]}": "brackets",
    b'{"a":' + b"9" * 5000 + b"}": "too long",
    b'{"a":"\n"}': "not JSON",
}


@pytest.mark.parametrize("body", list(BAD), ids=lambda body: repr(body[:20]))
def test_odd_json_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal, match=BAD[body]) as caught:
        parse_body(body, nesting=64)
    assert caught.value.status == 400


@settings(max_examples=40)
@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_plain_json_is_read_as_json_reads_it(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8")
        assert parse_body(raw, nesting=64) == value


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_object_or_a_refusal(raw: bytes) -> None:
    try:
        assert isinstance(parse_body(raw, nesting=8), dict)
    except Refusal as refusal:
        assert refusal.status == 400


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(FORWARDED)),
    st.dictionaries(
        st.sampled_from(
            ["messages", "prompt", "input", "max_tokens", "temperature", "n", "stream", "model", "stream_options"]
        ),
        JSON,
    ),
)
def test_any_object_has_a_shape_or_is_refused(route: str, body: dict[str, Any]) -> None:
    try:
        model_of(body)
        stream_of(route, body)
        check_shape(route, body)
    except Refusal as refusal:
        assert refusal.status == 400


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": "hello"}),
        (CHAT, {"messages": ["hello"]}),
        (CHAT, {"messages": [{"content": "hello"}]}),
        (CHAT, {"messages": HELLO, "max_tokens": "5"}),
        (CHAT, {"messages": HELLO, "max_tokens": 1.5}),
        (CHAT, {"messages": HELLO, "max_tokens": True}),
        (CHAT, {"messages": HELLO, "temperature": "hot"}),
        (CHAT, {"messages": HELLO, "temperature": True}),
        (CHAT, {"messages": HELLO, "stream": "yes"}),
        (CHAT, {"messages": HELLO, "stream": 1}),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}),
        (CHAT, {"messages": HELLO, "stream": True, "stream_options": True}),
        (CHAT, {"messages": HELLO, "model": 5}),
        (CHAT, {"messages": HELLO, "model": "a" * 300}),
        (CHAT, {"messages": HELLO, "user": {}}),
        (COMPLETIONS, {"prompt": 5}),
        (COMPLETIONS, {}),
        (EMBEDDINGS, {"input": "x", "stream": True}),
        (RESPONSES, {"input": {}}),
    ],
)
async def test_requests_without_sense_never_reach_the_engine(route: str, body: dict[str, Any]) -> None:
    async with house() as home:
        reply = await home.client.post(route, json=body)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert home.fake.count == 0


async def test_only_plain_json_is_taken() -> None:
    async with house() as home:
        for headers in (
            {},
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "application/json", "content-encoding": "gzip"},
        ):
            reply = await home.client.post(CHAT, content=json.dumps({"messages": HELLO}), headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
        fine = {"content-type": "Application/JSON; charset=utf-8"}
        reply = await home.client.post(CHAT, content=json.dumps({"messages": HELLO}), headers=fine)
        assert reply.status_code == 200


def test_a_key_that_comes_twice_among_very_many_is_found_at_once() -> None:
    names = [f'"k{number}":1' for number in range(400_000)]

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)  # comparing each with each would take half an hour
    try:
        with pytest.raises(Refusal, match="'k399999' twice"):
            parse_body(f"{{{','.join([*names, names[-1]])}}}".encode(), nesting=64)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


async def test_headers_that_decide_may_come_once_only() -> None:
    async with house() as home:
        twice = [("authorization", "Bearer a"), ("authorization", "Bearer b"), ("content-type", "application/json")]
        reply = await home.client.post(CHAT, content=b"{}", headers=twice)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "duplicate_header")
    assert headers_of([(b"Accept", b"a"), (b"accept", b"b")]) == {"accept": "a"}


def test_labels_that_could_be_keys_are_dropped() -> None:
    assert label("run-1.2_3") == "run-1.2_3"
    for odd in ("", "a b", "a" * 129, "a\nb", "ak-" + "x" * 43, "x.ak-" + "y" * 43, None):
        assert label(odd) is None
