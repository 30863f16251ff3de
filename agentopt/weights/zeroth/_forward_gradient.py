"""Exact directional derivatives by forward-mode differentiation: one pass gives the loss and its slope.

The forward gradient (arXiv 2202.08587) is what the differences of the other methods estimate: same noise, no error from
a finite eps. It costs about two passes and the memory of the tangents of one layer, and needs a differentiable loss.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.load import need
from agentopt.weights.zeroth._direct import swapped, unwatched
from agentopt.weights.zeroth._probing import Plan, Prober, in_place
from agentopt.weights.zeroth._sites import Site
from agentopt.weights.zeroth._types import Shift


def derivative(prober: Prober, loss_fn: Any, shift: Shift, step: int, active: Sequence[Site]) -> list[Any]:
    """Losses and derivatives along one direction, per example: two float64 arrays of shape (examples,).

    Args:
        prober: knows the model, its tuned tensors and the mask.
        loss_fn: `(model) -> Tensor`, a number or one per example.
        shift: the direction; its scale is not used.
        step: number of the step.
        active: the sites that move.

    Raises:
        UserError: the loss is no tensor that depends on the weights, or an operation of the model has no forward-mode
            derivative.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    forward_ad: Any = need("torch.autograd.forward_ad")
    _load_rules()
    plan = Plan([(Shift(shift.seed, 1.0, shift.right_seed),)], step, *prober.scratch(prober.sites[0].tensor.device))
    dual = functools.partial(_dual, prober, plan)
    whole = [site for site in active if site.id in prober.direct]
    try:
        with (
            forward_ad.dual_level(),
            sdpa_kernel(SDPBackend.MATH),
            prober.patched(active, functools.partial(_forward, dual)),
            swapped(in_place(whole, dual)),
        ):
            found = loss_fn(prober.model)
            loss, slope = forward_ad.unpack_dual(found) if isinstance(found, torch.Tensor) else (None, None)
            if loss is None or slope is None:
                raise UserError(
                    "method jvp: the loss is not a tensor that depends on the weights; a loss that cannot be "
                    "differentiated needs one of the other methods."
                )
            return [one.detach().reshape(-1).double().cpu().numpy().copy() for one in (loss, slope)]
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
        first = str(error).splitlines()[0]
        raise UserError(f"method jvp: an operation of this model has no forward-mode derivative: {first}") from error


@functools.cache
def _load_rules() -> None:
    """Torch compiles its forward-mode rules at first use, with a compiler that it calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with contextlib.suppress(ImportError):
            importlib.import_module("torch._decomp.decompositions_for_jvp")


def _dual(prober: Prober, plan: Plan, site: Site) -> Any:
    """A tensor that carries the direction as its tangent."""
    import torch

    forward_ad: Any = need("torch.autograd.forward_ad")
    tangent = torch.empty_like(site.tensor)
    prober.fill_direction(plan, site, plan.variants[0][0], tangent.view(-1))
    return forward_ad.make_dual(site.tensor.detach(), tangent)


def _forward(dual: Any, module: Any, sites: Mapping[str, Site], original: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward pass with such weights."""
    with unwatched(module), swapped({(module, name): dual(site) for name, site in sites.items()}):
        return original(*args, **kwargs)
