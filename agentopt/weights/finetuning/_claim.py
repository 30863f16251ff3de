"""The one statement a fine-tuning run makes about its test rows.

It is about the model as it came (zero-shot); the rule is `agentopt.evaluation.verdict`. How the tuned model stands
against the same model with its label bias calibrated away is said in the same breath: a gain that calibration alone
would give is no learning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agentopt.evaluation import TestResult, Verdict, p_text, paired_test, verdict, verdict_text


@dataclass(frozen=True, slots=True)
class FinetuneClaim:
    """What may be said after the test rows were used once."""

    status: Verdict
    text: str
    n: int
    tuned: float | None
    against: dict[str, dict[str, Any]]
    """Baseline to its paired test: mean_a is the baseline's, mean_b the tuned model's."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


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
    text = verdict_text(main, tuned="model", unit=unit)
    for name, result in tests.items():
        if name != "zero-shot":
            text += f" {against(name, result)}"
    return FinetuneClaim(
        verdict(main), text, main.n, main.mean_b, {name: result.to_dict() for name, result in tests.items()}
    )


def nothing_better(rows: int) -> FinetuneClaim:
    """What is said when training found nothing: the test rows stay unused."""
    text = "Nothing beat the untrained model on validation: no model was written, and the test rows were not used."
    return FinetuneClaim("not_improved", text, rows, None, {})


def against(name: str, result: TestResult) -> str:
    """One sentence about the stronger baseline."""
    what = {
        "improved": "Also better than",
        "worse": "Worse than",
        "not_improved": "Not shown to be better than",
        "no_claim": "Seen beside",
    }[verdict(result)]
    return (
        f"{what} the untrained model with its label bias removed ({name}): {result.mean_a:.3f} → {result.mean_b:.3f} "
        f"(difference {result.difference:+.3f}, p = {p_text(result.p_value)})."
    )
