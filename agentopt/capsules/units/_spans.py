"""Spans of a text: what must be kept, what must not be altered, what must not be cut."""

from __future__ import annotations

from agentopt.capsules.units._intact import find_intact
from agentopt.capsules.units._keep import find_keep
from agentopt.capsules.units._points import uncuttable

__all__ = ["find_intact", "find_keep", "uncuttable"]
