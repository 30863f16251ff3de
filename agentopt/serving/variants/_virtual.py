"""A virtual model: a name that clients ask for, and the candidates that answer it, by weight."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from agentopt.serving._types import Exchange


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a virtual model is answered."""

    label: str
    """Unique within the virtual model."""
    weight: float = 1.0
    """Its share of the requests, relative to the other variants'; 0 for none."""
    rewrite: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    """None: the request goes on as it is."""
    hash: str | None = None
    """The candidate's; None for the plain base."""
    file: str | None = None
    adapter: str | None = None
    """Answered with this adapter instead of the plain base."""


@dataclass(frozen=True, slots=True)
class VirtualModel:
    """A model name that stands for tuned prompts."""

    name: str
    variants: tuple[Variant, ...]

    def pick(self, sticky: str) -> Variant:
        """The variant for whoever `sticky` is: always the same one, whatever came before.

        Weighted rendezvous hashing: when a variant or its weight changes, only those change their variant who must.
        """
        if len(self.variants) == 1:
            return self.variants[0]
        return max(self.variants, key=lambda variant: _height(self.name, variant, sticky))

    def share(self, variant: Variant) -> float:
        """The part of the requests that it is meant to get, 0 to 1."""
        return variant.weight / sum(other.weight for other in self.variants)


def _height(model: str, variant: Variant, sticky: str) -> float:
    """A draw of an exponential variable with the weight as its mean's inverse, upside down: the highest one wins."""
    if variant.weight <= 0:
        return -math.inf
    told = "\0".join((model, variant.label, sticky)).encode("utf-8", "surrogatepass")
    draw = (int.from_bytes(hashlib.sha256(told).digest()[:8], "big") + 0.5) / 2**64
    return math.log(draw) / variant.weight


def sticky_of(exchange: Exchange) -> str:
    """Who is asking, as far as the request says it: the session, the user, else this request alone."""
    if exchange.session:
        return f"session:{exchange.session}"
    user = exchange.body.get("user")
    metadata = exchange.body.get("metadata")
    if user is None and isinstance(metadata, dict):
        user = cast("dict[str, Any]", metadata).get("user_id")
    if isinstance(user, str) and user:
        return f"user:{user}"
    return f"request:{exchange.id}"
