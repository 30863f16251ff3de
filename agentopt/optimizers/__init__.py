"""Optimizers: from a parent candidate, its rollouts and its history to typed edits worth measuring."""

from __future__ import annotations

from agentopt.optimizers._auto import Auto, Together, is_weak
from agentopt.optimizers._bootstrap import Bootstrap, BootstrapOptions
from agentopt.optimizers._capsules import Capsules, CapsulesOptions
from agentopt.optimizers._code import CodeRepair
from agentopt.optimizers._demonstrations import Demonstrations
from agentopt.optimizers._grounded import Grounded, GroundedOptions
from agentopt.optimizers._instructions import Instructions
from agentopt.optimizers._knowledge import KnowledgeForms, KnowledgeOptions
from agentopt.optimizers._opro import Opro, OproOptions
from agentopt.optimizers._optoprime import OptoPrime, OptoPrimeOptions
from agentopt.optimizers._optoprime_multi import OptoPrimeMulti, OptoPrimeMultiOptions
from agentopt.optimizers._playbook import Playbook, PlaybookOptions
from agentopt.optimizers._protocol import DroppedEdit, Optimizer, PastProposal, ProposeContext, Update
from agentopt.optimizers._reflection import Reflection, ReflectionOptions
from agentopt.optimizers._resolve import OPTIMIZER_NAMES, resolve_optimizer
from agentopt.optimizers._templates import load_templates
from agentopt.optimizers._textgrad import TextGrad, TextGradOptions
from agentopt.optimizers._tpe import Tpe
from agentopt.optimizers._values import Values
from agentopt.optimizers.symbolic import LearningRate, Symbolic, SymbolicOptions

__all__ = [
    "OPTIMIZER_NAMES",
    "Auto",
    "Bootstrap",
    "BootstrapOptions",
    "Capsules",
    "CapsulesOptions",
    "CodeRepair",
    "Demonstrations",
    "DroppedEdit",
    "Grounded",
    "GroundedOptions",
    "Instructions",
    "KnowledgeForms",
    "KnowledgeOptions",
    "LearningRate",
    "Opro",
    "OproOptions",
    "Optimizer",
    "OptoPrime",
    "OptoPrimeMulti",
    "OptoPrimeMultiOptions",
    "OptoPrimeOptions",
    "PastProposal",
    "Playbook",
    "PlaybookOptions",
    "ProposeContext",
    "Reflection",
    "ReflectionOptions",
    "Symbolic",
    "SymbolicOptions",
    "TextGrad",
    "TextGradOptions",
    "Together",
    "Tpe",
    "Update",
    "Values",
    "is_weak",
    "load_templates",
    "resolve_optimizer",
]
