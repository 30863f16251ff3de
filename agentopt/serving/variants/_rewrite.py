"""From a client's request to the engine's, for one candidate: one function for each route.

What the engine gets is what `LM.complete(turns, system=..., demos=...)` sends in the measured program. Routes in which
that cannot be had (raw completions have no turns, a stored conversation cannot be seen) are refused, not approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.models import LMOptions
from agentopt.serving._types import CHAT, COUNT, MESSAGES, RESPONSES, Refusal
from agentopt.serving.variants._roles import Parts
from agentopt.serving.variants._texts import given_variables, plain_text, values_for
from agentopt.serving.variants._turns import (
    Turn,
    join_system,
    last_user,
    said,
    shown,
    split_system,
    with_cue,
    with_text,
)

_STORED = ("previous_response_id", "conversation", "prompt")
_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass(frozen=True, slots=True)
class Rewriting:
    """The rewriting of one candidate."""

    parts: Parts
    temperature: float | None = LMOptions().temperature
    """For requests that name none: that of `LMOptions`, with which programs are measured. None: the engine's."""
    continues: bool | None = None
    """Ask the engine to go on with the cue instead of answering after it; None: where it is known to understand."""
    _shown: dict[str, list[Turn]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        beginnings = ("", self.parts.cue)
        object.__setattr__(self, "_shown", {text: shown(self.parts.demos, text) for text in beginnings})

    def __call__(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """The body for the engine, a new object; the model's name is left alone.

        Raises:
            Refusal: 400, the request does not fit this model.
        """
        if route == CHAT:
            made = self._chat(body)
        elif route in (MESSAGES, COUNT):
            made = self._anthropic(body)
        elif route == RESPONSES:
            made = self._responses(body)
        else:
            raise Refusal(
                400,
                f"This model is a tuned prompt, made of chat turns, and {route} has none; use {CHAT}, {MESSAGES} or "
                f"{RESPONSES}, or ask for the base model.",
                param="model",
            )
        made.pop("agentopt", None)
        if self.temperature is not None and route != COUNT and made.get("temperature") is None:
            made["temperature"] = self.temperature
        return made

    def finish(self, route: str, reply: bytes) -> bytes:
        """A whole reply without the cue: llama.cpp repeats in it what the answer was begun with, but not in streams."""
        cue = self.parts.cue
        try:
            read: Any = json.loads(reply)
            places = read["content"] if route == MESSAGES else [choice["message"] for choice in read["choices"]]
            name = "text" if route == MESSAGES else "content"
            begun = [place for place in places if isinstance(text := place.get(name), str) and text.startswith(cue)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return reply
        if not cue or not begun:
            return reply
        for place in begun:
            place[name] = place[name][len(cue) :]
        return json.dumps(read, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        turns, theirs = split_system(_turns(body, "messages"))
        cue = "" if body.get("tools") else self.parts.cue  # as in `conversation`
        system, turns = self._filled(body, turns)
        system = join_system(system, theirs)
        begun = with_cue(turns, cue)
        if not begun:
            if not system:
                raise Refusal(400, "messages: found none, expected at least one user message.", param="messages")
            made = {**body, "messages": self._with_demos([{"role": "user", "content": system}])}
        else:
            before: list[Turn] = [] if system is None else [{"role": "system", "content": system}]
            made = {**body, "messages": [*before, *self._with_demos(begun)]}
        if begun is not turns and self.continues and not _CONTINUE.keys() & body.keys():
            made.update(_CONTINUE)
        return made

    def _anthropic(self, body: dict[str, Any]) -> dict[str, Any]:
        turns = [dict(turn) for turn in _turns(body, "messages")]
        system, turns = self._filled(body, turns)
        theirs = body.get("system")
        joined = join_system(system, None if theirs is None else said({"content": theirs}))
        made = {**body, "messages": self._with_demos(with_cue(turns, "" if body.get("tools") else self.parts.cue))}
        if system is not None and joined:
            made["system"] = joined
        return made

    def _responses(self, body: dict[str, Any]) -> dict[str, Any]:
        stored = [name for name in _STORED if body.get(name) is not None]
        if stored:
            raise Refusal(
                400,
                f"{stored[0]}: this model is a tuned prompt and must see the whole conversation; send it in `input`.",
                param=stored[0],
            )
        if self.parts.cue and not body.get("tools"):
            raise Refusal(
                400,
                f"This model begins its answers with given words, which {RESPONSES} has no form for; use {CHAT}.",
                param="model",
            )
        given = body.get("input", [])
        items = [{"role": "user", "content": given}] if isinstance(given, str) else _turns(body, "input")
        turns, theirs = split_system(items)
        system, turns = self._filled(body, turns, "input_text")
        said_too = body.get("instructions")
        theirs = join_system(said_too if isinstance(said_too, str) else None, theirs)
        joined = join_system(system, theirs)
        made = {**body, "input": self._with_demos(turns)}
        if joined:
            made["instructions"] = joined
        return made

    def _filled(self, body: Mapping[str, Any], turns: list[Turn], kind: str = "text") -> tuple[str | None, list[Turn]]:
        """The system text, and the turns with the user's template around what the user said."""
        parts = self.parts
        texts = [text for text in (parts.system, parts.user) if text is not None]
        known = tuple(dict.fromkeys(name for text in texts for name in text.variables))
        given = given_variables(body)
        if not known and not given:
            return (None if parts.system is None else parts.system.text), turns
        place = last_user(turns)
        user_text = None if place is None else said(turns[place])
        filled = [text.filled(values_for(text, given, user_text, known)) for text in texts]
        if not texts:
            values_for(plain_text(""), given, None, ())  # refuses them
        system = filled[0] if parts.system is not None else None
        if parts.user is None:
            return system, turns
        if place is None:
            return system, [*turns, {"role": "user", "content": filled[-1]}]
        return system, [*turns[:place], with_text(turns[place], filled[-1], kind), *turns[place + 1 :]]

    def _with_demos(self, turns: list[Turn]) -> list[Turn]:
        """The turns with the demonstrations before the last one of the user's, as `LM.complete` places them."""
        if not self.parts.demos:
            return turns
        beginning = turns[-1].get("content") if turns and turns[-1].get("role") == "assistant" else ""
        known = self._shown.get(beginning) if isinstance(beginning, str) else None
        examples = shown(self.parts.demos, beginning) if known is None else known
        place = last_user(turns)
        place = len(turns) if place is None else place
        return [*turns[:place], *examples, *turns[place:]]


def _turns(body: Mapping[str, Any], name: str) -> Sequence[Turn]:
    """The body's list of messages or items, checked as far as it is read here."""
    turns: Any = body.get(name, [])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in cast("list[Any]", turns)):
        raise Refusal(400, f"{name}: expected a list of messages, found another form.", param=name)
    return cast("list[Turn]", turns)
