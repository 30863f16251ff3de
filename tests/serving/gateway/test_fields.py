"""Fields of a body that are not a client's to set, and how much one request may ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentopt.serving._types import CHAT, COMPLETIONS, EMBEDDINGS, FORWARDED, MESSAGES, RESPONSES, Refusal
from agentopt.serving.gateway import Limits
from agentopt.serving.gateway._fields import REFUSED, check_fields
from tests.serving.gateway.kit import HELLO, house
from tests.serving.gateway.test_parse import JSON

LIMITS = Limits()


def check(body: dict[str, Any], route: str = CHAT, limits: Limits = LIMITS) -> None:
    check_fields(route, body, len(json.dumps(body)), limits)


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def chain(links: int) -> dict[str, Any]:
    """Definitions that each stand on the next: shallow as JSON, deep for who follows them."""
    defs: dict[str, Any] = {
        f"d{link}": {"type": "array", "items": {"$ref": f"#/$defs/d{link + 1}"}} for link in range(links)
    }
    return {"$defs": defs | {f"d{links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


DEEP = "(" * 50_000 + "a" + ")" * 50_000
"""As a pattern in a schema, or as a grammar, such a text ends the process of more than one engine."""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_for_those_who_run_an_engine_is_refused_and_not_dropped(name: str) -> None:
    with pytest.raises(Refusal) as caught:
        check({name: {"any": "thing"}})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "field_not_allowed", name)
    for nothing in (None, False, 0, "", [], {}):
        check({name: nothing})
    check({name: {"any": "thing"}}, limits=Limits(fields=frozenset({name})))


@pytest.mark.parametrize("name", ["Model", "MODEL", "ſtream", "chat_templatE", "N", "Max_Tokens", "responſe_format"])
def test_a_name_that_another_server_reads_without_regard_to_case_is_refused(name: str) -> None:
    with pytest.raises(Refusal, match="must be written"):
        check({name: 1})
    check({"maxTokens": 1, "Önly": 2, "X": 3})


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {"n": 129}),
        (CHAT, {"n": 1.0e300}),
        (CHAT, {"n": 2, "best_of": 1000}),
        (COMPLETIONS, {"prompt": ["a"] * 129}),
        (COMPLETIONS, {"prompt": [[1]] * 65, "n": 2}),
        (EMBEDDINGS, {"input": ["a"] * 2049}),
        (CHAT, {"max_tokens": 1 << 31}),
        (CHAT, {"max_tokens": -1}),
        (CHAT, {"n_predict": -1}),
        (CHAT, {"top_logprobs": 101}),
        (CHAT, {"prompt_logprobs": -1}),
        (CHAT, {"n_probs": 1_000_000}),
        (COMPLETIONS, {"logprobs": 10**30}),
        (CHAT, {"stop": ["x"] * 65}),
        (CHAT, {"stop": "x" * 20_000}),
        (MESSAGES, {"stop_sequences": ["x" * 10_000] * 2}),
        (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        (CHAT, schema({"type": "string", "pattern": DEEP})),
        (CHAT, schema({"type": "object", "patternProperties": {DEEP: {}}})),
        (CHAT, schema(chain(20_000))),
        (CHAT, schema({"items": [{"enum": [f"v{number}" for number in range(600)]}] * 2, "title": "x" * 9000})),
        (CHAT, schema({"properties": {f"p{number}": {} for number in range(11_000)}})),
        (CHAT, schema({"allOf": [{"not": {"items": [{"pattern": DEEP}]}}]})),
        (CHAT, {"tools": [{"function": {"parameters": {"properties": {"a": {"pattern": DEEP}}}}}]}),
        (CHAT, {"guided_regex": DEEP}),
        (CHAT, {"guided_grammar": "root ::= " + DEEP}),
        (CHAT, {"guided_json": json.dumps({"type": "string", "pattern": DEEP})}),
        (CHAT, {"guided_json": '{"items":' * 3000 + "{}" + "}" * 3000}),
        (CHAT, {"guided_choice": ["a"] * 2000}),
        (COMPLETIONS, {"structured_outputs": {"regex": DEEP}}),
        (COMPLETIONS, {"structured_outputs": {"json": "[" * 100_000}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"pattern": DEEP}}}}),
    ],
)
def test_a_request_for_too_much_is_refused(route: str, body: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        check(body, route)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


def test_what_programs_ask_for_is_let_through() -> None:
    tools = [
        {"type": "function", "function": {"name": f"t{number}", "parameters": schema({"type": "object"})}}
        for number in range(100)
    ]
    check({"n": 128, "max_tokens": 100_000, "logprobs": True, "top_logprobs": 20, "stop": ["\n"], "tools": tools})
    check({"prompt": list(range(50_000)), "n": 4, "logprobs": 5, "echo": True}, COMPLETIONS)
    check({"input": ["a"] * 2048}, EMBEDDINGS)
    check({"chat_template_kwargs": {"enable_thinking": False}, "cache_salt": "s", "priority": 0, "lora_path": None})
    check({"messages": [{"role": "user", "content": DEEP}], "metadata": {"pattern": DEEP}})
    check({"tools": [{"function": {"description": DEEP, "parameters": {"properties": {"pattern": {}}}}}]})
    check(schema({"enum": [f"value {number}" for number in range(1000)]}))


@given(
    st.sampled_from(sorted(FORWARDED)), st.dictionaries(st.sampled_from([*REFUSED, "n", "tools", "stop", "json"]), JSON)
)
def test_any_object_is_let_through_or_refused(route: str, body: dict[str, Any]) -> None:
    try:
        check_fields(route, body, 1 << 20, LIMITS)
    except Refusal as refusal:
        assert refusal.status == 400


@pytest.mark.anyio
async def test_a_refused_request_reaches_no_engine() -> None:
    async with house() as home:
        bodies: list[dict[str, Any]] = [{"kv_transfer_params": {"host": "10.0.0.1"}}, {"Model": "another"}, {"n": 999}]
        for body in bodies:
            assert (await home.ask(messages=HELLO, **body)).status_code == 400
        assert not home.fake.requests
        assert (await home.ask(messages=HELLO, n=1, text="free", custom={"A": 1})).status_code == 200
