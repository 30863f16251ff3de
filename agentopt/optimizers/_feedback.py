"""What is said about one rollout, and the graphs backward makes of it.

The unit is one rollout. Feedback is text built from facts only: score, what came out, what was expected, the metric's
own words, the error with the op and line it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentopt.graph import Feedback, backward

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.graph import Subgraph


def feedback_text(rollout: Rollout, limit: int = 400) -> str:
    """One paragraph on one rollout; values longer than `limit` characters are cut with a visible mark."""
    row, example = rollout.row, rollout.example
    parts = [f"score {row.score:.2f}."]
    if row.error:
        parts.append(f"The run failed: {cut(error_text(row.error), limit)}")
    elif example.expected is not None and row.score < 1.0:
        parts.append(f"Expected {cut(shown(example.expected), limit)}, got {cut(shown(row.output), limit)}.")
    if row.feedback and not (row.error and row.feedback in error_text(row.error)):
        parts.append(cut(str(row.feedback), 2 * limit))
    elif not row.error and row.score >= 1.0:
        parts.append("Correct.")
    return " ".join(parts)


def error_text(error: Any) -> str:
    """The text of a recorded error, whether it is an `ErrorRecord`, its dict form or a plain string."""
    if isinstance(error, Mapping):
        return f"{error.get('type', 'error')}: {error.get('message', '')}"  # pyright: ignore[reportUnknownMemberType]
    text = getattr(error, "text", None)
    return text if isinstance(text, str) else str(error)


def shown(value: Any) -> str:
    """A value as a person would write it: texts in quotes, everything else by repr."""
    return repr(value)


def cut(text: str, limit: int) -> str:
    """Truncate by value: head and tail stay, the middle becomes `[+N chars]`."""
    if len(text) <= limit:
        return text
    mark = f" [+{len(text) - limit} chars] "
    head = max(1, (limit * 2) // 3)
    tail = max(0, limit - head)
    return text[:head] + mark + (text[len(text) - tail :] if tail else "")


def graphs_of(rollouts: Sequence[Rollout]) -> list[Mapping[str, Subgraph]]:
    """For each rollout: parameter name → subgraph of its feedback; empty where there is no trace."""
    found: list[Mapping[str, Subgraph]] = []
    for rollout in rollouts:
        trace = rollout.trace
        if trace is None or trace.output_id is None:
            found.append({})
            continue
        item = Feedback(trace.output_id, feedback_text(rollout), rollout.row.score)
        found.append(backward(trace, [item]))
    return found
