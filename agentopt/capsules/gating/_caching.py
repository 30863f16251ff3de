"""Which part of a prompt a provider keeps, and at what multiple of the input price: dated data that may be overridden.

Figures are per model where one is known, else the provider's general ones; `CachingRule.scope` says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from agentopt.errors import UserError

Lifetime = Literal["5m", "1h"]


@dataclass(frozen=True)
class CachingRule:
    """How a provider caches prompt prefixes.

    Raises:
        UserError: a value outside its range.
    """

    minimum: int
    """Tokens a prefix must have to be cached at all; a shorter one pays the full price, silently."""
    step: int = 1
    """Only whole steps of a prefix are cached."""
    read: float = 0.1
    """Price of a cached token as a multiple of the input price."""
    write: Mapping[str, float] = field(default_factory=lambda: {"5m": 1.25, "1h": 2.0})
    """Price of a token that is written to the cache, by how long it lives."""
    automatic: bool = False
    """Cached without being asked for; then every uncached token of a long enough prompt is written."""
    scope: str = "given"
    """What the figures hold for."""
    date: str = ""

    def __post_init__(self) -> None:
        if self.minimum < 0 or self.step < 1 or self.read < 0 or min(self.write.values(), default=-1) < 0:
            raise UserError(
                f"caching rule: found minimum {self.minimum}, step {self.step}, read {self.read}, write "
                f"{dict(self.write)}; expected no negative numbers, a step of at least 1 and a price for writing."
            )

    def cacheable(self, tokens: int) -> int:
        """How many tokens of a prefix of this length are cached."""
        return 0 if tokens < max(self.minimum, 1) else tokens - tokens % self.step

    def write_price(self, lifetime: str) -> float:
        """Multiple of the input price for writing.

        Raises:
            UserError: the provider keeps nothing that long.
        """
        if lifetime not in self.write:
            raise UserError(f"lifetime: found {lifetime!r}, the provider has {', '.join(self.write)}.")
        return self.write[lifetime]


@dataclass(frozen=True)
class CachingTable:
    """Rules by provider, and by model where one differs."""

    date: str
    source: str
    providers: Mapping[str, Mapping[str, Any]]

    def of(self, model: str) -> CachingRule | None:
        """The rule for `provider/model`, the longest model name that begins it first; None for unknown providers."""
        provider, _, name = model.rpartition("#")[2].partition("/")
        found = self.providers.get(provider)
        if found is None:
            return None
        general: dict[str, Any] = {key: value for key, value in found.items() if key != "models"}
        models = cast("Mapping[str, Mapping[str, Any]]", found.get("models", {}))
        known = [key for key in models if name == key or name.startswith((f"{key}-", f"{key}:", f"{key}@"))]
        if known:
            best = max(known, key=len)
            general = {**general, **models[best], "scope": f"{provider}/{best}"}
        return CachingRule(**general, date=self.date)

    def override(self, rules: Mapping[str, Mapping[str, Any]]) -> CachingTable:
        """A table with these rules laid over: `{"provider": {...}}` or `{"provider/model": {...}}`.

        Raises:
            UserError: a rule has unknown keys or unusable values.
        """
        providers = {name: dict(rule) for name, rule in self.providers.items()}
        for name, rule in rules.items():
            provider, _, model = name.partition("/")
            if provider not in providers and "minimum" not in rule:
                raise UserError(f"caching rule of {name!r}: a new provider needs at least its minimum.")
            place = providers.setdefault(provider, {})
            if model:
                place["models"] = {**place.get("models", {}), model: {**place.get("models", {}).get(model, {}), **rule}}
            else:
                place.update(rule)
        table = replace(self, providers=providers)
        for name in rules:
            try:
                table.of(name if "/" in name else f"{name}/any")
            except TypeError as error:
                raise UserError(f"caching rule of {name!r}: {error}.") from None
        return table


def load_caching(path: str | Path) -> CachingTable:
    """Read a file of the shipped form (`date`, `source`, `providers`).

    Raises:
        UserError: the file is missing, is no JSON, or holds something else.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"caching file {str(path)!r}: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"caching file {str(path)!r} is not JSON: {error}.") from error
    table = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if not isinstance(table.get("providers"), dict):
        raise UserError(
            f'caching file {str(path)!r}: expected {{"date": "...", "providers": {{"openai": {{"minimum": 1024}}}}}}.'
        )
    empty = CachingTable(str(table.get("date", "")), str(table.get("source", "")), {})
    return empty.override(table["providers"])


@cache
def default_caching() -> CachingTable:
    """The table shipped with agentopt."""
    return load_caching(Path(str(files("agentopt.capsules.gating") / "caching.json")))
