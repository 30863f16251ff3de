"""Text measures that the named metrics are made of: normalization, token overlap, numbers in prose."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")


def normalize(text: str) -> str:
    """Lower case, NFKC, no ASCII punctuation, no English articles, single spaces (SQuAD's normalization)."""
    lowered = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def token_f1(output: str, expected: str) -> float:
    """Harmonic mean of precision and recall over normalized tokens; two empty texts agree."""
    found, wanted = normalize(output).split(), normalize(expected).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def last_number(text: str) -> float | None:
    """The last number in a text (thousands separators allowed), or None."""
    values = [match.group() for match in _NUMBER.finditer(text) if any(c.isdigit() for c in match.group())]
    if not values:
        return None
    try:
        return float(values[-1].replace(",", "").replace("−", "-"))
    except ValueError:
        return None
