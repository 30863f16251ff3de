"""From the client's body to the engine's: which model is meant, who may ask it, and what has to be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from agentopt.serving._types import CHAT, COMPLETIONS, Abilities, Catalog, Choice, Exchange, Refusal
from agentopt.serving.gateway import _parse as parse
from agentopt.serving.gateway._errors import dumps
from agentopt.serving.keys import may_ask


def choose(body: dict[str, Any], exchange: Exchange, catalog: Catalog, abilities: Abilities) -> Choice:
    """Note the body in `exchange`, and ask the catalog what its model means.

    Raises:
        Refusal: The body is odd, the key may not, there is no such model.
    """
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
    if sent is body and not changes.keys() & body.keys():
        return _spliced(raw, changes)
    return dumps(exchange.sent)


def _spliced(raw: bytes, added: dict[str, Any]) -> bytes:
    """The client's bytes with fields it did not give put in front: cheaper than writing a long conversation again."""
    if not added:
        return raw
    start = raw.index(b"{") + 1
    return b"%b%b,%b" % (raw[:start], dumps(added)[1:-1], raw[start:])


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
