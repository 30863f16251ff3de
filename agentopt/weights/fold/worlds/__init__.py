"""Worlds with known answers: generators of knowledge bases, each checked by a second solver. Loads no torch.

from agentopt.weights.fold import worlds
tasks = worlds.rules(100, seed=1, depth=3, world="open")
"""

from __future__ import annotations

from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._chains import chains
from agentopt.weights.fold.worlds._kinship import kinship
from agentopt.weights.fold.worlds._logic import Clause, Literal, Theory
from agentopt.weights.fold.worlds._options import ChainOptions, KinshipOptions, RuleOptions
from agentopt.weights.fold.worlds._rules import rules

__all__ = [
    "ChainOptions",
    "Clause",
    "KinshipOptions",
    "Literal",
    "NotStratified",
    "RuleOptions",
    "Solution",
    "Theory",
    "chains",
    "kinship",
    "rules",
    "solve",
]
