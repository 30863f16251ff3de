"""What meta-training trains: the start of the adapted tensors, the inner rates, token weights, the base's weights.

Only functions that need torch import this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.weights.fold._rates import new_rates, new_token_weights

if TYPE_CHECKING:
    from agentopt.weights.fold._engine import Engine
    from agentopt.weights.fold._types import FoldOptions


@dataclass(frozen=True, slots=True)
class MetaParameters:
    """Leaf tensors by kind; made by `new_meta`."""

    init: dict[str, Tensor]
    """Start of every adapted tensor, without document axis."""
    rates: dict[str, Tensor]
    """(inner_steps,) numbers per adapted tensor; the rates are their softplus."""
    token_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The network that weighs tokens; empty when it is off."""
    shared: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights of the base beside the adapted tensors, when they are trained; the engine computes with these."""

    def parameters(self) -> dict[str, list[Tensor]]:
        """The trained tensors by kind: "init", "rates", "token_weights", "shared"; kinds without any are left out."""
        kinds = {name: [t for t in held.values() if t.requires_grad] for name, held in self._kinds().items()}
        return {name: tensors for name, tensors in kinds.items() if tensors}

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {
            "init": self.init,
            "rates": self.rates,
            "token_weights": self.token_weights,
            "shared": self.shared,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors under "kind/name", as safetensors takes them."""
        return {
            f"{kind}/{name}": tensor.detach().clone().contiguous()
            for kind, held in self._kinds().items()
            for name, tensor in held.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values of `state_dict` into the tensors.

        Raises:
            UserError: a name is missing or not known, or a shape is another.
        """
        own = {f"{kind}/{name}": tensor for kind, held in self._kinds().items() for name, tensor in held.items()}
        for name in sorted({*own, *state}):
            found = tuple(state[name].shape) if name in state else "nothing"
            expected = tuple(own[name].shape) if name in own else "nothing"
            if found != expected:
                raise UserError(f"fold: found {found} for the meta-parameter {name!r}, expected {expected}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])


def new_meta(engine: Engine, options: FoldOptions) -> MetaParameters:
    """Meta-parameters at their start, which is a function of the options and their seed."""
    init = engine.init()
    like = next(iter(init.values()))
    like = like if like.dtype == torch.float64 else like.float()
    net = new_token_weights(engine.hidden_size, options.seed, like) if options.token_weights else {}
    return MetaParameters(init, new_rates(init, options, like), net, engine.shared())
