"""Operations of a model, counted from its sizes, and how fast a machine makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.fold._shape import Linear, Shape, shape_of
from agentopt.weights.load import need
from agentopt.weights.tasks._predictions import measuring

_LONG = 1.0
"""Seconds of a call that is timed once."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a machine is with a model."""

    forward: float
    """Operations per second of a forward pass over many tokens."""
    backward: float
    """Operations per second of the pass back through the activations."""
    step: float = 0.0
    """Seconds that any forward pass takes at least, as that of a single generated token does."""

    def __post_init__(self) -> None:
        if not (self.forward > 0 and self.backward > 0 and self.step >= 0):
            raise UserError(f"speed: found {self}, expected positive numbers.")

    @classmethod
    def of_tokens(cls, model_or_config: Any, tokens_per_second: float) -> Speed:
        """From the tokens per second of reading a long text."""
        rate = tokens_per_second * Work(shape_in(model_or_config)).forward(128, logits=0) / 128
        return cls(rate, rate)


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one model, with adapters of this rank beside these layers of the `top` topmost blocks."""

    shape: Shape
    top: int = 0
    beside: tuple[Linear, ...] = ()
    rank: int = 0
    everything: bool = False
    """All weights move, there are no adapters."""

    @property
    def factors(self) -> int:
        """Numbers in the factors; 0 without adapters."""
        return self.top * sum(self.rank * (one.inputs + one.outputs) for one in self.beside)

    def forward(self, tokens: int, *, after: int = 0, logits: int = 0) -> float:
        """Read so many tokens after others that are cached, and predict after `logits` of them."""
        shape = self.shape
        linear = 2.0 * tokens * (shape.layers * shape.block + self.factors)
        return linear + shape.layers * self._attention(tokens, after) + 2.0 * logits * shape.hidden * shape.vocabulary

    def _attention(self, tokens: int, after: int) -> float:
        """Scores and mixed values of one layer; a token looks at itself and at what is before it."""
        seen = tokens * after + tokens * (tokens + 1) / 2
        return 4.0 * self.shape.heads * self.shape.head_dim * seen

    def learn_forward(self, tokens: int) -> float:
        """One row of an inner step, forward."""
        return self.forward(tokens, logits=tokens)

    def learn_backward(self, tokens: int) -> float:
        """One row of an inner step, back to the lowest adapted layer."""
        shape, top = self.shape, self.top or self.shape.layers
        through = 2.0 * tokens * (top * shape.block + shape.hidden * shape.vocabulary)
        # Beside the activations' gradients there are those of all weights, or of the factors, both ways through them.
        own = 4.0 * tokens * self.factors if not self.everything else through
        return through + own + top * 2 * self._attention(tokens, 0)

    def activations(self, tokens: int, wide: int) -> int:
        """Bytes that one row's inner step keeps for the way back."""
        shape, top = self.shape, self.top or self.shape.layers
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        # Residuals and norms, queries with their output, keys and values, the feed-forward block.
        block = 4 * shape.hidden + 2 * queries + 2 * keys + shape.gate_width
        # Log-odds, once as they are and once in float32 for the loss.
        return tokens * (top * block * wide + shape.vocabulary * (wide + 4))


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of operations; None without a speed."""

    speed: Speed | None
    concurrent: int

    def once(self, flops: float) -> float | None:
        """One forward pass."""
        return None if self.speed is None else max(self.speed.step, flops / self.speed.forward)

    def learning(self, forward: float, backward: float, steps: int) -> float | None:
        """The inner loop."""
        if self.speed is None:
            return None
        return max(3 * steps * self.speed.step, forward / self.speed.forward + backward / self.speed.backward)

    def shared(self, flops: float) -> float | None:
        """One question's share of a forward pass for all concurrent ones."""
        found = self.once(flops * self.concurrent)
        return None if found is None else found / self.concurrent


def measure_speed(model: Any, *, tokens: int = 128, rows: int = 4, repeats: int = 3) -> Speed:
    """Time a forward pass, the way back through the activations and one generated token; the best of `repeats`.

    Calls that take seconds are made once.
    """
    torch = need("torch")
    work = Work(shape_in(model))
    device = next(iter(model.parameters())).device
    window = work.shape.window
    tokens = tokens if window is None else max(2, min(tokens, window - 1))
    ids = torch.arange(rows * tokens, device=device).reshape(rows, tokens) % work.shape.vocabulary
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)

    def timed(act: Callable[[], Any]) -> float:
        first = _seconds(act, device)
        # What takes so long is not held up by a first call either.
        return first if first > _LONG else min(_seconds(act, device) for _ in range(repeats))

    def through() -> None:
        with torch.enable_grad():
            inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            model(inputs_embeds=inputs, use_cache=False).logits.float().logsumexp(-1).sum().backward()

    try:
        with measuring(model):
            forward = timed(lambda: model(input_ids=ids, use_cache=False))
            both = timed(through)
            step = timed(lambda: model(input_ids=ids[:1, :1], use_cache=False))
    finally:
        for weight in trained:
            weight.requires_grad_(True)
    read, back = (rows * one(tokens) for one in (work.learn_forward, work.learn_backward))
    return Speed(forward=read / forward, backward=back / max(both - forward, 1e-9), step=step)


def _seconds(act: Callable[[], Any], device: Any) -> float:
    torch = need("torch")
    begin = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def shape_in(model_or_config: Any) -> Shape:
    return shape_of(getattr(model_or_config, "config", model_or_config))
