"""Spans of a text: what must be kept, what must not be altered, what must not be cut, and where a cut is allowed."""

from __future__ import annotations

from agentopt.capsules._intact import find_intact
from agentopt.capsules._keep import find_keep
from agentopt.capsules._points import clause_points, cut_points, uncuttable

__all__ = ["clause_points", "cut_points", "find_intact", "find_keep", "uncuttable"]
