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
from agentopt.models._protocol import Client, LMOptions, Message, Reply, ReplyCache, Request, ToolCall

__all__ = [
    "BudgetExhausted",
    "Client",
    "LMBadReply",
    "LMError",
    "LMOptions",
    "LMRateLimit",
    "LMRefused",
    "LMTimeout",
    "LMUnavailable",
    "Message",
    "Reply",
    "ReplyCache",
    "Request",
    "ToolCall",
    "UnknownModel",
]
