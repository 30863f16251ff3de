"""Asking the optimizer's language model: structured output where it can, plain text where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentopt.models import LMBadReply, LMOptions, LMRefused

if TYPE_CHECKING:
    from agentopt.models import LM, Message


async def ask(lm: LM, messages: Sequence[Message], *, options: LMOptions, schema: dict[str, Any] | None = None) -> Any:
    """One reply: the parsed object when structured output worked, else the reply's text, else None.

    A model that cannot keep to a schema is asked once more without it. Transport errors, rate limits and an exhausted
    budget are not caught: the search loop decides about those.

    Raises:
        LMError: the call could not be completed.
        BudgetExhausted: the budget does not cover the call.
    """
    if schema is not None:
        try:
            reply = await lm.complete(list(messages), output=schema, options=options)
        except (LMBadReply, LMRefused):
            pass
        else:
            return reply.parsed if reply.parsed is not None else reply.text
    reply = await lm.complete(list(messages), options=options)
    return reply.text


def text_of(reply: Any) -> str:
    """A reply as the assistant turn of a conversation."""
    import json

    if isinstance(reply, str):
        return reply
    return "" if reply is None else json.dumps(reply, ensure_ascii=False, default=str)
