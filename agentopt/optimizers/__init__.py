"""Optimizers: from a parent candidate, its rollouts and its history to typed edits worth measuring."""

from __future__ import annotations

from agentopt.optimizers._protocol import DroppedEdit, Optimizer, PastProposal, ProposeContext, Update
from agentopt.optimizers._resolve import OPTIMIZER_NAMES, resolve_optimizer

__all__ = [
    "OPTIMIZER_NAMES",
    "DroppedEdit",
    "Optimizer",
    "PastProposal",
    "ProposeContext",
    "Update",
    "resolve_optimizer",
]
