"""Attention that can be differentiated twice.

The fused kernels of scaled dot-product attention have no second derivative: on a CPU torch raises, and some kernels
elsewhere drop it silently. The MATH backend is made of plain operations. It is used where a graph for a second
derivative is built and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.load import need

_TWICE = ("sdpa", "eager")


def check_attention(model: Any, unroll: int | None) -> None:
    """Refuse a model whose attention kernel has no second derivative when one is needed.

    Raises:
        UserError: another attention than "sdpa" or "eager" with `unroll` other than 0.
    """
    found = getattr(model.config, "_attn_implementation", None) or "sdpa"
    if unroll != 0 and found not in _TWICE:
        raise UserError(
            f"fold: the model's attention is {found!r}, whose backward pass cannot be differentiated; load the model "
            'with attn_implementation="sdpa" (or "eager"), or use unroll=0 (first order).'
        )


@contextlib.contextmanager
def twice_differentiable(model: Any) -> Generator[None]:
    """Within, the model's attention is made of operations that have second derivatives.

    Raises:
        UserError: the model's attention is a kernel of its own ("flash_attention_2", "flex_attention", ...).
    """
    check_attention(model, None)
    need("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield
