"""Where changed code runs. This is the process tier: not a boundary for hostile code.

A warm worker process takes code that an optimizer wrote, in a session of its own, with a clean environment, a temporary
working folder, resource limits and a wall-clock limit. That contains mistakes: endless loops, runaway memory, huge
results, crashes, stray files. It does not contain an attacker: the worker runs as the same user and can read what that
user can read.
"""

from __future__ import annotations

from agentopt.sandbox._process import Limits, ProcessRunner, RunnerPool

__all__ = [
    "Limits",
    "ProcessRunner",
    "RunnerPool",
]
