"""The OpenAPI document says what is there, and what is there does what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from agentopt.serving._types import CHAT, COMPLETIONS, FORWARDED, MESSAGES, Abilities
from agentopt.serving.gateway import document
from tests.serving.gateway.kit import HELLO, house

pytestmark = pytest.mark.anyio


def schema_of(content: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    return {**content["application/json"]["schema"], "components": whole["components"]}


def test_it_holds_the_public_routes_and_no_others() -> None:
    everything = document(Abilities(routes=FORWARDED), True)
    own = {"/health", "/ready", "/v1/models", "/v1/models/{model}"}
    assert set(everything["paths"]) == FORWARDED | own | {"/v1/feedback"}
    some = document(Abilities(routes=frozenset({CHAT})), False)
    assert set(some["paths"]) == {CHAT} | own
    json.dumps(everything)
    assert everything["security"]
    assert "security" not in document(Abilities(), False, keys=False)
    for name in everything["components"]["schemas"]:
        jsonschema.Draft202012Validator.check_schema(everything["components"]["schemas"][name])


async def test_replies_are_as_it_says() -> None:
    async with house(abilities=lambda had: replace(had, routes=FORWARDED - {COMPLETIONS})) as home:
        whole = document(Abilities(routes=FORWARDED), False)
        asked: list[tuple[str, str, dict[str, Any] | None]] = [
            ("get", "/health", None),
            ("get", "/ready", None),
            ("get", "/v1/models", None),
            ("get", "/v1/models/fake", None),
            ("get", "/v1/models/nobody", None),
            ("post", CHAT, {"messages": HELLO}),
            ("post", CHAT, {"messages": []}),
            ("post", CHAT, {"messages": HELLO, "model": "nobody"}),
            ("post", CHAT, {"messages": HELLO, "fake": {"die_after": 0}}),
            ("post", COMPLETIONS, {"prompt": "x"}),
            ("post", MESSAGES, {"messages": 5}),
        ]
        for method, path, body in asked:
            reply = await home.client.request(method, path, json=body)
            template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
            told = whole["paths"][template][method]["responses"][str(reply.status_code)]
            jsonschema.validate(reply.json(), schema_of(told["content"], whole))


async def test_bodies_that_it_allows_are_taken() -> None:
    async with house() as home:
        whole = document(Abilities(routes=FORWARDED), False)
        for route in sorted(FORWARDED):
            schema = schema_of(whole["paths"][route]["post"]["requestBody"]["content"], whole)
            name = schema["required"][0]
            body = {"messages": HELLO, "prompt": "x", "input": ["x"], "max_tokens": 5}
            body = {field: value for field, value in body.items() if field in schema["required"]}
            jsonschema.validate(body, schema)
            assert (await home.client.post(route, json=body)).status_code == 200
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({**body, name: 5}, schema)
            assert (await home.client.post(route, json={**body, name: 5})).status_code == 400
