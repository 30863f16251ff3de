"""What one comparison on untouched test rows allows to be said, and the sentence that says it.

`improved` needs both: p < .05 two-sided on the paired test (exact McNemar for 0/1 scores, sign-flip permutation
otherwise) and a BCa interval that lies above zero. Below 30 test rows nothing is claimed.
"""

from __future__ import annotations

from typing import Literal

from agentopt.evaluation._data import MIN_TEST_ROWS
from agentopt.evaluation._statistics import TestResult, smallest_detectable_difference

Verdict = Literal["improved", "not_improved", "worse", "no_claim"]

ALPHA = 0.05
_DISAGREED = 0.2
"""Share of rows assumed to disagree when none did."""


def verdict(result: TestResult) -> Verdict:
    """The status that a paired test supports."""
    if result.n < MIN_TEST_ROWS:
        return "no_claim"
    if result.p_value < ALPHA and result.interval[0] > 0:
        return "improved"
    if result.p_value < ALPHA and result.interval[1] < 0:
        return "worse"
    return "not_improved"


def detectable_difference(result: TestResult) -> float:
    """The smallest difference that so many rows, disagreeing as often as these did, would show."""
    return smallest_detectable_difference(result.n, (result.wins + result.losses) / result.n or _DISAGREED)


def verdict_text(result: TestResult, *, tuned: str, unit: str = "") -> str:
    """The claim in a sentence, with its figures.

    Args:
        result: of the test rows; `a` is what there was before, `b` what was tuned.
        tuned: what was tuned, as a noun.
        unit: what the scores are.
    """
    low, high = result.interval
    figures = (
        f"{f'{unit} ' if unit else ''}{result.mean_a:.3f} → {result.mean_b:.3f} on {result.n} untouched test rows "
        f"(difference {result.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
        f"p = {p_text(result.p_value)}, {result.test})"
    )
    return {
        "improved": f"Improved: {figures}.",
        "worse": f"Worse on the test rows: {figures}; do not use the tuned {tuned}.",
        "not_improved": (
            f"No improvement shown: {figures}; with {result.n} rows a difference of about "
            f"{detectable_difference(result):.3f} would show."
        ),
        "no_claim": (
            f"No claim: {result.n} test rows are too few (at least {MIN_TEST_ROWS} are needed); seen {figures}."
        ),
    }[verdict(result)]


def p_text(value: float) -> str:
    """A p-value as it is printed."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
