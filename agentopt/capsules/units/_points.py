"""Which sentences may never be cut: those that mean something else without one of their parts."""

from __future__ import annotations

import re

from agentopt.capsules.units._intact import CONDITIONS, NEGATIONS, QUANTIFIERS

_UNCUTTABLE = re.compile(
    rf"\b(?:{NEGATIONS}|{QUANTIFIERS}|{CONDITIONS})\b|[不没未非无別勿]|全部|所有|每|只|仅|至少|最多|除非|除了|如果|若|直到|ない|なら",
    re.VERBOSE | re.IGNORECASE,
)


def uncuttable(text: str) -> bool:
    """Whether `text` has a negation, a quantifier, a condition or an exception: it stays whole or leaves whole."""
    return _UNCUTTABLE.search(text) is not None
