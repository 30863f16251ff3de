"""Linear layers whose weights are one byte each: decoded on the fly, on a GPU in registers. Importing loads torch.

    from agentopt.weights.gg.kernels import decode, linear
    y = linear(x, codes, scale, table, book_id, bias, format="rf8-gg")
    weight = decode(codes, scale, table, book_id, dtype=torch.bfloat16, format="rf8-gg")

Both are operators known to torch (`agentopt_gg::linear`, `agentopt_gg::decode`): torch.compile traces them as one
node, CUDA graphs capture them, autograd differentiates `linear` by `x` and `bias`. Without CUDA or Triton they are
plain torch: decode, then `F.linear`.
"""

from __future__ import annotations

from agentopt.weights.gg.kernels._dispatch import usable
from agentopt.weights.gg.kernels._op import decode, linear

__all__ = ["decode", "linear", "usable"]
