"""Observation masking: old tool results give way to one short line that says what was there and how to get it back.

The cheapest way to shorten an agent's run, and a strong one: what a tool said ten steps ago is seldom read again, and
the agent's own words about it stay. Messages keep their number, order, roles and ids, so every call has its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.capsules.agents._originals import handle_of
from agentopt.capsules.agents._steps import Facts, anatomy, check_keep_last, read_all, text_of
from agentopt.capsules.counting._parts import check_messages
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.counting._tokens import Tokenizer
from agentopt.capsules.units._spans import find_keep

_BEGINNING = "[masked: "
_LINE = re.compile(r"\[masked: [\d,]+ tokens(?: of [^\n\]]{1,200})?(?:; capsule handle cap:[0-9a-f]+)?\](?:\n|$)")


@dataclass(frozen=True, slots=True)
class Masked:
    """One observation that was masked."""

    index: int
    """Which message it is."""
    tool: str
    tokens: int
    handle: str
    text: str
    """What it was."""
    saved: int
    """Tokens that its content lost."""


@dataclass(frozen=True, slots=True)
class Masking:
    """Messages with old observations masked."""

    messages: tuple[dict[str, Any], ...]
    masked: tuple[Masked, ...]


def mask(
    messages: Sequence[Mapping[str, Any]],
    *,
    keep_last: int = 3,
    keep: Sequence[str] = (),
    tokenizer: str | Path | Tokenizer = "o200k_base",
    handles: bool = True,
) -> Masking:
    """Replace old tool results by a short line each; a pure function of the messages.

    The last `keep_last` steps, errors that were not resolved since, the last user turn and everything that is no tool
    result stay as they are. A result stays also where the line would not be shorter.

    Args:
        messages: in OpenAI form; of agents that speak plain text, user turns that begin with "Observation:" count too.
        keep_last: how many of the last steps stay.
        keep: regular expressions; what they match in a masked result stays in its line, as placeholders do.
        tokenizer: counts what is masked.
        handles: whether a line names the handle of the original (see `Originals`).

    Raises:
        UserError: `keep_last` below 1, a message, a pattern or a tokenizer that is none.
    """
    check_keep_last(keep_last)
    given = check_messages(messages)
    facts = read_all(given)
    what = anatomy(facts, keep_last)
    count = resolve_tokenizer(tokenizer).count
    new: list[dict[str, Any]] = []
    masked: list[Masked] = []
    for index, (message, fact) in enumerate(zip(given, facts, strict=True)):
        found = None
        if fact.observation and not what.stays(index, fact) and not _LINE.match(text_of(message)):
            found = mask_one(index, message, fact, keep=keep, count=count, handles=handles)
        new.append(message if found is None else {**message, "content": found[1]})
        if found is not None:
            masked.append(found[0])
    return Masking(tuple(new), tuple(masked))


def mask_one(
    index: int,
    message: Mapping[str, Any],
    fact: Facts,
    *,
    keep: Sequence[str],
    count: Callable[[str], int],
    handles: bool = True,
) -> tuple[Masked, Any] | None:
    """One observation masked, with its new content; None where its line would not be shorter."""
    text = text_of(message)
    tokens, handle = count(text), handle_of(text)
    if len(text) < len(_BEGINNING):  # no line is shorter
        return None
    line = mask_line(text, tokens, fact.tool, handle if handles else "", keep)
    after = count(line)
    if after >= tokens:
        return None
    content: Any = line
    if isinstance(message.get("content"), list):
        entries = cast("list[dict[str, Any]]", message["content"])
        content = [{"type": "text", "text": line}, *(entry for entry in entries if entry.get("type") != "text")]
    return Masked(index, fact.tool, tokens, handle, text, tokens - after), content


def mask_line(text: str, tokens: int, tool: str, handle: str, keep: Sequence[str]) -> str:
    """The line in place of an observation, and below it the keep spans it held."""
    of = f" of {tool}" if tool else ""
    where = f"; capsule handle {handle}" if handle else ""
    spans = dict.fromkeys(span.of(text) for span in find_keep(text, keep))
    return "\n".join([f"{_BEGINNING}{tokens:,} tokens{of}{where}]", *spans])
