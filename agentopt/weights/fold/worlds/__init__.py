"""Worlds with known answers: generators of knowledge bases, each checked by a second solver. Loads no torch.

from agentopt.weights.fold import worlds
tasks = worlds.rules(100, seed=1, depth=3, world="open")
"""

from __future__ import annotations

from agentopt.weights.fold.worlds._chaining import NotStratified, Solution, solve
from agentopt.weights.fold.worlds._chains import chains
from agentopt.weights.fold.worlds._checking import Checked, check
from agentopt.weights.fold.worlds._kinship import kinship
from agentopt.weights.fold.worlds._logic import Clause, Literal, Theory
from agentopt.weights.fold.worlds._options import ChainOptions, KinshipOptions, RuleOptions
from agentopt.weights.fold.worlds._parsing import parse_statement, parse_theory, sentences
from agentopt.weights.fold.worlds._rules import rules
from agentopt.weights.fold.worlds._views import with_distractors

__all__ = [
    "ChainOptions",
    "Checked",
    "Clause",
    "KinshipOptions",
    "Literal",
    "NotStratified",
    "RuleOptions",
    "Solution",
    "Theory",
    "chains",
    "check",
    "kinship",
    "parse_statement",
    "parse_theory",
    "rules",
    "sentences",
    "solve",
    "with_distractors",
]
