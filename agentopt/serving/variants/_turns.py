"""The turns that a tuned program sends, made from the turns that a client sends.

`LM.complete(turns, system=..., demos=...)` decides how a system text, demonstrations and the beginning of an answer
become chat turns; what was measured was measured in that form. Here the same turns are made for a client's request,
and the demonstrations are laid out by that very code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentopt.models._messages import build

Turn = dict[str, Any]

_INSTRUCTING = ("system", "developer")


def conversation(
    messages: Sequence[Mapping[str, Any]], *, system: str | None, cue: str = "", tools: object = None
) -> tuple[list[Turn], str | None]:
    """What to call `LM.complete` with for a client's chat messages: the turns, and the system text.

    The client's own leading system (or developer) turns come below `system` in one text, because many chat templates
    take only one such turn, and only in front. The cue, the first words of the answer, becomes an assistant turn after
    the last user turn.

    Args:
        messages: OpenAI chat messages.
        system: the program's system text; None or "" for none.
        cue: the first words of the answer; "" for none.
        tools: what the model may call. With tools there is no cue: an answer that is begun cannot be a call.
    """
    turns, theirs = split_system(messages)
    return with_cue(turns, "" if tools else cue), join_system(system or None, theirs)


def with_cue(turns: list[Turn], cue: str) -> list[Turn]:
    """The turns with the beginning of the answer behind them, when it is the user who spoke last."""
    if not cue or not turns or last_user(turns) != len(turns) - 1:
        return turns
    return [*turns, {"role": "assistant", "content": cue}]


def split_system(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], str | None]:
    """The turns after the leading system turns, and the text of those; None when there are none."""
    count = 0
    for message in messages:
        if message.get("role") not in _INSTRUCTING:
            break
        count += 1
    texts = [said(message) for message in messages[:count]]
    return [dict(message) for message in messages[count:]], "\n\n".join(texts) if texts else None


def join_system(ours: str | None, theirs: str | None) -> str | None:
    """One system text of the program's and the client's; the program's stands first."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    return "\n\n".join(text for text in (ours, theirs) if text)


def shown(demos: Sequence[Mapping[str, Any]], beginning: Any) -> list[Turn]:
    """The demonstrations as turns. `beginning`: content of a trailing assistant turn, "" when there is none."""
    if not demos:
        return []
    turns: list[Turn] = [{"role": "user", "content": ""}]
    if beginning != "":
        turns.append({"role": "assistant", "content": beginning})
    made = build(turns, None, None, list(demos)).messages
    return [dict(turn) for turn in made[: 2 * len(demos)]]


def last_user(turns: Sequence[Mapping[str, Any]]) -> int | None:
    """Where the last turn stands in which the user says something; None when there is none.

    A turn that only hands back the results of tools (Anthropic's form) is none of the user's: nothing may come between
    it and the call it answers.
    """
    for index in range(len(turns) - 1, -1, -1):
        if turns[index].get("role") == "user" and not _only_results(turns[index].get("content")):
            return index
    return None


def _only_results(content: Any) -> bool:
    if not isinstance(content, list) or not content:
        return False
    parts = cast("list[Any]", content)
    return all(isinstance(part, dict) and cast("Turn", part).get("type") == "tool_result" for part in parts)


def said(turn: Mapping[str, Any]) -> str:
    """The text of one turn in any of the forms that the routes have."""
    content = turn.get("content")
    if isinstance(content, str):
        return content
    parts = cast("list[Any]", content) if isinstance(content, list) else []
    texts = (cast("Turn", part).get("text") for part in parts if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def with_text(turn: Mapping[str, Any], text: str, kind: str = "text") -> Turn:
    """The turn with another text; its images and files stay, behind the text. `kind`: the type of a text part."""
    content = turn.get("content")
    if not isinstance(content, list):
        return {**turn, "content": text}
    parts = cast("list[Any]", content)
    kept = [part for part in parts if not _is_text(part)]
    return {**turn, "content": [{"type": kind, "text": text}, *kept] if kept else text}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(cast("Turn", part).get("text"), str)
