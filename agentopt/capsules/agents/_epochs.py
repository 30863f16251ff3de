"""When a prefix that a provider has in its cache is worth rewriting: the pricing rule of an append-only history.

Rewriting costs a cache write of everything behind the first changed byte, once; leaving it costs a cache read of what
could have left, on every call. How many calls there will be nobody knows, so the rule is the one of renting or buying:
rewrite when what was paid since the last time for reading what could have left has reached what rewriting costs. It
never pays more than twice what a rule that knew the end would, and in a steady run it finds the best interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentopt.capsules.gating._caching import CachingRule

ASSUMED = CachingRule(1024, scope="assumed: five minutes, as Anthropic asks it")
"""Where nothing is known of the provider."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A prompt as the provider's cache sees it."""

    cached: int
    """Tokens at its beginning that were sent before."""
    tokens: int


def read_tokens(rule: CachingRule, sent: Sent) -> int:
    """How many tokens of a prompt are read from the cache."""
    return min(rule.cacheable(sent.cached), sent.tokens)


def call_cost(rule: CachingRule, sent: Sent) -> float:
    """What the input of one call costs, in tokens at the plain price."""
    if not rule.cacheable(sent.tokens):
        return float(sent.tokens)
    read = read_tokens(rule, sent)
    return rule.read * read + rule.write_price(next(iter(rule.write))) * (sent.tokens - read)


def extra_cost(rule: CachingRule, old: Sent, new: Sent) -> float:
    """What sending a rewritten prompt now costs beyond the one that only grows; below 0 where it is cheaper at once."""
    return call_cost(rule, new) - call_cost(rule, old)


def leftover_cost(rule: CachingRule, old: Sent, new: Sent) -> float:
    """What this call costs beyond the rewritten prompt, had that been in the cache already."""
    added = old.tokens - old.cached
    return max(0.0, call_cost(rule, old) - call_cost(rule, Sent(max(0, new.tokens - added), new.tokens)))


def rule_to_dict(rule: CachingRule) -> dict[str, Any]:
    """A JSON value; `CachingRule(**...)` reads it."""
    return {
        "minimum": rule.minimum,
        "step": rule.step,
        "read": rule.read,
        "write": dict(rule.write),
        "automatic": rule.automatic,
        "scope": rule.scope,
        "date": rule.date,
    }
