"""Where changed code runs: tiers of rising strength behind one protocol, and the pool of warm workers on top of them.

A warm worker process takes code that an optimizer wrote, with a clean environment, a temporary working folder, resource
limits and a wall-clock limit. The process tier contains mistakes and no attacker. The namespace tier, the default,
shows the worker nothing of the machine but the interpreter. The container tier runs it in Docker or Podman. Others can
be registered. docs/sandbox.md says what each covers.
"""

from __future__ import annotations

from agentopt.sandbox._container import ContainerTier
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._namespace import NamespaceTier
from agentopt.sandbox._pool import RunnerPool, sandboxed
from agentopt.sandbox._process import ProcessTier
from agentopt.sandbox._runner import ProcessRunner, WorkerRunner
from agentopt.sandbox._tiers import (
    CONTAINER,
    NAMESPACE,
    PROCESS,
    SandboxUnavailable,
    Started,
    Tier,
    register_tier,
    resolve_tier,
    start_command,
    tier,
    tier_names,
    worker_command,
)

__all__ = [
    "CONTAINER",
    "NAMESPACE",
    "PROCESS",
    "ContainerTier",
    "Limits",
    "NamespaceTier",
    "ProcessRunner",
    "ProcessTier",
    "RunnerPool",
    "SandboxUnavailable",
    "Started",
    "Tier",
    "WorkerRunner",
    "register_tier",
    "resolve_tier",
    "sandboxed",
    "start_command",
    "tier",
    "tier_names",
    "worker_command",
]
