"""Language models: one contract (`LM`) over any provider, with cache, throttle, retries, prices and recording."""

from __future__ import annotations

from agentopt.models._errors import (
    BudgetExhausted,
    LMBadReply,
    LMError,
    LMRateLimit,
    LMRefused,
    LMTimeout,
    LMUnavailable,
    UnknownModel,
)
from agentopt.models._lm import LM, LMSettings, reply_watch, spend_guard
from agentopt.models._protocol import Client, LMOptions, Message, Reply, ReplyCache, Request, ToolCall

__all__ = [
    "LM",
    "BudgetExhausted",
    "Client",
    "LMBadReply",
    "LMError",
    "LMOptions",
    "LMRateLimit",
    "LMRefused",
    "LMSettings",
    "LMTimeout",
    "LMUnavailable",
    "Message",
    "Reply",
    "ReplyCache",
    "Request",
    "ToolCall",
    "UnknownModel",
    "reply_watch",
    "spend_guard",
]
