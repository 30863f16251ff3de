"""Optimizers: from a parent candidate, its rollouts and its history to typed edits worth measuring."""

from __future__ import annotations

from agentopt.optimizers._auto import Auto, Together
from agentopt.optimizers._code import CodeRepair
from agentopt.optimizers._demonstrations import Demonstrations
from agentopt.optimizers._instructions import Instructions
from agentopt.optimizers._optoprime import OptoPrime, OptoPrimeOptions
from agentopt.optimizers._protocol import DroppedEdit, Optimizer, PastProposal, ProposeContext, Update
from agentopt.optimizers._resolve import OPTIMIZER_NAMES, resolve_optimizer
from agentopt.optimizers._templates import load_templates
from agentopt.optimizers._tpe import Tpe
from agentopt.optimizers._values import Values

__all__ = [
    "OPTIMIZER_NAMES",
    "Auto",
    "CodeRepair",
    "Demonstrations",
    "DroppedEdit",
    "Instructions",
    "Optimizer",
    "OptoPrime",
    "OptoPrimeOptions",
    "PastProposal",
    "ProposeContext",
    "Together",
    "Tpe",
    "Update",
    "Values",
    "load_templates",
    "resolve_optimizer",
]
