"""What the inner loop learns beside its start: a rate per tensor and step, and a weight per token.

Only functions that need torch import this module. Rates per tensor and step: MAML++ (arXiv 1810.09502), and essential
in RECKONING (arXiv 2305.06349); token weights: PERK (arXiv 2507.06415).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agentopt.evaluation import seed_number

if TYPE_CHECKING:
    from agentopt.weights.fold._rows import Work
    from agentopt.weights.fold._types import FoldOptions

_START = {
    ("lora", "sgd"): 2e-2,
    ("lora", "normalized"): 3e-3,
    ("lora", "adamw"): 3e-3,
    ("all", "sgd"): 1e-1,
    ("all", "normalized"): 1e-3,
    ("all", "adamw"): 1e-3,
}
_WIDTH = 32


def start_rate(options: FoldOptions) -> float:
    """Where the inner rates start: what was asked for, or what suits the rule."""
    return _START[options.adapts, options.rule] if options.lr is None else options.lr


def new_rates(names: Iterable[str], options: FoldOptions, like: Tensor) -> dict[str, Tensor]:
    """The trained numbers behind the rates, (steps,) for every tensor; `rate` makes rates of them."""
    lr = start_rate(options)
    raw = math.log(math.expm1(lr)) if lr < 30 else lr
    return {
        name: torch.full(
            (options.inner_steps,), raw, dtype=like.dtype, device=like.device, requires_grad=options.learn_lr
        )
        for name in names
    }


def rate(raw: Tensor) -> Tensor:
    """Softplus: greater than 0, and in the small close to the exponential, so training moves it by factors."""
    return torch.nn.functional.softplus(raw, threshold=30)


def new_token_weights(width: int, seed: int, like: Tensor) -> dict[str, Tensor]:
    """A network of one hidden layer on hidden states; it starts at weight 1 for every token."""
    bits = np.random.Philox(key=seed_number("fold-token-weights", seed))
    draw = (np.random.Generator(bits).random((_WIDTH, width)) * 2 - 1) * width**-0.5

    def leaf(values: Tensor) -> Tensor:
        return values.to(dtype=like.dtype, device=like.device).requires_grad_()

    return {
        "in.weight": leaf(torch.as_tensor(draw)),
        "in.bias": leaf(torch.zeros(_WIDTH)),
        "out.weight": leaf(torch.zeros(_WIDTH)),
        "out.bias": leaf(torch.tensor(math.log(math.expm1(1.0)))),
    }


def token_weight(net: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """A positive weight per token from the hidden states (K, d) that predict them."""
    inner = (hidden.to(net["in.weight"].dtype) @ net["in.weight"].mT + net["in.bias"]).tanh()
    return torch.nn.functional.softplus(inner @ net["out.weight"] + net["out.bias"])


def coefficients(work: Work, hidden: Tensor, net: Mapping[str, Tensor]) -> Tensor:
    """What every predicted token's loss counts in its document's inner loss.

    Learned weights are rescaled so that a document's total stays what its rows say: they move attention between tokens,
    and how far a step goes remains the rates' alone.
    """
    if not net:
        return work.weight
    learned = work.weight * token_weight(net, hidden)
    documents = work.ids.shape[0]
    before = learned.new_zeros(documents).index_add(0, work.document, work.weight.to(learned.dtype))
    after = learned.new_zeros(documents).index_add(0, work.document, learned)
    return learned * (before / after.clamp_min(1e-12))[work.document]
