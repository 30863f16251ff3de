"""The capsulator: shorter prompts in plain language, under a hard token budget, with protected spans and a gate."""

from __future__ import annotations

from agentopt.capsules._caching import CachingRule
from agentopt.capsules._cost import Horizon, price_capsule
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._gate import gate, regate_needed
from agentopt.capsules._options import CapsuleOptions
from agentopt.capsules._task import Task, TaskOptions
from agentopt.capsules._tokens import Meter, TokenBudget, Tokenizer
from agentopt.capsules._types import Capsule, Check, CostReport, Document, DroppedUnit, GateReport, Span, Unit

__all__ = [
    "BudgetInfeasible",
    "CachingRule",
    "Capsule",
    "CapsuleOptions",
    "Check",
    "CostReport",
    "Document",
    "DroppedUnit",
    "GateReport",
    "Horizon",
    "Meter",
    "Span",
    "Task",
    "TaskOptions",
    "TokenBudget",
    "Tokenizer",
    "Unit",
    "gate",
    "price_capsule",
    "regate_needed",
]
