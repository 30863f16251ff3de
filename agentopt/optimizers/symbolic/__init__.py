"""Agent symbolic learning: language loss, language gradients, and optimizers of prompts, tools and pipelines."""

from __future__ import annotations

from agentopt.optimizers.symbolic._bound import EditBound, LearningRate, change_ratio
from agentopt.optimizers.symbolic._gradients import Gradient, gathered
from agentopt.optimizers.symbolic._loss import Loss
from agentopt.optimizers.symbolic._options import SymbolicOptions
from agentopt.optimizers.symbolic._symbolic import Symbolic
from agentopt.optimizers.symbolic._trajectory import Trajectory, Visit, trajectory_of

__all__ = [
    "EditBound",
    "Gradient",
    "LearningRate",
    "Loss",
    "Symbolic",
    "SymbolicOptions",
    "Trajectory",
    "Visit",
    "change_ratio",
    "gathered",
    "trajectory_of",
]
