"""`agentopt serve keys create|list|revoke`: makes and ends API keys in a file that a running server watches."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from agentopt.cli._console import count, err, hanging, out, short
from agentopt.errors import UserError

if TYPE_CHECKING:
    from agentopt.serving.keys import StoredKey

STATE_COLOURS = {"valid": "green", "revoked": "dim", "expired": "yellow", "used up": "yellow"}
_NAME = 18


def keys_path(given: str | None) -> str:
    """The file of --keys, else of AGENTOPT_KEYS.

    Raises:
        UserError: neither is given.
    """
    path = given or os.environ.get("AGENTOPT_KEYS")
    if not path:
        raise UserError("no key file: give --keys FILE, or set AGENTOPT_KEYS to it.")
    return path


def create_command(
    name: str,
    keys: str | None,
    *,
    rpm: int | None = None,
    tpm: int | None = None,
    tokens: int | None = None,
    concurrency: int | None = None,
    models: str | None = None,
    expires: float | None = None,
    as_json: bool = False,
) -> int:
    """Make a key. Its secret is all that goes to stdout, so that `KEY=$(agentopt serve keys create ...)` works."""
    from agentopt.serving.keys import KeyStore, NewKey

    path = keys_path(keys)
    globs = ("*",) if models is None else tuple(one.strip() for one in models.split(","))
    new = NewKey(name, globs, rpm, tpm, tokens, concurrency, expires)
    stored, secret = KeyStore(path).create(new)
    if as_json:
        print(json.dumps({**_json(stored), "key": secret}, indent=2))
        return 0
    print(secret, flush=True)
    limits = limits_of(stored) or "no limits"
    _say(err(), f"key {name} ({stored.key.id}): {limits}. It is shown only now: {path} holds no more than its hash.")
    return 0


def list_command(keys: str | None, *, everything: bool = False, as_json: bool = False) -> int:
    """Print the keys with what they used; their limits, where they have some, below."""
    from agentopt.serving.keys import KeyStore

    path = keys_path(keys)
    found = KeyStore(path).list()
    shown = [one for one in found if everything or one.revoked is None]
    if as_json:
        print(json.dumps({"keys": [_json(one) for one in shown]}, indent=2))
        return 0
    console = out()
    hidden = len(found) - len(shown)
    if not shown:
        console.print("no keys")
    else:
        print_keys(shown, console)
    if hidden:
        _say(console, f"{hidden} revoked {'key' if hidden == 1 else 'keys'} not shown: --all", style="dim")
    return 0


def revoke_command(which: str, keys: str | None, *, as_json: bool = False) -> int:
    """End a key."""
    from agentopt.serving.keys import KeyStore

    stored = KeyStore(keys_path(keys)).revoke(which)
    if as_json:
        print(json.dumps({"id": stored.key.id, "name": stored.key.name, "revoked": True}))
        return 0
    key = f"key {stored.key.name} ({stored.key.id})"
    if stored.revoked is not None:
        _say(out(), f"{key} was revoked already, {_when(stored.revoked)}")
    else:
        _say(out(), f"revoked {key}: servers that use this file refuse it within a second, and end its streams")
    return 0


def print_keys(keys: list[StoredKey], console: Console) -> None:
    """A line for each key, and its limits below it."""
    width = max(4, *(len(short(one.key.name, _NAME)) for one in keys))
    # name at most 18, last used 11: 79 columns
    head = f"{'name':<{width}}  {'id':<12}  {'state':<7}  {'requests':>8}  {'tokens':>13}  {'last used':<11}"
    console.print(Text(head.rstrip(), style="bold"))
    for one in keys:
        state = one.state()
        budget = "" if one.key.token_budget is None else f"/{count(one.key.token_budget)}"
        console.print(
            Text.assemble(
                f"{short(one.key.name, _NAME):<{width}}  {one.key.id:<12}  ",
                (f"{state:<7}", STATE_COLOURS[state]),
                f"  {count(one.requests):>8}  {count(one.tokens) + budget:>13}  ",
                "never" if one.last_used is None else _when(one.last_used)[5:],
            )
        )
        if limits := limits_of(one):
            for line in hanging(f"  {limits}", console.width):
                console.print(Text(line, style="dim"))


def limits_of(stored: StoredKey) -> str:
    """A key's limits in words; empty when it has none."""
    key = stored.key
    parts = [
        f"{limit:,} {what}"
        for limit, what in (
            (key.requests_per_minute, "requests/min"),
            (key.tokens_per_minute, "tokens/min"),
            (key.token_budget, "tokens in all"),
            (key.concurrency, "at a time"),
        )
        if limit is not None
    ]
    if key.models != ("*",):
        parts.append(f"models {','.join(key.models)}")
    if stored.expires is not None:
        parts.append(f"{'expired' if stored.expires <= time.time() else 'until'} {_when(stored.expires)}")
    return "; ".join(parts)


def _json(stored: StoredKey) -> dict[str, Any]:
    key = stored.key
    return {
        "id": key.id,
        "name": key.name,
        "state": stored.state(),
        "models": list(key.models),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "token_budget": key.token_budget,
        "concurrency": key.concurrency,
        "created": stored.created,
        "expires": stored.expires,
        "revoked": stored.revoked,
        "requests": stored.requests,
        "tokens": stored.tokens,
        "last_used": stored.last_used,
    }


def _when(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")


def _say(console: Console, text: str, style: str = "") -> None:
    for line in hanging(text, console.width):
        console.print(Text(line, style=style))
