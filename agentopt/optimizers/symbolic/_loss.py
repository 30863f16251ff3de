"""The language loss: what was wrong with one failing case, in words, and how bad it was from 0 to 10.

The unit is one case. There are four questions: with or without the expected answer, with or without the metric's score;
a score that is known is not asked for again. A case whose loss cannot be had goes on without one, and the failure is
recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agentopt.optimizers._feedback import cut, error_text, feedback_text, shown
from agentopt.optimizers.symbolic._work import TEXT, Work, fields_of, object_schema, words_of

if TYPE_CHECKING:
    from agentopt.evaluation import Rollout
    from agentopt.optimizers.symbolic._trajectory import Trajectory

SOURCE = "symbolic.loss"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a failing case lacks."""

    comments: str
    score: float | None
    """From 0 (useless) to 10 (perfect), None when unknown."""
    source: Literal["label", "metric", "judge"]
    """Where the score comes from: the metric, or the model's judgement with ("label") or without ("judge") the
    expected answer in sight."""


async def language_loss(work: Work, rollout: Rollout, trajectory: Trajectory) -> Loss | None:
    """The loss of one case, or None when the model gave nothing usable.

    Raises:
        LMError: the model cannot be reached at present.
        BudgetExhausted: the budget does not cover the call.
    """
    options = work.options
    known = _score(rollout) if options.scores else None
    labelled = options.labels and rollout.example.expected is not None
    if options.loss == "metric":
        return Loss(facts(work, rollout), known, "metric")
    messages = work.messages("loss", question(work, rollout, trajectory))
    properties: dict[str, Any] = {"comments": TEXT}
    if known is None:
        properties["score"] = {"type": "number"}
    reply = await work.answer(SOURCE, messages, object_schema(**properties), rollout.example.id)
    if reply is None:
        return None
    comments = words_of(reply, "comments")
    if not comments:
        work.drop(
            SOURCE, f"example {rollout.example.id}: the answer holds no comments; the case goes on without a loss"
        )
        return None
    if known is not None:
        return Loss(comments, known, "metric")
    return Loss(comments, _given(reply), "label" if labelled else "judge")


def question(work: Work, rollout: Rollout, trajectory: Trajectory) -> dict[str, str]:
    """What the question about one case is filled with."""
    options, templates = work.options, work.templates
    expected = rollout.example.expected
    if options.labels and expected is not None:
        label = templates["symbolic.loss.label"].fill({"expected": cut(shown(expected), 1500)})
    else:
        label = templates["symbolic.loss.no_label"].text
    if options.scores:
        score = templates["symbolic.loss.score"].fill({"score": f"{_score(rollout):g}"})
        form = templates["symbolic.loss.form"].text
    else:
        score = templates["symbolic.loss.no_score"].text
        form = templates["symbolic.loss.form_score"].text
    return {
        "inputs": inputs_text(rollout, options.text_chars // 2),
        "trajectory": trajectory.render(options.text_chars),
        "output": output_text(rollout, 1500),
        "label": label,
        "score": score,
        "feedback": _said(rollout),
        "form": form,
    }


def facts(work: Work, rollout: Rollout) -> str:
    """What is known about a case without any model, within what may be shown."""
    options = work.options
    if options.labels and options.scores:
        return feedback_text(rollout)
    parts = [f"Output: {output_text(rollout, 400)}."]
    if options.scores:
        parts.insert(0, f"score {rollout.row.score:.2f}.")
    if options.labels and rollout.example.expected is not None:
        parts.append(f"Expected {cut(shown(rollout.example.expected), 400)}.")
    return " ".join([*parts, _said(rollout)]).strip()


def inputs_text(rollout: Rollout, limit: int) -> str:
    """An example's inputs, one a line."""
    size = max(80, limit // max(1, len(rollout.example.inputs)))
    return "\n".join(f"{name} = {cut(shown(value), size)}" for name, value in rollout.example.inputs.items())


def output_text(rollout: Rollout, limit: int) -> str:
    """What the program returned, or how it failed."""
    if rollout.row.error:
        return f"(none, the run failed: {cut(error_text(rollout.row.error), limit)})"
    return cut(shown(rollout.row.output), limit)


def _said(rollout: Rollout) -> str:
    return cut(str(rollout.row.feedback), 1500) if rollout.row.feedback else ""


def _score(rollout: Rollout) -> float:
    return round(10.0 * min(1.0, max(0.0, rollout.row.score)), 2)


def _given(reply: Any) -> float | None:
    found = fields_of(reply, ["score"])
    value = found.get("score") if found else None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    return min(10.0, max(0.0, number)) if math.isfinite(number) else None
