"""What comes in too long: a tool result, or a person's turn full of documents, is shortened once, before it is sent.

Only when asked for. What was shortened here is what the history holds from then on, so the prompt stays append-only;
the original is behind the handle that the last line names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.agents._originals import handle_of
from agentopt.capsules.agents._steps import Facts
from agentopt.capsules.counting._parts import parts_of
from agentopt.capsules.counting._tokens import Meter, Tokenizer

_END = re.compile(r"\S[^\n]*\s*\Z")
_START = re.compile(r"\s*\S[^\n]*")


@dataclass(frozen=True, slots=True)
class Entered:
    """A message as the history holds it."""

    message: dict[str, Any]
    originals: tuple[str, ...] = ()
    """What it was, where it was shortened."""


def enter(
    message: dict[str, Any],
    fact: Facts,
    *,
    longest: int | None,
    tokenizer: Tokenizer,
    keep: Sequence[str],
    query: str | None,
    seed: int,
) -> Entered:
    """The message, each of its texts cut down to `longest` tokens by leaving out units; errors come in whole.

    Of a person's turn the first and the last line stay (what is asked stands there), and what binds.
    """
    if longest is None or fact.error or not (fact.observation or fact.role == "user"):
        return Entered(message)
    originals: list[str] = []
    new = dict(message)
    for part in parts_of([message]):
        if tokenizer.count(part.text) <= longest:
            continue
        text = _shortened(part.text, fact, longest, tokenizer, keep, query, seed)
        if text is None:
            continue
        originals.append(part.text)
        if part.entry is None:
            new["content"] = text
        else:
            content = list(cast("list[dict[str, Any]]", new["content"]))
            content[part.entry] = {**content[part.entry], "text": text}
            new["content"] = content
    return Entered(new, tuple(originals))


@dataclass(frozen=True)
class _Noted(Meter):
    """Counts a text with the note below it."""

    note: str = ""

    def total(self, parts: Sequence[str]) -> int:
        return self.tokenizer.count("".join(parts) + self.note)


def _shortened(
    text: str, fact: Facts, longest: int, tokenizer: Tokenizer, keep: Sequence[str], query: str | None, seed: int
) -> str | None:
    """The text within `longest` tokens, with its note; None where what must stay of it is longer."""
    from agentopt.capsules.extraction._extract import extract
    from agentopt.capsules.units._units import parse

    binding: list[str] = list(fact.constraints)
    if fact.role == "user" and not fact.observation:
        ends = [match[0].strip() for match in (_START.search(text), _END.search(text)) if match is not None]
        binding += ends
        query = ends[-1] if ends else query
    note = f"\n[shortened from {tokenizer.count(text):,} tokens; capsule handle {handle_of(text)}]"
    document = parse(text, (*keep, *(re.escape(one) for one in binding)), role=fact.role)
    try:
        found = extract([document], _Noted(longest, tokenizer, note=note), query=query, seed=seed)
    except BudgetInfeasible:
        return None
    return found.texts[0] + note
