"""The process in which `--capsule` shortens texts: one JSON line in, one out, until its input ends.

A process and not a thread: parsing and scoring are pure Python, and a thread would take the interpreter from the
gateway for some milliseconds at a time, with every token of every stream waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentopt.capsules import Capsule, TokenBudget

_WORTH = 0.95
"""A capsule that saves less than 5 % is not worth what it may lose."""
RULES = (
    r"(?i)[^.!?\n]*\b(?:never|always|must|only|do not|don't|does not|doesn't|cannot|can't|may not|should not|shouldn't"
    r"|not allowed|forbidden|refuse|unless|under no)\b[^.!?\n]*[.!?]?",
)
"""Sentences that say what must or must not be done: of an instruction they are the part that may not get lost."""
_NICE = 10


def shortened(text: str, budget: TokenBudget, store: str | None) -> dict[str, Any] | None:
    """The shorter text with its tokens before and after; None when the text fits or little would be saved.

    Raises:
        UserError: what must stay is longer than the limit.
    """
    if budget.meter().fits([text]):
        return None
    capsule = asyncio.run(_capsule(text, budget, store))
    if capsule.best == text or capsule.tokens > _WORTH * capsule.original_tokens:
        return None
    return {"text": capsule.text, "before": capsule.original_tokens, "after": capsule.tokens}


async def _capsule(text: str, budget: TokenBudget, store: str | None) -> Capsule:
    from agentopt.capsules import CapsuleOptions, make_capsule

    options = CapsuleOptions(scorer="coverage", store=store)
    return await make_capsule(text, budget=budget, keep=RULES, mode="extract", options=options)


def _answer(line: bytes, budget: TokenBudget, store: str | None) -> dict[str, Any]:
    try:
        return {"made": shortened(json.loads(line), budget, store)}
    except Exception as error:  # noqa: BLE001 - one text must not end the work on all others
        return {"error": f"{error}" or type(error).__name__}


def main() -> int:
    """Read {"tokens", "tokenizer", "store"}, then one text a line."""
    from agentopt.capsules import TokenBudget

    with contextlib.suppress(OSError):
        os.nice(_NICE)
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    about = json.loads(lines.readline() or b"null")
    if about is None:
        return 0
    budget = TokenBudget(about["tokens"], about["tokenizer"])
    for line in lines:
        out.write(json.dumps(_answer(line, budget, about["store"])).encode("ascii") + b"\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
