"""What folding costs beside reading: operations, seconds, keys and values, adapter; and which of them is cheaper.

Counted from the sizes in a model's configuration, a multiplication with an addition as two operations:

* a token costs two operations per weight of every linear layer, and `4 * heads * head_dim` per layer for every token
  that it attends to; a predicted token costs two per weight of the output head;
* an inner step reads all rows, then goes back through the activations of the layers from the lowest adapted one up
  (once more their operations, twice more the attention) and to the factors' gradients; the frozen weights have none;
* re-reading passes the context for every question, a cached prefix once; later tokens attend to it either way.

On ordinary lengths a cached prefix needs fewer operations than folding, and the estimate says so. What folding saves is
the memory of the cache, and it goes on where a context no longer fits into the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from agentopt.errors import UserError
from agentopt.weights.finetuning._memory import size
from agentopt.weights.fold._operations import Clock, Speed, Work, shape_in
from agentopt.weights.fold._operations import measure_speed as measure_speed
from agentopt.weights.fold._shape import Shape, number_bytes

Way = Literal["fold", "in-context, cached", "re-reading"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one way of answering costs."""

    way: Way
    fixed_flops: float
    """Once per document."""
    question_flops: float
    """For each question."""
    fixed_seconds: float | None
    question_seconds: float | None
    questions: int
    kv_bytes: int
    """Keys and values that are held while the concurrent questions are answered; a prefix is held once."""
    possible: bool = True
    """False when the context does not fit into the window."""

    @property
    def flops(self) -> float:
        """Operations for all questions."""
        return self.fixed_flops + self.questions * self.question_flops

    @property
    def seconds(self) -> float | None:
        """Time for all questions; None without a speed."""
        if self.fixed_seconds is None or self.question_seconds is None:
            return None
        return self.fixed_seconds + self.questions * self.question_seconds

    @property
    def amount(self) -> float:
        """Seconds where the speed is known, else operations: what is compared."""
        return self.flops if self.seconds is None else self.seconds

    @property
    def parts(self) -> tuple[float, float]:
        """The amount once per document and for each question."""
        if self.fixed_seconds is None or self.question_seconds is None:
            return self.fixed_flops, self.question_flops
        return self.fixed_seconds, self.question_seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """Three ways to answer questions about a document."""

    fold: Cost
    reread: Cost
    cached: Cost
    context_tokens: int
    questions: int
    adapter_bytes: int
    """What a fold keeps instead of a cache."""
    folding_bytes: int
    """Roughly: activations of one inner step over all rows."""
    kv_saved: int
    """Keys and values of the context, which a fold does not hold: for each document that is being asked about, and for
    each concurrent question where a server does not share prefixes."""
    needed: int
    """Tokens of context, question and answer together."""
    window: int | None

    @property
    def fits(self) -> bool:
        """Whether the context can be read at all."""
        return self.cached.possible

    @property
    def cheaper(self) -> Way:
        """The way that needs least, in seconds where the speed is known, else in operations."""
        possible = [cost for cost in (self.cached, self.reread, self.fold) if cost.possible]
        return min(possible, key=lambda cost: cost.amount).way

    @property
    def break_even(self) -> int | None:
        """The first number of questions from which on folding is cheaper than re-reading; None when there is none.

        With LoRA on all layers about 2N (1 + a) / (1 + Lq / Lk) for N steps, Lq tokens of a question and Lk of context,
        where a is the adapters' share; with all weights 3N / (1 + Lq / Lk). 1 where the context cannot be read.
        """
        return _crossing(self.fold, self.reread)

    @property
    def break_even_cached(self) -> int | None:
        """The same against a cached prefix; None (never), or far away, unless the context is very long."""
        return _crossing(self.fold, self.cached)

    def sentence(self) -> str:
        """What to do, and what folding costs and saves, in plain words."""
        parts = (self._cheapest(), self._even(), self._memory()) if self.fits else (self._cheapest(), self._memory())
        return " ".join(parts)

    def _cheapest(self) -> str:
        asked = f"{self.questions:,} question{'s' if self.questions > 1 else ''} about {self.context_tokens:,} tokens"
        if not self.fits:
            return (
                f"Reading is impossible: {self.needed:,} tokens are needed and the model's window has {self.window:,}; "
                f"folding answers {asked} for {_amount(self.fold)}."
            )
        costs = sorted((self.cached, self.reread, self.fold), key=lambda cost: cost.amount)
        named = ", ".join(f"{_NAMES[cost.way]} {_amount(cost)}" for cost in costs)
        verdict = "folding is cheapest" if self.cheaper == "fold" else "folding loses"
        return f"For {asked}, {verdict}: {named}."

    def _even(self) -> str:
        reread, cached = _from(self.break_even), _from(self.break_even_cached)
        if self.break_even_cached is not None and self.break_even_cached > self.questions:
            cached = f"only {cached}"
        return f"Folding is cheaper than re-reading {reread}, than a cached prefix {cached}."

    def _memory(self) -> str:
        kept = f"a fold keeps an adapter of {size(self.adapter_bytes)}"
        if not self.fits:
            return f"It needs no keys and values of the context; {kept}."
        if self.adapter_bytes < self.kv_saved:
            return f"It saves memory: {kept} instead of {size(self.kv_saved)} of keys and values per document."
        return (
            f"Nor does it save memory here: {kept}, the keys and values of the context take {size(self.kv_saved)} "
            "(but for every concurrent question where prefixes are not shared)."
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        costs = {name: getattr(self, name) for name in ("fold", "reread", "cached")}
        return {
            **{name: asdict(cost) | {"flops": cost.flops, "seconds": cost.seconds} for name, cost in costs.items()},
            **{
                name: getattr(self, name)
                for name in (
                    "context_tokens",
                    "questions",
                    "adapter_bytes",
                    "folding_bytes",
                    "kv_saved",
                    "needed",
                    "window",
                    "fits",
                    "cheaper",
                    "break_even",
                    "break_even_cached",
                )
            },
            "sentence": self.sentence(),
        }


_NAMES: dict[Way, str] = {
    "fold": "fold and ask",
    "in-context, cached": "cached prefix",
    "re-reading": "re-reading every time",
}


def estimate(
    model_or_config: Any,
    *,
    context_tokens: int,
    questions: int,
    question_tokens: int = 32,
    answer_tokens: int = 8,
    inner_steps: int = 4,
    rank: int = 16,
    layers: int | None = None,
    targets: str | Sequence[str] = "all-linear",
    row_tokens: int = 128,
    documents: int = 1,
    concurrent: int = 1,
    adapts: Literal["lora", "all"] = "lora",
    dtype: Any = None,
    factor_bytes: int = 4,
    speed: Speed | None = None,
) -> Estimate:
    """Compare folding with reading, for one document.

    Args:
        model_or_config: a model of transformers, or its configuration alone.
        context_tokens: of the document.
        questions: asked about it.
        question_tokens: of one question with the format around it.
        answer_tokens: that are generated: recalled facts and the answer.
        inner_steps: of the fold.
        rank: of the LoRA factors.
        layers: adapted layers, from the top; None for all.
        targets: adapted linear layers, as in `FoldOptions`.
        row_tokens: longest row of the inner loop.
        documents: folded at once; counts for `folding_bytes` alone.
        concurrent: questions answered at the same time.
        adapts: what the inner loop moves; "all" is RECKONING.
        dtype: of keys, values and activations; None for the model's own or what the configuration
            says, else bfloat16.
        factor_bytes: of a number in the adapter as it is kept.
        speed: of the machine (`measure_speed`); without it operations are compared.

    Raises:
        UserError: a number out of range, or a configuration without sizes.
    """
    counts = {
        "context_tokens": context_tokens,
        "questions": questions,
        "question_tokens": question_tokens,
        "answer_tokens": answer_tokens,
        "inner_steps": inner_steps,
        "rank": rank,
        "row_tokens": row_tokens,
        "documents": documents,
        "concurrent": concurrent,
        "factor_bytes": factor_bytes,
    }
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"estimate: {name} is {value!r}, expected a whole number of at least 1.")
    shape = shape_in(model_or_config)
    # A model that is loaded knows better than its configuration.
    own = getattr(model_or_config, "dtype", None) if dtype is None else dtype
    wide = number_bytes(shape.number_bytes or 2 if own is None else own)
    top = shape.layers if layers is None else layers
    if not 1 <= top <= shape.layers:
        raise UserError(f"estimate: layers is {layers!r}, expected 1 to {shape.layers}, the layers of the model.")
    work = Work(shape, everything=True) if adapts == "all" else Work(shape, top, shape.adapted(targets), rank)
    plain = Work(shape)
    rows = _rows(context_tokens, row_tokens)
    each = shape.kv_numbers * wide
    asking = question_tokens + answer_tokens
    fits = shape.window is None or context_tokens + asking <= shape.window
    forward, backward = (
        inner_steps * sum(count * one(row) for row, count in rows) for one in (work.learn_forward, work.learn_backward)
    )
    clock = Clock(speed, concurrent)
    ask = _Asking(question_tokens, answer_tokens, clock)
    fold = ask.cost("fold", work, 0, questions)
    reread = ask.cost("re-reading", plain, 0, questions, extra=context_tokens)
    cached = ask.cost("in-context, cached", plain, context_tokens, questions)
    reading = plain.forward(context_tokens, logits=1)
    tokens = min(concurrent, questions) * asking
    return Estimate(
        fold=replace(
            fold,
            fixed_flops=forward + backward,
            fixed_seconds=clock.learning(forward, backward, inner_steps),
            kv_bytes=tokens * each,
        ),
        reread=replace(reread, kv_bytes=(tokens + min(concurrent, questions) * context_tokens) * each, possible=fits),
        cached=replace(
            cached,
            fixed_flops=reading,
            fixed_seconds=clock.once(reading),
            kv_bytes=(tokens + context_tokens) * each,
            possible=fits,
        ),
        context_tokens=context_tokens,
        questions=questions,
        adapter_bytes=(work.factors or _weights(shape)) * factor_bytes,
        folding_bytes=documents * sum(count * work.activations(row, wide) for row, count in rows),
        kv_saved=context_tokens * each,
        needed=context_tokens + asking,
        window=shape.window,
    )


