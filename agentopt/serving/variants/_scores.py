"""What each variant was asked, what it cost and how its replies were liked, with intervals.

Intervals are 95 % ones. Feedback of thumbs (-1 or 1) gets the exact binomial interval (Clopper & Pearson 1934), other
scores the BCa bootstrap, and many of either what comes to the same at that number and costs nothing. The difference of
two variants combines their intervals (MOVER: Zou & Donner, Statistics in Medicine 27, 2008), which needs no pairs: no
user sees both variants. Too little feedback gets no interval at all.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Protocol

from agentopt.serving._types import Exchange
from agentopt.serving.variants._virtual import Variant, VirtualModel

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_FEWEST = 10
"""Scores that are not all thumbs get an interval from so many on."""
_MANY = 2_000
"""From so many scores on, the exact interval is Wilson's and the bootstrap's the normal one, which cost nothing."""
_REMEMBERED = 10_000
"""Requests whose score is remembered, so that a second thought replaces the first."""
_STEPS = 1_000
"""Scores are kept in thousandths: memory stays bounded, whatever is sent."""

Interval = tuple[float, float]


class Given(Protocol):
    """Feedback that was stored, as the feedback sink tells it."""

    request_id: str
    asked: str
    variant: str | None
    score: float | None


@dataclass(slots=True)
class _Tally:
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    timed: int = 0
    scores: Counter[int] = field(default_factory=Counter[int])
    """In thousandths."""


@dataclass(frozen=True, slots=True)
class Liking:
    """Feedback on one variant."""

    n: int = 0
    mean: float | None = None
    interval: Interval | None = None
    """None: too little feedback to say."""
    method: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON value."""
        interval = None if self.interval is None else list(self.interval)
        return {"n": self.n, "mean": self.mean, "interval": interval, "method": self.method}


