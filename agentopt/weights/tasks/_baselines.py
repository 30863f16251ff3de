"""What a tuned model has to beat: the model as it is, the commonest answer, and the model freed of its label bias."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.evaluation import MetricSpec, seeded
from agentopt.weights.tasks._encode import Encoded
from agentopt.weights.tasks._objectives import scored
from agentopt.weights.tasks._predictions import Predictions, candidate_scores, evaluate, judged


def baselines(
    model: Any,
    train: Encoded,
    test: Encoded,
    *,
    batch: int = 32,
    tokenizer: Any = None,
    metric: MetricSpec = "exact_match",
    max_tokens: int = 64,
    rows: int = 256,
    seed: int = 0,
) -> dict[str, Predictions]:
    """Measurements without any training, by name.

    `zero_shot` is the model as it is; `majority` the commonest answer of `train`; `calibrated` (classification and
    choice) divides by what the model gives each candidate after inputs that say nothing (contextual calibration,
    arXiv 2102.09690); `prior` (classification) shifts the scores until the labels' mean share on `rows` rows of `train`
    is their true share there (batch calibration, arXiv 2309.17249, with the training labels as the prior). Only `prior`
    looks at training rows with the model.

    Args:
        model: before tuning.
        train: where the answers are counted.
        test: where all are measured.
        batch: rows in a forward pass.
        tokenizer: for generation; see `evaluate`.
        metric: for generation.
        max_tokens: for generation.
        rows: training rows that `prior` runs.
        seed: which rows those are.
    """
    zero = evaluate(
        model, test, batch=batch, tokenizer=tokenizer, metric=metric, max_tokens=max_tokens, name="zero_shot"
    )
    result = {"zero_shot": zero, "majority": majority(train, test, metric=metric)}
    if zero.log_probabilities is None:
        return result
    bias = _content_free_bias(model, test, batch)
    if bias is not None:
        result["calibrated"] = judged("calibrated", test, _less(zero.log_probabilities, bias))
    if test.kind == "classification":
        shift = _prior_shift(model, train, batch, rows, seed)
        result["prior"] = judged("prior", test, zero.log_probabilities + shift)
    return result


def majority(train: Encoded, test: Encoded, *, metric: MetricSpec = "exact_match") -> Predictions:
    """The commonest answer of `train` on every row: a label, the place of the option, or a text."""
    if train.kind == "generation":
        text = Counter(example.texts[0].strip() for example in train).most_common(1)[0][0]
        answers = [text] * len(test)
        correct = tuple(scored(metric, text, example) for example in test)
    else:
        counts = Counter(example.answer for example in train)
        place = min(counts, key=lambda one: (-counts[one], one))
        answers = [example.texts[min(place, len(example.texts) - 1)] for example in test]
        correct = tuple(float(min(place, len(example.texts) - 1) == example.answer) for example in test)
    expected = tuple(example.texts[example.answer].strip() for example in test)
    return Predictions("majority", tuple(example.id for example in test), tuple(answers), expected, correct)


def _content_free_bias(model: Any, test: Encoded, batch: int) -> NDArray[np.float64] | None:
    """Log of each candidate's mean probability after content-free prompts: (1 or rows, candidates)."""
    found: list[NDArray[np.float64]] = []
    for free in test.content_free:
        if free.candidates:
            found.append(candidate_scores(model, replace(test, examples=(free,)), batch=1))
        else:  # options are a row's own: how likely is each of them when nothing was asked
            asked = tuple(replace(example, prompt=free.prompt) for example in test)
            found.append(candidate_scores(model, replace(test, examples=asked), batch=batch))
    return np.logaddexp.reduce(np.stack(found), axis=0) - np.log(len(found)) if found else None


def _less(scores: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    """`scores - bias`, where there is a candidate."""
    absent = np.isneginf(scores)
    return np.where(absent, -np.inf, scores - np.where(absent, 0.0, bias))


def _prior_shift(model: Any, train: Encoded, batch: int, rows: int, seed: int) -> NDArray[np.float64]:
    """What to add to each label's score so that the labels' mean probability on training rows is their frequency."""
    numbers = sorted(seeded("prior", seed).sample(range(len(train)), min(rows, len(train))))
    some = replace(train, examples=tuple(train[number] for number in numbers))
    scores = candidate_scores(model, some, batch=batch)
    counts = np.bincount([example.answer for example in some], minlength=scores.shape[1]) + 0.5
    wanted = np.log(counts / counts.sum())
    shift = np.zeros(scores.shape[1])
    for _ in range(100):  # iterative scaling: every round brings the mean shares nearer, it has one fixed point
        moved = scores + shift
        shares = moved - np.logaddexp.reduce(moved, axis=1, keepdims=True)
        shift += wanted - (np.logaddexp.reduce(shares, axis=0) - np.log(len(shares)))
    return shift - shift.mean()