@dataclass(frozen=True, slots=True)
class _Asking:
    """One question: a pass over it, then one for each generated token but the last, which nobody reads."""

    question: int
    answer: int
    clock: Clock

    def cost(self, way: Way, work: Work, after: int, questions: int, *, extra: int = 0) -> Cost:
        """Costs of a question behind `after` cached tokens, with `extra` tokens to read before it."""
        first = work.forward(self.question + extra, after=after, logits=1)
        behind = after + extra + self.question
        rest = [work.forward(1, after=behind + number, logits=1) for number in range(self.answer - 1)]
        seconds = [self.clock.shared(flops) for flops in (first, *rest)]
        known = [one for one in seconds if one is not None]
        return Cost(
            way=way,
            fixed_flops=0.0,
            question_flops=first + sum(rest),
            fixed_seconds=0.0 if known else None,
            question_seconds=sum(known) if known else None,
            questions=questions,
            kv_bytes=0,
        )


def _rows(tokens: int, longest: int) -> list[tuple[int, int]]:
    """(length, how many) of the rows that a document is cut into."""
    whole, rest = divmod(tokens, longest)
    return [(length, count) for length, count in ((longest, whole), (rest, 1)) if length and count]


def _weights(shape: Shape) -> int:
    return shape.layers * shape.block + shape.hidden * shape.vocabulary


def _crossing(one: Cost, other: Cost) -> int | None:
    """The first number of questions from which on `one` stays cheaper."""
    if not other.possible:
        return 1
    (fixed, each), (fixed_other, each_other) = one.parts, other.parts
    if each >= each_other:
        return None
    return max(1, math.floor((fixed - fixed_other) / (each_other - each)) + 1)


def _from(questions: int | None) -> str:
    if questions is None:
        return "never"
    return "from the first question on" if questions == 1 else f"from {questions:,} questions on"


def _amount(cost: Cost) -> str:
    seconds = cost.seconds
    if seconds is not None:
        return f"{seconds:.3g} s"
    for limit, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if cost.flops >= limit:
            return f"{cost.flops / limit:.3g} {unit}"
    return f"{cost.flops:,.0f} FLOP"
