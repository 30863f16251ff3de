"""Seeded draws: every random choice is a pure function of named parts, never of the order of calls."""

from __future__ import annotations

import hashlib
import json
import random


def seeded(*parts: str | int) -> random.Random:
    """A generator whose stream depends on `parts` alone."""
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode("ascii")).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def seed_number(*parts: str | int) -> int:
    """A 31-bit seed for a language model call, from `parts` alone."""
    return seeded(*parts).getrandbits(31)
