"""The capsulator: shorter prompts in plain language, under a hard token budget, with protected spans and a gate."""

from __future__ import annotations

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._options import CapsuleOptions
from agentopt.capsules._tokens import Meter, TokenBudget, Tokenizer
from agentopt.capsules._types import Capsule, Check, CostReport, Document, DroppedUnit, GateReport, Span, Unit

__all__ = [
    "BudgetInfeasible",
    "Capsule",
    "CapsuleOptions",
    "Check",
    "CostReport",
    "Document",
    "DroppedUnit",
    "GateReport",
    "Meter",
    "Span",
    "TokenBudget",
    "Tokenizer",
    "Unit",
]
