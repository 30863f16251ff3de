"""agentopt: record an agent's run as a graph, send feedback backward, keep only edits that are measured to help.

This module is the public face: every name is loaded from its room on first use, so `import agentopt` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentopt._api import acapsule, aevaluate, atune, capsule, evaluate, tune
    from agentopt.capsules import (
        BudgetInfeasible,
        Capsule,
        CapsuleLM,
        CapsuleOptions,
        History,
        Originals,
        Task,
        TokenBudget,
        retrieval_tool,
    )
    from agentopt.errors import AgentoptError, RunError, UserError
    from agentopt.evaluation import Dataset, EvaluationResult, Example, Judge, Score
    from agentopt.graph import (
        Candidate,
        Components,
        ExecutionError,
        Feedback,
        Knowledge,
        Module,
        Node,
        OpRecord,
        Principles,
        Subgraph,
        ThreadPoolExecutor,
        Toolbox,
        Trace,
        agent,
        allow_effects,
        backward,
        bind_context,
        bundle,
        choice,
        components,
        demos,
        knowledge,
        load,
        module,
        node,
        number,
        parameter,
        principles,
        prompt,
        record,
        register_dataclass,
        report_usage,
        step,
        stop_tracing,
        tool,
        toolbox,
    )
    from agentopt.models import LM, FunctionLM, LMOptions, OracleLM, ReplayLM, Reply, ScriptedLM, configure, lm
    from agentopt.pipelines import Pipeline
    from agentopt.search import Budget, Claim, TuneOptions, TuneResult

_ROOMS = {
    "agentopt._api": ("acapsule", "aevaluate", "atune", "capsule", "evaluate", "tune"),
    "agentopt.capsules": (
        "BudgetInfeasible",
        "Capsule",
        "CapsuleLM",
        "CapsuleOptions",
        "History",
        "Originals",
        "Task",
        "TokenBudget",
        "retrieval_tool",
    ),
    "agentopt.errors": ("AgentoptError", "RunError", "UserError"),
    "agentopt.evaluation": ("Dataset", "EvaluationResult", "Example", "Judge", "Score"),
    "agentopt.graph": (
        "Candidate",
        "Components",
        "ExecutionError",
        "Feedback",
        "Knowledge",
        "Module",
        "Node",
        "OpRecord",
        "Principles",
        "Subgraph",
        "ThreadPoolExecutor",
        "Toolbox",
        "Trace",
        "agent",
        "allow_effects",
        "backward",
        "bind_context",
        "bundle",
        "choice",
        "components",
        "demos",
        "knowledge",
        "load",
        "module",
        "node",
        "number",
        "parameter",
        "principles",
        "prompt",
        "record",
        "register_dataclass",
        "report_usage",
        "step",
        "stop_tracing",
        "tool",
        "toolbox",
    ),
    "agentopt.models": (
        "LM",
        "FunctionLM",
        "LMOptions",
        "OracleLM",
        "ReplayLM",
        "Reply",
        "ScriptedLM",
        "configure",
        "lm",
    ),
    "agentopt.pipelines": ("Pipeline",),
    "agentopt.search": ("Budget", "Claim", "TuneOptions", "TuneResult"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "LM",
    "AgentoptError",
    "Budget",
    "BudgetInfeasible",
    "Candidate",
    "Capsule",
    "CapsuleLM",
    "CapsuleOptions",
    "Claim",
    "Components",
    "Dataset",
    "EvaluationResult",
    "Example",
    "ExecutionError",
    "Feedback",
    "FunctionLM",
    "History",
    "Judge",
    "Knowledge",
    "LMOptions",
    "Module",
    "Node",
    "OpRecord",
    "OracleLM",
    "Originals",
    "Pipeline",
    "Principles",
    "ReplayLM",
    "Reply",
    "RunError",
    "Score",
    "ScriptedLM",
    "Subgraph",
    "Task",
    "ThreadPoolExecutor",
    "TokenBudget",
    "Toolbox",
    "Trace",
    "TuneOptions",
    "TuneResult",
    "UserError",
    "__version__",
    "acapsule",
    "aevaluate",
    "agent",
    "allow_effects",
    "atune",
    "backward",
    "bind_context",
    "bundle",
    "capsule",
    "choice",
    "components",
    "configure",
    "demos",
    "evaluate",
    "knowledge",
    "lm",
    "load",
    "module",
    "node",
    "number",
    "parameter",
    "principles",
    "prompt",
    "record",
    "register_dataclass",
    "report_usage",
    "retrieval_tool",
    "step",
    "stop_tracing",
    "tool",
    "toolbox",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room, once."""
    room = _HOME.get(name)
    if room is None:
        raise AttributeError(f"module 'agentopt' has no attribute {name!r}")
    module = importlib.import_module(room)
    if room == "agentopt.graph":
        module.set_default_code_runner(_sandbox)
    elif room == "agentopt.models":
        module.add_scheme("fold", _folder_lm, _FOLD_FORM)
    value = getattr(module, name)
    globals()[name] = value
    return value


def _sandbox() -> Any:
    """Who runs changed code, unless a `use_code_runner` block says otherwise."""
    from agentopt.sandbox import RunnerPool

    return RunnerPool()


_FOLD_FORM = "fold:META (a folder of `agentopt fold train`)"


def _folder_lm(spec: str) -> Any:
    """The client of a spec `fold:META`; the weights room is loaded when one is made, torch when it is called."""
    from agentopt.weights.fold.client import FolderLM

    return FolderLM(spec.removeprefix("fold:"))


def __dir__() -> list[str]:
    return sorted(__all__)
