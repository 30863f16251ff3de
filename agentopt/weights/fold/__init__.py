"""Knowledge folding: facts written into an adapter by a meta-learned inner loop. Importing this loads no torch.

    from agentopt.weights.fold import Folder
    with Folder("embedded", rank=8, layers=4) as folder:
        folder.meta_train(tasks, out="meta")                     # learn to fold, once
        adapter = folder.fold(["Anne is kind.", "Kind people are nice."])
        answer = folder.ask(adapter, "Is Anne nice?", choices=["yes", "no"])

RECKONING (arXiv 2305.06349) and PERK (arXiv 2507.06415).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from agentopt.weights.fold._types import FoldFormat, FoldOptions, FoldTask, MetaOptions, Question

if TYPE_CHECKING:
    from agentopt.weights.fold._adapter import Adapter as Adapter
    from agentopt.weights.fold._answers import Answer as Answer
    from agentopt.weights.fold._contradictions import Contradiction as Contradiction
    from agentopt.weights.fold._contradictions import contradictions as contradictions
    from agentopt.weights.fold._folder import Folder as Folder
    from agentopt.weights.fold._gate import Gate as Gate
    from agentopt.weights.fold._incontext import InContext as InContext
    from agentopt.weights.fold._incontext import Prefix as Prefix
    from agentopt.weights.fold._result import MetaResult as MetaResult
    from agentopt.weights.fold._scores import FoldScores as FoldScores
    from agentopt.weights.fold._scores import Scored as Scored

_LAZY = {
    "Adapter": "_adapter",
    "Answer": "_answers",
    "Contradiction": "_contradictions",
    "contradictions": "_contradictions",
    "Folder": "_folder",
    "Gate": "_gate",
    "InContext": "_incontext",
    "Prefix": "_incontext",
    "MetaResult": "_result",
    "FoldScores": "_scores",
    "Scored": "_scores",
}

__all__ = [
    "Adapter",
    "Answer",
    "Contradiction",
    "FoldFormat",
    "FoldOptions",
    "FoldScores",
    "FoldTask",
    "Folder",
    "Gate",
    "InContext",
    "MetaOptions",
    "MetaResult",
    "Prefix",
    "Question",
    "Scored",
    "contradictions",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.fold.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
