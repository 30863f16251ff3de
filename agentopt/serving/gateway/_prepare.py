"""From the client's body to the engine's: which model is meant, who may ask it, and what has to be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from agentopt.serving._types import CHAT, COMPLETIONS, Abilities, Catalog, Choice, Exchange, Refusal
from agentopt.serving.gateway import _parse as parse
from agentopt.serving.gateway._errors import dumps
from agentopt.serving.keys import may_ask


def choose(raw: bytes, exchange: Exchange, catalog: Catalog, abilities: Abilities, nesting: int) -> Choice:
    """Read the body into `exchange`, and ask the catalog what its model means.

    Raises:
        Refusal: The body is odd, the key may not, there is no such model.
    """
    body = parse.parse_body(raw, nesting=nesting)
    exchange.body = body
    exchange.asked = parse.model_of(body)
    exchange.stream = parse.stream_of(exchange.route, body)
    if exchange.key is not None and not may_ask(exchange.key, name := exchange.asked or _first(catalog, abilities)):
        message = f"this key may not ask the model {name!r}"
        raise Refusal(403, message, kind="permission_error", code="model_not_allowed", param="model")
    choice = catalog.choose(exchange)
    exchange.model, exchange.adapter, exchange.variant = choice.model, choice.adapter, choice.variant
    return choice


def rewritten(raw: bytes, choice: Choice, exchange: Exchange, abilities: Abilities) -> bytes:
    """The body for the engine: the client's own bytes where nothing has to be changed.

    Raises:
        Refusal: The candidate or the engine cannot take it.
    """
    body = exchange.body
    sent = body if choice.rewrite is None else choice.rewrite(exchange.route, body)
    parse.check_shape(exchange.route, sent)
    changes: dict[str, Any] = {}
    if sent.get("model") != choice.model:
        changes["model"] = choice.model
    if adds_usage(exchange, abilities):
        changes["stream_options"] = {**_options(sent), "include_usage": True}
    exchange.sent = {**sent, **changes} if changes else sent
    return raw if exchange.sent is body else dumps(exchange.sent)


def adds_usage(exchange: Exchange, abilities: Abilities) -> bool:
    """Whether the engine is asked for a count of tokens that the client did not ask for."""
    if not exchange.stream or exchange.route not in (CHAT, COMPLETIONS) or not abilities.stream_usage:
        return False
    return not _options(exchange.body).get("include_usage")


def _first(catalog: Catalog, abilities: Abilities) -> str:
    """By which name a request without one asks: the base model's, shown first."""
    entries = catalog.entries()
    return str(entries[0]["id"]) if entries else abilities.model


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", body.get("stream_options") or {})
