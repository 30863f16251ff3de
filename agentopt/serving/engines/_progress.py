"""Whether an engine whose health is good still computes: one token is asked for, and its own counters are looked at.

vLLM's HTTP side is a process of its own. It goes on saying that all is well while the process that computes stands
still, and every request waits until its time is over. A busy engine may answer late as well, so both have to be bad: no
answer to a request for one token, and no token counted meanwhile, for anybody, twice in a row. llama.cpp's counters are
silent themselves while its one loop stands still; its health, which another thread tells, is not.
"""

from __future__ import annotations

import json
import re

from agentopt.serving._types import COMPLETIONS, Abilities, Address
from agentopt.serving.engines._probe import fetch

_TRIES = 2
"""In a row: whoever stops the whole machine for a while has stopped the engine with it."""


async def stalled(address: Address, abilities: Abilities, counters: re.Pattern[str], seconds: float) -> str | None:
    """Why an engine is taken to compute no more; None when it computes, or when that cannot be told.

    Args:
        address: of the engine.
        abilities: that it has; without completions nothing can be told.
        counters: finds the lines of `/metrics` that grow with its tokens.
        seconds: that it has for one token.
    """
    if COMPLETIONS not in abilities.routes:
        return None
    for _ in range(_TRIES):
        before = await _counted(address, counters, seconds)
        if before == [] or await _answers(address, abilities.model, seconds):
            return None
        if await _counted(address, counters, seconds) not in (before, None):
            return None
    return f"its health is good, but it wrote no token for anybody in {_TRIES * seconds:g} s"


async def _answers(address: Address, model: str, seconds: float) -> bool:
    """Whether anything comes back: an error is an answer, and what else is wrong its health will say."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 1}).encode()
    try:
        await fetch(address, COMPLETIONS, timeout=seconds, method="POST", body=body)
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


async def _counted(address: Address, counters: re.Pattern[str], seconds: float) -> list[str] | None:
    """The counters' lines; none where they cannot be had, None where the engine does not come to telling them."""
    try:
        status, text = await fetch(address, "/metrics", timeout=seconds)
    except TimeoutError:
        return None
    except OSError:
        return []
    return [found[0] for found in counters.finditer(text.decode("utf-8", "replace"))] if status == 200 else []
