"""The output head at the places that are asked for, and the loss there without the logits in memory.

Only functions that need torch import this module. Over a large vocabulary the logits are the largest tensors of a small
model, so they are computed for predicted tokens alone, in chunks, and computed again for the second derivative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agentopt.errors import UserError

_CHUNK = 1 << 23
"""Logits at a time."""


@contextlib.contextmanager
def replaced(forwards: Sequence[tuple[Any, Callable[..., Any]]]) -> Generator[None]:
    """Within, modules compute with other functions."""
    before = [module.__dict__.get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def fused(model: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Modules of elementary operations, and one operation that computes the same, for `replaced`.

    The tanh form of GELU is eight operations in transformers, each of which keeps tensors of the widest layer for the
    backward pass, and again for the second one: half of what a GPT-2 keeps.
    """

    def gelu(x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")

    return [(module, gelu) for module in model.modules() if type(module).__name__ == "NewGELUActivation"]


class Head:
    """The output head of a causal model, whose place in the model's forward pass it can take."""

    def __init__(self, model: Any) -> None:
        found: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if found is None:
            raise UserError(f"fold: {type(model).__name__} has no output head, expected a causal language model.")
        self.module: Any = found
        self.hidden: Any = None
        """What the head was given at the picked places in the last forward pass."""
        self.plain = type(found) is nn.Linear and found.weight.is_floating_point() and self._is_last(model)
        """Whether the model's logits are this linear layer's output and nothing else."""

    def _is_last(self, model: Any) -> bool:
        """Some models scale or bound their logits after the head."""
        ids = torch.tensor([[0, 1]], device=self.module.weight.device)
        with torch.no_grad(), self.picking(_all, skip=False):
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            again: Tensor = nn.functional.linear(self.hidden, self.module.weight, self.module.bias)
            return torch.equal(logits, again)

    @contextlib.contextmanager
    def picking(self, pick: Callable[[Tensor], Tensor], *, skip: bool) -> Generator[None]:
        """Within, the head sees only what `pick` takes of the hidden states; with `skip` it passes that on as it is."""
        module = self.module
        computed: Any = module.forward

        def forward(hidden: Tensor) -> Tensor:
            self.hidden = pick(hidden)
            return self.hidden if skip else computed(self.hidden)

        with replaced([(module, forward)]):
            yield

    def lean_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`nll` of the logits that the frozen head gives for these hidden states (K, d)."""
        head: Any = _HeadNll
        return head.apply(hidden, self.module.weight.detach(), self.module.bias, targets)


def _all(hidden: Tensor) -> Tensor:
    return hidden


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), in float32 at least; the full table of log probabilities is never made."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _chunks(hidden: Tensor, weight: Tensor) -> range:
    return range(0, hidden.shape[0], max(16, _CHUNK // weight.shape[0]))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    values = nn.functional.linear(hidden, weight, bias)
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _HeadNll(torch.autograd.Function):
    """Loss at the head. The gradient for the hidden states falls out of the same logits, so none are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        step = _chunks(hidden, weight).step
        for start in _chunks(hidden, weight):
            logits = _logits(hidden[start : start + step], weight, bias)
            wanted = targets[start : start + step].unsqueeze(1)
            total = logits.logsumexp(1, keepdim=True)
            losses.append((total - logits.gather(1, wanted)).squeeze(1))
            if ctx.needs_input_grad[0]:
                share = logits.sub_(total).exp_()
                share.scatter_add_(1, wanted, share.new_full(wanted.shape, -1.0))
                slopes.append(share.to(weight.dtype) @ weight)
        slope = torch.cat(slopes) if slopes else torch.zeros_like(hidden)
        ctx.save_for_backward(hidden, weight, bias, slope)
        return torch.cat(losses) if losses else _logits(hidden, weight, bias)[:, :0].sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, slope = ctx.saved_tensors
        head: Any = _HeadSlope
        found: Tensor = grads[0].unsqueeze(1) * head.apply(hidden, weight, bias, slope)
        return found.to(hidden.dtype), None, None, None


class _HeadSlope(torch.autograd.Function):
    """d nll / d hidden = (p - onehot) W, which is known already; its own derivative is (diag(p) - p p^T) W."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        return slope.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        parts: list[Tensor] = []
        step = _chunks(hidden, weight).step
        with torch.no_grad():
            for start in _chunks(hidden, weight):
                share = _logits(hidden[start : start + step], weight, bias).softmax(1)
                along = _logits(grads[0][start : start + step].to(weight.dtype), weight, None)
                along -= (share * along).sum(1, keepdim=True)
                parts.append((along.mul_(share)).to(weight.dtype) @ weight)
        found = torch.cat(parts) if parts else torch.zeros_like(hidden)
        return found.to(hidden.dtype), None, None, None
