"""Asking the optimizer's language model: structured output where it can, plain text where it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentopt.models import LMBadReply, LMOptions, LMRefused

if TYPE_CHECKING:
    from agentopt.models import LM, Message


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply: the parsed object or the text. `repaired` tells that a repair round was spent on it already."""

    reply: Any
    repaired: bool = False


async def ask(lm: LM, messages: Sequence[Message], *, options: LMOptions, schema: dict[str, Any] | None) -> Answer:
    """One answer. With a `schema` the model is held to it (`LM` spends one repair round of its own on that).

    A model that cannot keep to it, or a provider that does not know schemas, is asked once more in plain text.
    Transport errors, rate limits and an exhausted budget are not caught: the search loop decides about those.

    Raises:
        LMError: the call could not be completed.
        BudgetExhausted: the budget does not cover the call.
    """
    repaired = False
    if schema is not None:
        try:
            reply = await lm.complete(list(messages), output=schema, options=options)
        except LMBadReply:
            repaired = True
        except LMRefused:
            pass  # also raised for a wrong key; then the plain request raises it again
        else:
            return Answer(reply.parsed if reply.parsed is not None else reply.text, repaired=True)
    reply = await lm.complete(list(messages), options=options)
    return Answer(reply.text, repaired)


def text_of(reply: Any) -> str:
    """A reply as the assistant turn of a conversation."""
    if isinstance(reply, str):
        return reply
    return "" if reply is None else json.dumps(reply, ensure_ascii=False, default=str)
