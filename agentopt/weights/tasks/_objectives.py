"""What a step measures on a batch: cross-entropy over candidates, the likelihood of a text, errors, a metric, a reward.

Each is the loss of every row, smaller is better. Those that run the model once per micro-batch follow the protocol
`agentopt.weights.zeroth.Objective`: several variants of the weights are measured in one pass. The two cross-entropies
carry a gradient, so first-order training uses the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from agentopt.errors import UserError
from agentopt.evaluation import Example, MetricSpec, resolve_metric
from agentopt.models._background import run_sync
from agentopt.weights.load import need
from agentopt.weights.tasks._batches import Batch
from agentopt.weights.tasks._encode import EncodedExample
from agentopt.weights.tasks._scoring import log_likelihoods


@dataclass(frozen=True, slots=True)
class _Measured:
    """A loss per row, micro-batch after micro-batch."""

    batch: Batch

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def pass_sizes(self) -> list[int]:
        """Rows of each forward pass, in order; a pass may give a row's candidates consecutive places of their own."""
        return [len(part) for part in self.batch.micro]

    def __call__(self, model: Any) -> Any:
        """Loss of every row: float32 tensor (rows,)."""
        return self.losses(model, 1)[0]

    def losses(self, model: Any, copies: int) -> Any:
        """Loss of every row under each copy of the weights: float32 tensor (copies, rows)."""
        parts = [self._part(model, part, copies) for part in self.batch.micro]
        return parts[0] if len(parts) == 1 else need("torch").cat(parts, 1)

    def split(self) -> list[Any]:
        """The same objective for each micro-batch: one forward pass each, `batch.first` says where its rows stand."""
        return [replace(self, batch=part) for part in self.batch.split()]

    def _part(self, model: Any, examples: tuple[EncodedExample, ...], copies: int) -> Any:
        raise NotImplementedError


class CrossEntropy(_Measured):
    """Cross-entropy over a row's candidates: label words, or options."""

    __slots__ = ()

    def _part(self, model: Any, examples: tuple[EncodedExample, ...], copies: int) -> Any:
        torch = need("torch")
        scores = _scores(model, examples, copies, self.batch)
        right = torch.tensor([example.answer for example in examples], device=scores.device)
        return -scores.log_softmax(2).gather(2, right.repeat(copies, 1)[:, :, None])[:, :, 0]


class Accuracy(_Measured):
    """1 for a row whose likeliest candidate is wrong, 0 for a right one: not differentiable, tuned all the same."""

    __slots__ = ()

    def _part(self, model: Any, examples: tuple[EncodedExample, ...], copies: int) -> Any:
        torch = need("torch")
        if any(len(example.candidates) < 2 for example in examples):
            raise UserError(
                "accuracy: the rows have one candidate, expected labels or options; use Generated for text."
            )
        with torch.no_grad():
            scores = _scores(model, examples, copies, self.batch)
        right = torch.tensor([example.answer for example in examples], device=scores.device)
        # A score that is no number is the largest to argmax: a model that broke would pass for one that always errs.
        return (scores.argmax(2) != right).float().masked_fill(scores.isnan().any(2), float("nan"))


class LanguageModelLoss(_Measured):
    """Mean negative log-likelihood per token of the right continuation."""

    __slots__ = ()

    def _part(self, model: Any, examples: tuple[EncodedExample, ...], copies: int) -> Any:
        right = [replace(example, candidates=(example.candidates[example.answer],)) for example in examples]
        return -log_likelihoods(model, right, copies, pad=self.batch.pad, mean=True)[:, :, 0]


@dataclass(frozen=True, slots=True)
class Generated(_Measured):
    """The metric of what the model writes, greedily, with its sign turned: larger is better for a metric.

    Attributes:
        tokenizer: turns tokens into text.
        metric: any metric of `agentopt.evaluation` ("exact_match", "f1", "file.py:function", a function).
        max_tokens: the longest text.
    """

    tokenizer: Any
    metric: MetricSpec = "exact_match"
    max_tokens: int = 64

    def _part(self, model: Any, examples: tuple[EncodedExample, ...], copies: int) -> Any:
        torch = need("torch")
        texts = generate(model, self.tokenizer, examples, copies=copies, max_tokens=self.max_tokens)
        values = [scored(self.metric, text, examples[number % len(examples)]) for number, text in enumerate(texts)]
        return -torch.tensor(values, dtype=torch.float32).reshape(copies, len(examples))


class Reward:
    """Any measurement of the model as a loss: an agent's reward, a metric of a whole run. Larger is better.

    `function(model)` returns a number, or one per example; the loss is its negative. One variant of the weights is
    measured after the other.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, model: Any) -> Any:
        """The loss: a number, or a float32 tensor (examples,).

        Raises:
            UserError: what came back is not a finite number, nor a list of them.
        """
        found: Any = self.function(model)
        found = found.tolist() if hasattr(found, "tolist") else found
        if isinstance(found, (list, tuple)):
            torch = need("torch")
            return -torch.tensor([_finite(one) for one in cast("Sequence[Any]", found)], dtype=torch.float32)
        return -_finite(found)


ObjectiveName = Literal["auto", "cross-entropy", "accuracy", "language-model", "generated"]


def make_objective(
    name: ObjectiveName,
    batch: Batch,
    *,
    tokenizer: Any = None,
    metric: MetricSpec = "exact_match",
    max_tokens: int = 64,
) -> CrossEntropy | Accuracy | LanguageModelLoss | Generated:
    """The objective of this name; "auto" is cross-entropy where there are candidates, else the likelihood of the text.

    Raises:
        UserError: no such name.
    """
    if name == "generated":
        return Generated(batch, tokenizer, metric, max_tokens)
    kinds = {"cross-entropy": CrossEntropy, "accuracy": Accuracy, "language-model": LanguageModelLoss}
    if name == "auto":
        several = all(len(example.candidates) > 1 for example in batch.examples)
        return CrossEntropy(batch) if several else LanguageModelLoss(batch)
    if name not in kinds:
        raise UserError(f"objective: found {name!r}, expected one of auto, {', '.join(kinds)}, generated.")
    return kinds[name](batch)


def generate(
    model: Any, tokenizer: Any, examples: Sequence[EncodedExample], *, copies: int = 1, max_tokens: int = 64
) -> list[str]:
    """What the model writes after each prompt, greedily, copy by copy."""
    torch = need("torch")
    device = next(iter(model.parameters())).device
    width = max(len(example.prompt) for example in examples)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(one.prompt)) + list(one.prompt) for one in examples], device=device)
    seen = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in examples], device=device)
    with torch.no_grad():
        written = model.generate(
            input_ids=ids.repeat(copies, 1),
            attention_mask=seen.repeat(copies, 1),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)


def scored(metric: MetricSpec, output: str, example: EncodedExample) -> float:
    """The metric of one written text; white space around it does not count."""
    measure = resolve_metric(metric)
    expected = example.texts[example.answer].strip()
    row = Example(example.id, {}, expected)
    return run_sync(lambda: _measure(measure, output.strip(), row)).value


async def _measure(measure: Any, output: str, row: Example) -> Any:
    return await measure(output, row.expected, row, None)


def _scores(model: Any, examples: tuple[EncodedExample, ...], copies: int, batch: Batch) -> Any:
    return log_likelihoods(model, examples, copies, pad=batch.pad, mean=batch.mean, normalised=False)


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"reward: found {value!r}, expected a finite number (larger is better) or a list of them.")
    return number
