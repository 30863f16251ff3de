"""The capsulator: shorter prompts in plain language, under a hard token budget, with protected spans and a gate."""

from __future__ import annotations

from agentopt.capsules._batch import RECORDS, BatchItem, BatchProgress, batch
from agentopt.capsules._batch_records import Unwritable
from agentopt.capsules._capsule import MODES, Source, make_capsule
from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules._library import Library, LibraryRow, LibraryWarning, capsule_key
from agentopt.capsules._options import CapsuleOptions
from agentopt.capsules._types import Capsule, Check, CostReport, Document, DroppedUnit, GateReport, Mode, Span, Unit
from agentopt.capsules.agents._history import Emission, History, HistoryOptions, HistoryUsage
from agentopt.capsules.agents._masking import Masked, Masking, mask
from agentopt.capsules.agents._middleware import CapsuleLM, LiveOptions, LiveReport
from agentopt.capsules.agents._originals import Originals, UnknownHandle, retrieval_tool
from agentopt.capsules.counting._tokens import Meter, TokenBudget, Tokenizer
from agentopt.capsules.extraction._extract import Extraction, extract
from agentopt.capsules.extraction._stream import Streamed, stream
from agentopt.capsules.gating._caching import CachingRule
from agentopt.capsules.gating._cost import Horizon, price_capsule
from agentopt.capsules.gating._gate import gate, regate_needed
from agentopt.capsules.gating._task import Task, TaskOptions
from agentopt.capsules.rewriting._rewrite import RewriteOptions, Rewriting, Win, rank_styles, rewrite
from agentopt.capsules.rewriting._verify import verify
from agentopt.capsules.units._keep import find_keep
from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._spans import find_intact
from agentopt.capsules.units._units import parse

__all__ = [
    "MODES",
    "RECORDS",
    "BatchItem",
    "BatchProgress",
    "BudgetInfeasible",
    "CachingRule",
    "Capsule",
    "CapsuleLM",
    "CapsuleOptions",
    "Check",
    "CostReport",
    "Document",
    "DroppedUnit",
    "Emission",
    "Extraction",
    "GateReport",
    "History",
    "HistoryOptions",
    "HistoryUsage",
    "Horizon",
    "Library",
    "LibraryRow",
    "LibraryWarning",
    "LiveOptions",
    "LiveReport",
    "Masked",
    "Masking",
    "Meter",
    "Mode",
    "Originals",
    "RewriteOptions",
    "Rewriting",
    "Source",
    "Span",
    "Streamed",
    "Task",
    "TaskOptions",
    "TokenBudget",
    "Tokenizer",
    "Unit",
    "UnknownHandle",
    "Unwritable",
    "Win",
    "batch",
    "capsule_key",
    "extract",
    "find_intact",
    "find_keep",
    "gate",
    "lossless",
    "make_capsule",
    "mask",
    "parse",
    "price_capsule",
    "rank_styles",
    "regate_needed",
    "retrieval_tool",
    "rewrite",
    "stream",
    "verify",
]
