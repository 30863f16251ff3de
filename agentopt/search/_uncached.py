"""What a run of the program takes where no reply comes from the cache: the figures one user compares and another pays.

A cached reply is not charged to the budget, yet its tokens and its price are kept in the row's usage, so both figures
are whole on a warm store as well. Its time is not known; seconds are read from the rows that waited for every reply.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentopt.evaluation import EvaluationRow
from agentopt.search._budget import usage_tokens


def input_tokens(row: EvaluationRow) -> int:
    """Prompt tokens of all its calls."""
    return row.usage.input_tokens + row.usage.cached_input_tokens


def tokens(row: EvaluationRow) -> int:
    """Prompt and reply tokens of all its calls."""
    return usage_tokens(row.usage) + row.usage.cached_input_tokens + row.usage.cached_output_tokens


def usd(row: EvaluationRow) -> float | None:
    """The price of all its calls; None when one of them is unknown."""
    cached = row.usage.cached_cost
    return None if row.cost is None or cached is None else row.cost + cached


def told(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """The rows that tell what their cached calls took, where there are any: older versions did not keep it."""
    found = [row for row in rows if row.usage.cached_calls == 0 or tokens(row) > usage_tokens(row.usage)]
    return found or list(rows)


def priced(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """Of those the ones with a known price, where there are any."""
    found = told(rows)
    return [row for row in found if usd(row) is not None] or found


def timed(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    """The rows without a cached call, where there are any: a cached reply takes no time."""
    return [row for row in rows if row.usage.cached_calls == 0] or list(rows)
