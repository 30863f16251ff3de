"""The one statement a fine-tuning run makes about its test rows.

`improved` needs the exact McNemar test (or sign-flip permutation for scores that are not 0/1) below .05 two-sided and
the BCa interval above zero against the model as it came (zero-shot). How it stands against the same model with its
label bias calibrated away is said in the same breath: a gain that calibration alone would give is no learning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from agentopt.evaluation import MIN_TEST_ROWS, TestResult, paired_test, smallest_detectable_difference

Status = Literal["improved", "not_improved", "worse", "no_claim"]
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class FinetuneClaim:
    """What may be said after the test rows were used once."""

    status: Status
    text: str
    n: int
    tuned: float | None
    against: dict[str, dict[str, Any]]
    """Baseline to its paired test: mean_a is the baseline's, mean_b the tuned model's."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def decide(result: TestResult) -> Status:
    """The status that a paired test supports."""
    if result.n < MIN_TEST_ROWS:
        return "no_claim"
    if result.p_value < ALPHA and result.interval[0] > 0:
        return "improved"
    if result.p_value < ALPHA and result.interval[1] < 0:
        return "worse"
    return "not_improved"


def make_claim(
    tuned: Sequence[float], baselines: Mapping[str, Sequence[float]], *, unit: str = "accuracy", seed: int = 0
) -> FinetuneClaim:
    """Compare scores per test row with those of each baseline, in the same order.

    Args:
        tuned: the tuned model's scores.
        baselines: `zero-shot`, and the calibrated model where there is one.
        unit: what the scores are.
        seed: of the resampling.
    """
    tests = {name: paired_test(list(scores), list(tuned), seed=seed) for name, scores in baselines.items()}
    main = tests["zero-shot"]
    status = decide(main)
    low, high = main.interval
    figures = (
        f"{unit} {main.mean_a:.3f} → {main.mean_b:.3f} on {main.n} untouched test rows (difference "
        f"{main.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, p = {p_text(main.p_value)}, {main.test})"
    )
    detectable = smallest_detectable_difference(main.n, (main.wins + main.losses) / main.n or 0.2)
    text = {
        "improved": f"Improved: {figures}.",
        "worse": f"Worse on the test rows: {figures}; do not use the tuned model.",
        "not_improved": (
            f"No improvement shown: {figures}; with {main.n} rows a difference of about {detectable:.3f} would show."
        ),
        "no_claim": (
            f"No claim: {main.n} test rows are too few (at least {MIN_TEST_ROWS} are needed); seen {figures}."
        ),
    }[status]
    for name, result in tests.items():
        if name != "zero-shot":
            text += f" {against(name, result)}"
    return FinetuneClaim(status, text, main.n, main.mean_b, {name: result.to_dict() for name, result in tests.items()})


def nothing_better(rows: int) -> FinetuneClaim:
    """What is said when training found nothing: the test rows stay unused."""
    text = "Nothing beat the untrained model on validation: no model was written, and the test rows were not used."
    return FinetuneClaim("not_improved", text, rows, None, {})


def against(name: str, result: TestResult) -> str:
    """One sentence about the stronger baseline."""
    status = decide(result)
    what = {
        "improved": "Also better than",
        "worse": "Worse than",
        "not_improved": "Not shown to be better than",
        "no_claim": "Seen beside",
    }[status]
    return (
        f"{what} the untrained model with its label bias removed ({name}): {result.mean_a:.3f} → {result.mean_b:.3f} "
        f"(difference {result.difference:+.3f}, p = {p_text(result.p_value)})."
    )


def p_text(value: float) -> str:
    """A p-value as it is printed."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
