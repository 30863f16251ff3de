"""Server-sent events passed on as bytes: whole events only, and without the usage event that only we asked for.

A piece of the engine's reply usually ends where an event ends, and holds no usage: then it is passed on as it is, after
one comparison and one search. Only the rest is looked at closely.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from agentopt.serving._types import TokenUse

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
"""Text inside a JSON string cannot match: its quotes are escaped."""
_END = re.compile(rb"\n\r?\n")
_LAST_USAGES, _USAGE_BYTES = 16, 8 << 10


class Events:
    """The events of one reply.

    Args:
        cut_usage: Drop the event that holds nothing but the usage (the client did not ask for it).
        bound: An unfinished event longer than this many bytes is passed on unfinished.
    """

    __slots__ = ("_bound", "_cut", "_held", "open", "use")

    def __init__(self, *, cut_usage: bool, bound: int = 1 << 20) -> None:
        self._cut = cut_usage
        self._bound = bound
        self._held = bytearray()
        self.open = False
        """What was passed on last ends inside an event."""
        self.use: TokenUse | None = None
        """The engine's count, once it was seen."""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now that `data` came."""
        if not self._held and data.endswith((b"\n\n", b"\n\r\n")):
            self.open = False
            return data if _USAGE.search(data) is None else self._looked_at(data)
        return self._held_back(data)

    def rest(self) -> bytes:
        """What is left when the engine ended the reply: an event without its empty line, if anything."""
        rest = bytes(self._held)
        self._held.clear()
        return rest if _USAGE.search(rest) is None else self._looked_at(rest)

    def _held_back(self, data: bytes) -> bytes:
        held = self._held
        seen = len(held)
        held += data
        start = max(0, seen - 2)
        end = max(held.rfind(b"\n\n", start) + 2, held.rfind(b"\n\r\n", start) + 3)
        if end < 3 and not held.startswith(b"\n\n", 0, 2):
            if len(held) <= self._bound:
                return b""
            end, self.open = len(held), True
        else:
            self.open = False
        whole = bytes(held[:end])
        del held[:end]
        return whole if _USAGE.search(whole) is None else self._looked_at(whole)

    def _looked_at(self, data: bytes) -> bytes:
        """`data` without usage events; the usage is noted."""
        kept: list[bytes] = []
        start = 0
        while start < len(data):
            found = _END.search(data, start)
            end = found.end() if found else len(data)
            event = data[start:end]
            start = end
            if _USAGE.search(event) is None or not self._note(event) or not self._cut:
                kept.append(event)
        return b"".join(kept)

    def _note(self, event: bytes) -> bool:
        """Read the usage in one event; says whether the event holds nothing else."""
        payload = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
        try:
            read: object = json.loads(payload)
        except ValueError:
            return False
        if not isinstance(read, dict):
            return False
        content = cast("dict[str, Any]", read)
        use = usage_of(content)
        if use is not None:
            self.use = merged(self.use, use)
        return use is not None and content.get("choices") == []


def usage_of(content: Mapping[str, Any]) -> TokenUse | None:
    """The token counts in a reply or event of any route, None where there are none."""
    for holder in (content, content.get("response"), content.get("message")):
        usage = cast("Mapping[str, Any]", holder).get("usage") if isinstance(holder, Mapping) else None
        if isinstance(usage, Mapping):
            return _use(cast("Mapping[str, Any]", usage))
    return None


def tail_usage(body: bytes) -> TokenUse | None:
    """The token counts in (the end of) a JSON reply, without parsing the reply as long as only one place has them.

    Some routes repeat what the client sent, and it may have sent what looks like a count: then the reply's own counts.
    """
    places = [found.end() - 1 for found in _USAGE.finditer(body)]
    if len(places) > 1:
        try:
            whole: object = json.loads(body)
        except (ValueError, RecursionError):
            pass  # the end of a long one: the largest of the last few
        else:
            return usage_of(cast("dict[str, Any]", whole)) if isinstance(whole, dict) else None
    use: TokenUse | None = None
    for place in places[-_LAST_USAGES:]:
        try:
            usage, _ = json.JSONDecoder().raw_decode(body[place : place + _USAGE_BYTES].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if any(name in usage for name in ("prompt_tokens", "input_tokens")):
            use = merged(use, _use(usage))
    return use


def merged(earlier: TokenUse | None, later: TokenUse) -> TokenUse:
    """Counts only grow during a reply (the Messages API gives the prompt's first, then the reply's)."""
    if earlier is None:
        return later
    return TokenUse(
        max(earlier.prompt, later.prompt),
        max(earlier.completion, later.completion),
        max(earlier.cached, later.cached),
    )


def _use(usage: Mapping[str, Any]) -> TokenUse:
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = cast("Mapping[str, Any]", details).get("cached_tokens") if isinstance(details, Mapping) else None
    return TokenUse(
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        _count(cached if cached is not None else usage.get("cache_read_input_tokens")),
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
