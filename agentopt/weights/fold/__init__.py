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
    from agentopt.weights.fold._documents import Documents as Documents
    from agentopt.weights.fold._documents import load_documents as load_documents
    from agentopt.weights.fold._estimator import Estimate as Estimate
    from agentopt.weights.fold._estimator import Speed as Speed
    from agentopt.weights.fold._estimator import estimate as estimate
    from agentopt.weights.fold._estimator import measure_speed as measure_speed
    from agentopt.weights.fold._events import Event as Event
    from agentopt.weights.fold._events import event_kinds as event_kinds
    from agentopt.weights.fold._folder import Folder as Folder
    from agentopt.weights.fold._gate import Gate as Gate
    from agentopt.weights.fold._gate import calibrate as calibrate
    from agentopt.weights.fold._icr_training import IcrOptions as IcrOptions
    from agentopt.weights.fold._icr_training import IcrResult as IcrResult
    from agentopt.weights.fold._icr_training import train_incontext as train_incontext
    from agentopt.weights.fold._incontext import InContext as InContext
    from agentopt.weights.fold._incontext import Prefix as Prefix
    from agentopt.weights.fold._reading import load_tasks as load_tasks
    from agentopt.weights.fold._reading import save_tasks as save_tasks
    from agentopt.weights.fold._reading import split_tasks as split_tasks
    from agentopt.weights.fold._result import MetaResult as MetaResult
    from agentopt.weights.fold._scores import FoldScores as FoldScores
    from agentopt.weights.fold._scores import Scored as Scored

_LAZY = {
    "Adapter": "_adapter",
    "Answer": "_answers",
    "Contradiction": "_contradictions",
    "contradictions": "_contradictions",
    "Documents": "_documents",
    "load_documents": "_documents",
    "Estimate": "_estimator",
    "Speed": "_estimator",
    "estimate": "_estimator",
    "measure_speed": "_estimator",
    "Event": "_events",
    "event_kinds": "_events",
    "Folder": "_folder",
    "Gate": "_gate",
    "calibrate": "_gate",
    "IcrOptions": "_icr_training",
    "IcrResult": "_icr_training",
    "train_incontext": "_icr_training",
    "InContext": "_incontext",
    "Prefix": "_incontext",
    "load_tasks": "_reading",
    "save_tasks": "_reading",
    "split_tasks": "_reading",
    "MetaResult": "_result",
    "FoldScores": "_scores",
    "Scored": "_scores",
}

__all__ = [
    "Adapter",
    "Answer",
    "Contradiction",
    "Documents",
    "Estimate",
    "Event",
    "FoldFormat",
    "FoldOptions",
    "FoldScores",
    "FoldTask",
    "Folder",
    "Gate",
    "IcrOptions",
    "IcrResult",
    "InContext",
    "MetaOptions",
    "MetaResult",
    "Prefix",
    "Question",
    "Scored",
    "Speed",
    "calibrate",
    "contradictions",
    "estimate",
    "event_kinds",
    "load_documents",
    "load_tasks",
    "measure_speed",
    "save_tasks",
    "split_tasks",
    "train_incontext",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.weights.fold.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
