"""What a capsule saves in money over a number of calls, with the provider's prompt cache and the answers counted.

Per arm the cost is `fixed + calls * each`. A prefix that is the same in every call is written to the cache by the first
and read by the others (a `hit_rate` below 1 writes again); below the provider's minimum it pays the full price each
time. That is how a shorter prompt can cost more than a longer one. A prompt made anew for each call is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentopt.capsules._types import CostReport
from agentopt.capsules.gating._caching import CachingRule, Lifetime, default_caching
from agentopt.errors import UserError
from agentopt.models import Price, default_prices

Prefix = Literal["static", "query", "tail"]
PREFIXES: tuple[Prefix, ...] = ("static", "query", "tail")


@dataclass(frozen=True, slots=True)
class Rates:
    """USD per million tokens, by how the provider bills them."""

    input: float
    output: float
    read: float
    write: float

    def cost(self, *, input: float = 0, output: float = 0, read: float = 0, write: float = 0) -> float:
        """USD of a bill; here `input` are the tokens that were neither read from the cache nor written to it."""
        return (input * self.input + output * self.output + read * self.read + write * self.write) / 1e6


@dataclass(frozen=True)
class Horizon:
    """How often the prompt is sent, to whom, and what comes with it.

    Raises:
        UserError: a value outside its range.
    """

    model: str | Price
    """`provider/model`, or its price."""
    calls: int = 100
    """How often the prompt (or its capsule) is sent."""
    output_tokens: float = 0
    """Of one answer, with the original."""
    other_tokens: float = 0
    """Further input of each call that differs from call to call, such as the question."""
    shared_tokens: int = 0
    """Input before the prompt that is the same in every call, such as tools: it counts towards the cache's minimum."""
    cached: bool = True
    """Whether the provider's prompt cache is used where there is one."""
    hit_rate: float = 1.0
    """Share of the calls after the first that come while the cache is warm."""
    lifetime: Lifetime = "5m"
    compress_usd: float = 0.0
    """What compressing costs in every call, where it is done anew for each (prefix `query` or `tail`)."""
    caching: CachingRule | Mapping[str, Any] | None = None
    """Instead of the shipped rule for the model."""
    prices: Mapping[str, Any] | None = None
    """Prices over the shipped table, as in `ao.configure(prices=...)`."""

    def __post_init__(self) -> None:
        if self.calls < 1:
            raise UserError(f"calls: found {self.calls}, expected at least 1.")
        if not 0 <= self.hit_rate <= 1:
            raise UserError(f"hit_rate: found {self.hit_rate}, expected a share between 0 and 1.")
        for name in ("output_tokens", "other_tokens", "shared_tokens", "compress_usd"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: found {getattr(self, name)}, expected 0 or more.")

    @property
    def price(self) -> Price:
        """USD per million tokens.

        Raises:
            UserError: none is known.
        """
        if isinstance(self.model, Price):
            return self.model
        table = default_prices() if self.prices is None else default_prices().override(self.prices)
        found = table.of(self.model)
        if found is None:
            raise UserError(
                f"no price is known for {self.model!r}; give it with Horizon(prices={{{self.model!r}: (input, output, "
                "cached input)}) in USD per million tokens."
            )
        return found

    @property
    def rule(self) -> CachingRule | None:
        """How the prompt is cached; None when it is not, or when nothing is known."""
        if not self.cached:
            return None
        if isinstance(self.caching, CachingRule):
            return self.caching
        found = None if isinstance(self.model, Price) else default_caching().of(self.model)
        if self.caching is None:
            return found
        given: dict[str, Any] = {**(vars(found) if found else {}), "scope": "given", **self.caching}
        try:
            return CachingRule(**given)
        except TypeError as error:
            raise UserError(f"caching: {error}.") from None

    @property
    def rates(self) -> Rates:
        """What each kind of token costs."""
        price, rule = self.price, self.rule
        read, write = price.cached_input, 1.0
        if rule is not None:
            write = rule.write_price(self.lifetime)
            # A multiple that was given is meant; else the price list knows better than the rule.
            given = isinstance(self.caching, CachingRule) or (self.caching is not None and "read" in self.caching)
            if read is None or given:
                read = price.input * rule.read
        return Rates(price.input, price.output, price.input if read is None else read, price.input * write)


@dataclass(frozen=True, slots=True)
class _Arm:
    """One way to send the prompt."""

    fixed: float
    each: float
    cached: int

    def total(self, calls: int) -> float:
        return self.fixed + calls * self.each


def _arm(horizon: Horizon, tokens: int, output_tokens: float, *, stable: bool) -> _Arm:
    """Cost of sending `tokens` of prompt; `stable` when they are the same in every call."""
    rates, rule = horizon.rates, horizon.rule
    prefix = horizon.shared_tokens + (tokens if stable else 0)
    total = horizon.shared_tokens + tokens + horizon.other_tokens
    cached = 0 if rule is None else rule.cacheable(prefix)
    written = rule is not None and rule.automatic and total >= rule.minimum
    fresh = rates.write if written else rates.input
    warm = horizon.hit_rate * rates.read + (1 - horizon.hit_rate) * rates.write
    each = cached * warm + (total - cached) * fresh + output_tokens * rates.output
    return _Arm(cached * (rates.write - warm) / 1e6, each / 1e6, cached)


def price_capsule(
    original_tokens: int,
    capsule_tokens: int,
    *,
    horizon: Horizon,
    output_ratio: float = 1.0,
    making_usd: float = 0.0,
    prefix: Prefix = "static",
) -> CostReport:
    """Net cost of a capsule over a horizon.

    Args:
        original_tokens: of the text.
        capsule_tokens: of the capsule.
        horizon: how often it is sent, to which model, with what else.
        output_ratio: output tokens with the capsule over those with the original, as the gate measured them.
        making_usd: what making and gating cost, once.
        prefix: `static` when the capsule is the same in every call; `query` when it is made anew for each call of a
            text that otherwise stays the same; `tail` when the text itself differs from call to call.

    Raises:
        UserError: a value outside its range, or no price is known.
    """
    _check(original_tokens, capsule_tokens, output_ratio, making_usd, prefix)
    before = _arm(horizon, original_tokens, horizon.output_tokens, stable=prefix != "tail")
    after = _arm(horizon, capsule_tokens, horizon.output_tokens * output_ratio, stable=prefix == "static")
    again = 0.0 if prefix == "static" else horizon.compress_usd
    after = _Arm(after.fixed + making_usd, after.each + again, after.cached)
    original_usd, capsule_usd = before.total(horizon.calls), after.total(horizon.calls)
    saving = original_usd - capsule_usd
    pays = saving > 1e-12 * max(original_usd, capsule_usd, 1e-300)
    crossing, first, last = _crossing(before, after)
    case = _Case(horizon, original_tokens, capsule_tokens, output_ratio, making_usd, prefix, before, after, saving)
    return CostReport(
        advice="compress" if pays else "do not compress",
        calls=horizon.calls,
        original_usd=original_usd,
        capsule_usd=capsule_usd,
        making_usd=making_usd + again * horizon.calls,
        saving_usd=saving,
        break_even=first,
        reason=(_praise(case, first, last) if pays else _warning(case, first)) + _unknown(case),
        assumptions={**_assumptions(case), "crossing": crossing, "cheaper_up_to": last},
    )


def _check(original: int, capsule: int, output_ratio: float, making_usd: float, prefix: str) -> None:
    if original < 0 or capsule < 0:
        raise UserError(f"tokens: found {original} and {capsule}, expected 0 or more.")
    if not (math.isfinite(output_ratio) and output_ratio >= 0):
        raise UserError(f"output_ratio: found {output_ratio}, expected 0 or more.")
    if not (math.isfinite(making_usd) and making_usd >= 0):
        raise UserError(f"making_usd: found {making_usd}, expected 0 or more.")
    if prefix not in PREFIXES:
        raise UserError(f"prefix: found {prefix!r}, expected one of {', '.join(PREFIXES)}.")


def _crossing(before: _Arm, after: _Arm) -> tuple[float | None, int | None, int | None]:
    """Where the two costs are equal; from how many calls on the capsule is cheaper; up to how many, when it ends."""
    gain, start = before.each - after.each, after.fixed - before.fixed
    scale = 1e-12 * max(before.each, after.each, 1e-300)
    if abs(gain) <= scale:
        return None, 0 if start < -scale else None, None
    crossing = start / gain
    if gain > 0:
        first = math.floor(crossing + 1e-9) + 1
        return (crossing if crossing > 0 else None), 0 if first <= 1 else first, None
    last = math.ceil(crossing - 1e-9) - 1
    return (crossing if crossing > 0 else None), 0 if last >= 1 else None, max(last, 0)


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything a sentence may speak of."""

    horizon: Horizon
    original: int
    capsule: int
    output_ratio: float
    making_usd: float
    prefix: Prefix
    before: _Arm
    after: _Arm
    saving: float

    @property
    def cache_lost(self) -> bool:
        """The original is read from the cache, below the plain price, and nothing of the capsule's prompt is."""
        rates = self.horizon.rates
        return self.before.cached > 0 and self.after.cached == 0 and rates.read < rates.input

    @property
    def output_usd(self) -> float:
        """What longer (or shorter) answers add over the horizon."""
        grown = self.horizon.output_tokens * (self.output_ratio - 1)
        return grown * self.horizon.rates.output * self.horizon.calls / 1e6


def _praise(case: _Case, first: int | None, last: int | None) -> str:
    calls = case.horizon.calls
    share = case.saving / case.before.total(calls)
    text = (
        f"Over {calls:,} calls the capsule saves {_usd(case.saving)} ({share:.0%} of {_usd(case.before.total(calls))})"
    )
    if last is not None:
        return f"{text}, but only up to {last:,} calls: {_lost(case)}."
    return f"{text}, from the first call on." if not first else f"{text}; it is cheaper from call {first:,} on."


def _warning(case: _Case, first: int | None) -> str:
    calls = case.horizon.calls
    text = f"Over {calls:,} calls the capsule costs {_usd(-case.saving)} more than the original: "
    if case.saving > -1e-12 and case.before.total(calls) == 0:
        return f"Calls of {case.horizon.model} cost nothing, so no money is saved; length and time may still count."
    if case.making_usd > 0 and first:
        return f"{text}making and gating it ({_usd(case.making_usd)}) is earned back from call {first:,} on."
    if case.cache_lost:
        return f"{text}{_lost(case)}{_hint(case)}."
    if case.output_usd > 0 and case.output_usd > -case.saving:
        return (
            f"{text}answers grow by {case.output_ratio - 1:.1%}, which costs {_usd(case.output_usd)}, more than the "
            "shorter input saves; ask for short answers, or send the original."
        )
    if case.prefix != "static" and case.horizon.compress_usd > 0:
        return f"{text}compressing costs {_usd(case.horizon.compress_usd)} in every call."
    if case.capsule >= case.original:
        return f"{text}it has {case.capsule:,} tokens, the original {case.original:,}."
    return f"{text}making and gating it cost {_usd(case.making_usd)}, more than the shorter input ever saves."


def _unknown(case: _Case) -> str:
    """Without a rule a cached original may be cheaper than was counted."""
    horizon = case.horizon
    if not horizon.cached or horizon.rule is not None or horizon.calls == 1 or case.before.each == 0:
        return ""
    what = horizon.model if isinstance(horizon.model, str) else "this price"
    return f" No caching rule is known for {what}, so no prompt cache is counted; Horizon(caching=...) gives one."


def _lost(case: _Case) -> str:
    rule = case.horizon.rule
    minimum = rule.minimum if rule else 0
    if case.prefix == "query":
        return (
            "a capsule made anew for each call is never in the provider's cache, while the original stays there and is "
            f"read at {case.horizon.rates.read / case.horizon.rates.input:.2g} of the price; compress what differs "
            "from call to call, or the text once"
        )
    prefix = case.capsule + case.horizon.shared_tokens
    return (
        f"a prefix of {prefix:,} tokens is below the {minimum:,} from which the provider caches, so every call pays "
        "its full price, while the original is read from the cache"
    )


def _hint(case: _Case) -> str:
    """A longer capsule that stays in the cache, where that pays."""
    rule = case.horizon.rule
    if rule is None or case.prefix != "static":
        return ""
    tokens = -(-rule.minimum // rule.step) * rule.step - case.horizon.shared_tokens
    longer = _arm(case.horizon, tokens, case.horizon.output_tokens * case.output_ratio, stable=True)
    calls = case.horizon.calls
    if tokens >= case.original or longer.total(calls) + case.making_usd >= case.before.total(calls):
        return ""
    return f"; a capsule of {tokens:,} tokens would stay in the cache and cost {_usd(longer.total(calls))}"


def _assumptions(case: _Case) -> dict[str, Any]:
    horizon, rates, rule = case.horizon, case.horizon.rates, case.horizon.rule
    saved = case.before.each - (case.after.each - horizon.output_tokens * (case.output_ratio - 1) * rates.output / 1e6)
    answer = horizon.output_tokens * rates.output / 1e6
    named = isinstance(horizon.model, str)
    return {
        "model": horizon.model if named else "given price",
        "usd_per_million": {"input": rates.input, "output": rates.output, "read": rates.read, "write": rates.write},
        "prices_date": default_prices().date if named and not horizon.prices else "given",
        "caching": None
        if rule is None
        else {
            "minimum": rule.minimum,
            "step": rule.step,
            "automatic": rule.automatic,
            "scope": rule.scope,
            "date": rule.date,
        },
        "prefix": case.prefix,
        "lifetime": horizon.lifetime,
        "hit_rate": horizon.hit_rate,
        "cached_tokens": {"original": case.before.cached, "capsule": case.after.cached},
        "shared_tokens": horizon.shared_tokens,
        "other_tokens": horizon.other_tokens,
        "output_tokens": horizon.output_tokens,
        "output_ratio": case.output_ratio,
        # In the long run; longer answers than that eat up what the shorter input saves.
        "output_ratio_limit": 1 + saved / answer if answer > 0 else None,
        "compress_usd_per_call": horizon.compress_usd if case.prefix != "static" else 0.0,
    }


def _usd(value: float) -> str:
    """Dollars with three figures that count."""
    if value == 0:
        return "$0"
    digits = max(2, 2 - math.floor(math.log10(abs(value))))
    return f"${value:,.{digits}f}"
