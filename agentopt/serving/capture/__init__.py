"""Captured traffic: requests and replies as redacted traces in the store, and what users say of them."""

from __future__ import annotations

from agentopt.serving.capture._feedback import FeedbackStore, GivenFeedback
from agentopt.serving.capture._forget import Chosen, forget, forget_old
from agentopt.serving.capture._recorder import Recorder
from agentopt.serving.capture._redact import Redaction
from agentopt.serving.capture._sessions import Capturing

__all__ = [
    "Capturing",
    "Chosen",
    "FeedbackStore",
    "GivenFeedback",
    "Recorder",
    "Redaction",
    "forget",
    "forget_old",
]
