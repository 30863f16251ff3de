"""What a call costs: a dated table of USD per million tokens, with overrides. An unknown price is None, never 0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import Usage


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float
    cached_input: float | None = None
    """For input tokens read from the provider's prompt cache; None: like other input."""

    def cost(self, usage: Usage) -> float:
        """USD for `usage`, whose `cached_tokens` are part of its `input_tokens`."""
        cached = min(usage.cached_tokens, usage.input_tokens)
        cached_rate = self.input if self.cached_input is None else self.cached_input
        fresh = usage.input_tokens - cached
        return (fresh * self.input + cached * cached_rate + usage.output_tokens * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Prices by client name (`provider/model`), with the date they were true."""

    date: str = ""
    source: str = ""
    prices: Mapping[str, Price] = field(default_factory=dict[str, Price])

    def of(self, name: str) -> Price | None:
        """The price of a client name; with an endpoint in it (`...:URL#model`) an override of `model` counts too."""
        found = self.prices.get(name)
        if found is None and "#" in name:
            found = self.prices.get(name.rpartition("#")[2])
        return found

    def cost(self, name: str, usage: Usage) -> float | None:
        """USD, or None when the price of `name` is not known."""
        price = self.of(name)
        return None if price is None else price.cost(usage)

    def override(self, prices: Mapping[str, Price | Sequence[float] | Mapping[str, float]]) -> PriceTable:
        """A table with `prices` laid over this one: `{"provider/model": (input, output[, cached input])}`.

        Raises:
            UserError: a price has another form or is negative.
        """
        return replace(self, prices={**self.prices, **{name: _price(name, value) for name, value in prices.items()}})


def _price(name: str, value: object) -> Price:
    try:
        if isinstance(value, Price):
            price = value
        elif isinstance(value, Mapping):
            price = Price(**{str(key): float(number) for key, number in cast("Mapping[Any, Any]", value).items()})
        else:
            price = Price(*(float(number) for number in cast("Sequence[Any]", value)))
    except (TypeError, ValueError):
        price = None
    if price is None or min(price.input, price.output, price.cached_input or 0.0) < 0:
        raise UserError(
            f"price of {name!r}: found {value!r}, expected [input, output] or [input, output, cached input] "
            "in USD per million tokens, none negative"
        )
    return price


def load_prices(path: str | Path) -> PriceTable:
    """Read a price file of the shipped form (`date`, `models`).

    Raises:
        UserError: the file is missing, is no JSON, or holds something else.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"price file {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"price file {str(path)!r} is not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(cast("dict[str, Any]", data).get("models"), dict):
        raise UserError(
            f'price file {str(path)!r}: expected {{"date": "...", "models": {{"provider/model": [in, out]}}}}'
        )
    table = cast("dict[str, Any]", data)
    empty = PriceTable(str(table.get("date", "")), str(table.get("source", "")))
    return empty.override(table["models"])


@cache
def default_prices() -> PriceTable:
    """The table shipped with agentopt."""
    return load_prices(Path(str(files("agentopt.models") / "prices.json")))