class VariantScores:
    """Counts per variant; an observer of the gateway. Safe to use from several threads."""

    def __init__(self, virtual: Sequence[VirtualModel]) -> None:
        self._virtual = tuple(virtual)
        self._lock = threading.Lock()
        self._tallies = {(model.name, variant.label): _Tally() for model in virtual for variant in model.variants}
        self._latest: OrderedDict[str, float] = OrderedDict()

    # ---- counting

    def wants_reply(self, exchange: Exchange) -> bool:
        """Never: counts are enough."""
        return False

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        """Count one exchange. A client that hung up is no error; what no engine saw does not count at all."""
        tally = self._tallies.get((exchange.asked, exchange.variant or ""))
        if tally is None or (not exchange.sent and exchange.status < 500):
            return
        with self._lock:
            tally.requests += 1
            failed = exchange.status >= 400 or exchange.error is not None
            tally.errors += failed and exchange.error not in ("client_gone", "key_revoked") and exchange.status != 499
            if exchange.use is not None:
                tally.prompt_tokens += exchange.use.prompt
                tally.completion_tokens += exchange.use.completion
            if exchange.ended is not None and not failed:
                tally.seconds += exchange.ended - exchange.began
                tally.timed += 1

    def feedback(self, model: str, variant: str | None, score: float | None, *, request: str | None = None) -> None:
        """Count a score in [-1, 1].

        Args:
            model: the virtual model's name.
            variant: the label.
            score: None, or feedback on something else than a virtual model, counts for nothing.
            request: the id of the request; a later score of the same one replaces the earlier.
        """
        tally = self._tallies.get((model, variant or ""))
        if tally is None or score is None or not -1 <= score <= 1:
            return
        with self._lock:
            if request is not None:
                before = self._latest.pop(request, None)
                if before is not None:
                    tally.scores[round(before * _STEPS)] -= 1
                self._latest[request] = score
                if len(self._latest) > _REMEMBERED:
                    self._latest.popitem(last=False)
            tally.scores[round(score * _STEPS)] += 1

    def heard(self, given: Given) -> None:
        """Count feedback that was stored; a listener of the feedback sink."""
        self.feedback(given.asked, given.variant, given.score, request=given.request_id)

    def identities(self) -> dict[str, str | None]:
        """`NAME/LABEL` → the candidate's hash: what makes the counts of an earlier server those of the same thing."""
        return {f"{model.name}/{entry.label}": entry.hash for model in self._virtual for entry in model.variants}

    def restore(self, rows: Iterable[Mapping[str, Any]], identities: Mapping[str, str | None]) -> int:
        """Count feedback that an earlier server stored; gives how many rows counted.

        Args:
            rows: maps with exchange_id, asked, variant and score, oldest first.
            identities: what `identities()` gave in that server; labels that stood for another candidate are left out.
        """
        same = {name for name, hash_ in self.identities().items() if name in identities and identities[name] == hash_}
        count = 0
        for row in rows:
            name, label, score = row.get("asked"), row.get("variant"), row.get("score")
            if f"{name}/{label}" in same and isinstance(score, (int, float)):
                self.feedback(str(name), str(label), float(score), request=str(row.get("exchange_id")))
                count += 1
        return count

    # ---- what can be said

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object for each variant, in the order in which they were given. Some milliseconds of CPU.

        Each is compared with the plain base where that is a variant, else with the first one.
        """
        rows: list[dict[str, Any]] = []
        for model in self._virtual:
            likings: dict[str, tuple[_Tally, Liking]] = {}
            for variant in model.variants:
                tally, scores = self._copy(model, variant)
                likings[variant.label] = tally, liking_of(scores)
            reference = next((one for one in model.variants if one.rewrite is None), model.variants[0])
            for variant in model.variants:
                tally, liking = likings[variant.label]
                base = None if variant is reference else (reference, likings[reference.label][1])
                rows.append(_row(model, variant, tally, liking, base))
        return rows

    def _copy(self, model: VirtualModel, variant: Variant) -> tuple[_Tally, dict[float, int]]:
        with self._lock:
            tally = self._tallies[model.name, variant.label]
            return tally, {step / _STEPS: count for step, count in sorted(tally.scores.items()) if count > 0}


def liking_of(scores: Mapping[float, int]) -> Liking:
    """Mean and interval of scores, given with their counts."""
    n = sum(scores.values())
    if n == 0:
        return Liking()
    mean = math.fsum(score * count for score, count in scores.items()) / n
    if set(scores) <= {-1.0, 1.0}:
        up = scores.get(1.0, 0)
        return Liking(n, mean, _wilson(up, n), "Wilson") if n > _MANY else Liking(n, mean, _thumbs(up, n), "exact")
    if n < _FEWEST or len(scores) == 1:
        return Liking(n, mean, None, "too few" if n < _FEWEST else "all alike")
    if n > _MANY:
        spread = math.fsum(count * (score - mean) ** 2 for score, count in scores.items()) / (n - 1)
        reach = _Z * math.sqrt(spread / n)
        return Liking(n, mean, (max(-1.0, mean - reach), min(1.0, mean + reach)), "normal")
    from agentopt.evaluation import bootstrap_interval  # numpy, when somebody looks

    values = [score for score, count in scores.items() for _ in range(count)]
    return Liking(n, mean, bootstrap_interval(values, CONFIDENCE), "BCa bootstrap")


def _thumbs(up: int, n: int) -> Interval:
    """The exact interval of the share of thumbs up, on the scale from -1 to 1."""
    from agentopt.evaluation import binomial_lower_bound

    each = 1 - (1 - CONFIDENCE) / 2
    low, high = binomial_lower_bound(up, n, each), 1 - binomial_lower_bound(n - up, n, each)
    return 2 * low - 1, 2 * high - 1


def _wilson(up: int, n: int) -> Interval:
    """The score interval (Wilson 1927), on the scale from -1 to 1."""
    share, square = up / n, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    reach = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return 2 * max(0.0, middle - reach) - 1, 2 * min(1.0, middle + reach) - 1


def difference(base: Liking, other: Liking) -> tuple[float | None, Interval | None]:
    """How much better `other` is liked than `base`, and the interval of that."""
    if base.mean is None or other.mean is None:
        return None, None
    gap = other.mean - base.mean
    if base.interval is None or other.interval is None:
        return gap, None
    down = math.hypot(other.mean - other.interval[0], base.interval[1] - base.mean)
    up = math.hypot(other.interval[1] - other.mean, base.mean - base.interval[0])
    return gap, (gap - down, gap + up)


def _row(
    model: VirtualModel, variant: Variant, tally: _Tally, liking: Liking, base: tuple[Variant, Liking] | None
) -> dict[str, Any]:
    against: dict[str, Any] | None = None
    if base is not None:
        gap, interval = difference(base[1], liking)
        shown = None if interval is None else not interval[0] <= 0 <= interval[1]
        shape = None if interval is None else list(interval)
        against = {"variant": base[0].label, "difference": gap, "interval": shape, "shown": shown}
    return {
        "model": model.name,
        "variant": variant.label,
        "file": variant.file,
        "hash": variant.hash,
        "weight": model.share(variant),
        "adapter": variant.adapter,
        "requests": tally.requests,
        "errors": tally.errors,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "mean_ms": 1000 * tally.seconds / tally.timed if tally.timed else None,
        "feedback": liking.to_dict(),
        "against": against,
    }
