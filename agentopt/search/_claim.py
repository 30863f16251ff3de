"""The one statement that a run makes about the test set; `agentopt.evaluation.verdict` is the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from agentopt.evaluation import (
    Verdict,
    detectable_difference,
    paired_test,
    smallest_detectable_difference,
    verdict,
    verdict_text,
)

ClaimStatus = Verdict | Literal["kept_baseline"]


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


def make_claim(baseline: Sequence[float], tuned: Sequence[float], *, seed: int = 0) -> Claim:
    """Compare per-example test scores (mean over repeats), paired in the same order."""
    result = paired_test(baseline, tuned, seed=seed)
    return Claim(
        status=verdict(result),
        n=result.n,
        text=verdict_text(result, tuned="candidate"),
        baseline_mean=result.mean_a,
        tuned_mean=result.mean_b,
        difference=result.difference,
        interval=result.interval,
        p_value=result.p_value,
        test=result.test,
        smallest_detectable=detectable_difference(result),
    )


def baseline_claim(scores: Sequence[float]) -> Claim:
    """Nothing beat the baseline: it is kept, and its own test mean is all there is to say."""
    n = len(scores)
    mean = sum(scores) / n if n else None
    seen = f" It scores {mean:.3f} on {n} test rows." if mean is not None else ""
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
