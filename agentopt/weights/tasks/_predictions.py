"""How a model does on rows: what it answered, row by row, so that two measurements can be paired."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentopt.errors import UserError
from agentopt.evaluation import MetricSpec, TestResult, bootstrap_interval, paired_test
from agentopt.weights.load import need
from agentopt.weights.tasks._batches import Batch
from agentopt.weights.tasks._encode import Encoded, EncodedExample
from agentopt.weights.tasks._objectives import LanguageModelLoss, generate, scored
from agentopt.weights.tasks._scoring import log_likelihoods

_MOST_TOKENS = 8192
"""Tokens of a padded batch, so that a few long rows do not fill the memory."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers of one model, or of one baseline, on rows.

    Attributes:
        name: what answered.
        ids: of the rows.
        predicted: what was answered, as text.
        expected: the right answers.
        correct: 1.0 or 0.0 per row (the metric's score for generation).
        loss: mean cross-entropy over candidates, or per token of the right text; None for answers without likelihoods.
        log_probabilities: (rows, candidates), summing to one over a row's candidates; None for generation.
    """

    name: str
    ids: tuple[str, ...]
    predicted: tuple[str, ...]
    expected: tuple[str, ...]
    correct: tuple[float, ...]
    loss: float | None = None
    log_probabilities: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def accuracy(self) -> float:
        """Mean of `correct`."""
        return sum(self.correct) / len(self.correct)

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the accuracy."""
        return bootstrap_interval(self.correct, seed=seed)

    def compare(self, other: Predictions, seed: int = 0) -> TestResult:
        """`other` against this, on the same rows (exact McNemar for right and wrong).

        Raises:
            UserError: the rows are not the same.
        """
        if self.ids != other.ids:
            raise UserError(f"{self.name} and {other.name} were measured on different rows: they cannot be paired.")
        return paired_test(self.correct, other.correct, seed=seed)


def evaluate(
    model: Any,
    encoded: Encoded,
    *,
    batch: int = 32,
    tokenizer: Any = None,
    metric: MetricSpec = "exact_match",
    max_tokens: int = 64,
    name: str = "model",
) -> Predictions:
    """What the model answers on every row.

    Rows of about the same length share a batch; which do follows from the rows alone. Candidates are compared by their
    likelihood; for generation the model writes greedily and `metric` judges.

    Args:
        model: a causal language model.
        encoded: the rows.
        batch: rows in a forward pass.
        tokenizer: for generation: turns tokens into text.
        metric: for generation: any metric of `agentopt.evaluation`.
        max_tokens: for generation: the longest text.
        name: shown in reports.

    Raises:
        UserError: no rows; generation without a tokenizer.
    """
    if not len(encoded):
        raise UserError(f"{encoded.name}: no rows to evaluate on; expected at least one.")
    if encoded.kind != "generation":
        return judged(name, encoded, candidate_scores(model, encoded, batch=batch))
    if tokenizer is None:
        raise UserError("evaluate: rows of the kind generation need tokenizer=, to read what the model writes.")
    texts, losses = [""] * len(encoded), [0.0] * len(encoded)
    with measuring(model):
        for group in _groups(encoded.examples, batch):
            rows = [encoded[number] for number in group]
            found = generate(model, tokenizer, rows, max_tokens=max_tokens)
            loss: list[float] = LanguageModelLoss(Batch.of(encoded, rows))(model).tolist()
            for number, text, one in zip(group, found, loss, strict=True):
                texts[number], losses[number] = text.strip(), one
    return Predictions(
        name=name,
        ids=tuple(example.id for example in encoded),
        predicted=tuple(texts),
        expected=_expected(encoded),
        correct=tuple(scored(metric, text, example) for text, example in zip(texts, encoded, strict=True)),
        loss=float(np.mean(losses)),
    )


def candidate_scores(model: Any, encoded: Encoded, *, batch: int = 32) -> NDArray[np.float64]:
    """Log-probabilities (rows, candidates) that sum to one over a row's candidates; -inf where there is none."""
    most = max(len(example.candidates) for example in encoded)
    result = np.full((len(encoded), most), -np.inf)
    with measuring(model):
        for group in _groups(encoded.examples, batch):
            rows = [encoded[number] for number in group]
            found = log_likelihoods(model, rows, pad=encoded.pad, mean=encoded.mean, normalised=False)[0]
            result[group, : found.shape[1]] = found.double().log_softmax(1).cpu().numpy()
    return result


def judged(name: str, encoded: Encoded, scores: NDArray[np.float64]) -> Predictions:
    """Predictions from scores (rows, candidates): the largest wins, the first of equal ones."""
    scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    best: list[int] = scores.argmax(axis=1).tolist()
    right = np.array([example.answer for example in encoded])
    return Predictions(
        name=name,
        ids=tuple(example.id for example in encoded),
        predicted=tuple(example.texts[number] for example, number in zip(encoded, best, strict=True)),
        expected=_expected(encoded),
        correct=tuple(map(float, np.array(best) == right)),
        loss=float(-scores[np.arange(len(right)), right].mean()),
        log_probabilities=scores,
    )


def _expected(encoded: Encoded) -> tuple[str, ...]:
    return tuple(example.texts[example.answer].strip() for example in encoded)


@contextlib.contextmanager
def measuring(model: Any) -> Generator[None]:
    """Evaluation mode and no gradients; the mode is given back."""
    torch = need("torch")
    training = bool(model.training)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _groups(examples: Sequence[EncodedExample], batch: int) -> list[list[int]]:
    """Row numbers of each forward pass, short rows first."""
    groups: list[list[int]] = []
    for number in sorted(range(len(examples)), key=lambda one: (examples[one].length, one)):
        length = examples[number].length
        if not groups or len(groups[-1]) >= batch or (len(groups[-1]) + 1) * length > _MOST_TOKENS:
            groups.append([])
        groups[-1].append(number)
    return groups
