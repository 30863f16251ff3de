"""Knowledge folding: facts written into an adapter by a meta-learned inner loop. Importing this loads no torch."""

from __future__ import annotations

from agentopt.weights.fold._types import FoldFormat, FoldOptions, FoldTask, MetaOptions, Question

__all__ = ["FoldFormat", "FoldOptions", "FoldTask", "MetaOptions", "Question"]
