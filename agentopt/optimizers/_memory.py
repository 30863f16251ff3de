"""Memory of past rounds: what was tried, what it scored, what became of it. Within a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentopt.graph import StructuredEdit, readable_lines
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._problem import estimate_tokens

if TYPE_CHECKING:
    from agentopt.graph import Edit
    from agentopt.optimizers._protocol import PastProposal

_RECENT = 4
_BEST = 4


def measured(past: PastProposal) -> float | None:
    """The most trustworthy mean score of a past proposal: validation, else screen."""
    return past.validation if past.validation is not None else past.screen


def gain(past: PastProposal) -> float | None:
    """Screen score above its parent's on the same examples; None when unknown."""
    if past.screen is None or past.screen_parent is None:
        return None
    return past.screen - past.screen_parent


def edit_text(edit: Edit, limit: int) -> str:
    """One edit as `name = value`; an edit of a part as `name: what it does` with its fields."""
    if isinstance(edit, StructuredEdit):
        return f"{edit.name}: {edit.kind.replace('_', ' ')} {cut(_fields(edit), limit)}".rstrip()
    data = edit.to_dict()
    value: Any = next((data[key] for key in ("text", "source", "value", "items", "item", "index") if key in data), None)
    lines = readable_lines(value)
    if lines is not None:
        return f"{edit.name} =\n{cut(chr(10).join(lines), limit)}"
    return f"{edit.name} = {cut(value if isinstance(value, str) else shown(value), limit)}"


def _fields(edit: StructuredEdit) -> str:
    """The fields of an edit of a part; names come as they are, texts in quotes, what is not given is left out."""
    data = edit.to_dict()
    given = {key: data[key] for key in data if key not in ("kind", "name") and data[key] not in (None, [])}
    return ", ".join(f"{key}={shown(value)}" for key, value in given.items())


def render_memory(history: Sequence[PastProposal], budget: int) -> str:
    """The best and the latest rounds, oldest first, each with its scores and outcome; '' without history."""
    if not history or budget <= 0:
        return ""
    scored = [(place, measured(past)) for place, past in enumerate(history)]
    best = sorted(
        ((score, place) for place, score in scored if score is not None), key=lambda item: (-item[0], item[1])
    )
    places = {place for _, place in best[:_BEST]} | set(range(max(0, len(history) - _RECENT), len(history)))
    for limit in (1200, 500, 240, 120, 60):
        text = "Earlier rounds, with what they scored:\n" + "\n".join(
            _round(place, history[place], limit) for place in sorted(places)
        )
        if estimate_tokens(text) <= budget:
            return text
    return cut(text, max(40, budget * 3))


def _round(place: int, past: PastProposal, limit: int) -> str:
    scores: list[str] = []
    if past.screen is not None:
        parent = "" if past.screen_parent is None else f" (parent {past.screen_parent:.2f})"
        scores.append(f"minibatch {past.screen:.2f}{parent}")
    if past.validation is not None:
        scores.append(f"validation {past.validation:.2f}")
    outcome = "accepted" if past.accepted else "rejected"
    reason = f": {cut(past.reason, 160)}" if past.reason else ""
    lines = [f"<round {place + 1}> {', '.join(scores) or 'not measured'}; {outcome}{reason}"]
    lines.extend(f"  {edit_text(edit, limit)}" for edit in past.update.edits)
    return "\n".join(lines)
