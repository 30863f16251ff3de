"""The one statement that a run makes about the test set.

`improved` needs both: p < .05 two-sided on the paired test (exact McNemar for 0/1 scores, sign-flip permutation
otherwise) and a BCa interval that lies above zero. Below 30 test rows nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from agentopt.evaluation import TestResult, paired_test, smallest_detectable_difference

ClaimStatus = Literal["improved", "not_improved", "worse", "no_claim", "kept_baseline"]

MIN_ROWS = 30
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Claim:
    """What may be said after the test set was used once. Means, difference and interval are on the metric's scale."""

    status: ClaimStatus
    n: int
    text: str
    baseline_mean: float | None = None
    tuned_mean: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    test: str | None = None
    smallest_detectable: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        data = asdict(self)
        data["interval"] = None if self.interval is None else list(self.interval)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Claim:
        """The inverse of `to_dict`."""
        values = dict(data)
        interval = cast("Sequence[float] | None", values.get("interval"))
        values["interval"] = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(**values)


def decide(result: TestResult) -> ClaimStatus:
    """The status that a paired test supports."""
    if result.n < MIN_ROWS:
        return "no_claim"
    if result.p_value < ALPHA and result.interval[0] > 0:
        return "improved"
    if result.p_value < ALPHA and result.interval[1] < 0:
        return "worse"
    return "not_improved"


def make_claim(baseline: Sequence[float], tuned: Sequence[float], *, seed: int = 0) -> Claim:
    """Compare per-example test scores (mean over repeats), paired in the same order."""
    result = paired_test(baseline, tuned, seed=seed)
    status = decide(result)
    discordant = (result.wins + result.losses) / result.n
    detectable = smallest_detectable_difference(result.n, discordant or 0.2)
    low, high = result.interval
    figures = (
        f"{_score(result.mean_a)} → {_score(result.mean_b)} on {result.n} untouched test rows "
        f"(difference {result.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, p = {_p(result.p_value)}, "
        f"{result.test})"
    )
    text = {
        "improved": f"Improved: {figures}.",
        "worse": f"Worse on the test set: {figures}; do not use the tuned candidate.",
        "not_improved": (
            f"No improvement shown: {figures}; with {result.n} rows a difference of about {detectable:.3f} would show."
        ),
        "no_claim": f"No claim: {result.n} test rows are too few (at least {MIN_ROWS} are needed); seen {figures}.",
    }[status]
    return Claim(
        status=status,
        n=result.n,
        text=text,
        baseline_mean=result.mean_a,
        tuned_mean=result.mean_b,
        difference=result.difference,
        interval=result.interval,
        p_value=result.p_value,
        test=result.test,
        smallest_detectable=detectable,
    )


def baseline_claim(scores: Sequence[float]) -> Claim:
    """Nothing beat the baseline: it is kept, and its own test mean is all there is to say."""
    n = len(scores)
    mean = sum(scores) / n if n else None
    seen = f" It scores {_score(mean)} on {n} test rows." if mean is not None else ""
    return Claim(
        status="kept_baseline",
        n=n,
        text=f"Nothing beat the baseline on validation, so the baseline is kept.{seen}",
        baseline_mean=mean,
        tuned_mean=mean,
        smallest_detectable=smallest_detectable_difference(n) if n else None,
    )


def no_claim(reason: str, n: int = 0) -> Claim:
    """The test set was not (wholly) used, so nothing can be said."""
    return Claim(status="no_claim", n=n, text=f"No claim: {reason}.")


def _score(value: float) -> str:
    return f"{value:.3f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
