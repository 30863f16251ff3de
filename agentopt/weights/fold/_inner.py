"""The inner loop: knowledge written into tensors by a few gradient steps, for many documents at once.

Only functions that need torch import this module. RECKONING (arXiv 2305.06349) differentiates through all steps;
truncation (as in PERK, arXiv 2507.06415) through the last `unroll`. PERK cuts earlier steps off wholly; here they keep
two paths that cost nothing: the identity to the start, and the one to their rates.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agentopt.errors import RunError, UserError
from agentopt.weights.fold._step import Place, checkpointed_step, constant_step, graph_step

if TYPE_CHECKING:
    from agentopt.weights.fold._engine import Engine
    from agentopt.weights.fold._meta import MetaParameters
    from agentopt.weights.fold._rows import Rows


_CPU_TOKENS = 1024


def fold_rows(
    engine: Engine, meta: MetaParameters, rows: Rows, *, graph: bool, documents_at_once: int | None = None
) -> dict[str, Tensor]:
    """The adapted tensors of every document after the inner loop.

    A document's inner loss is the sum of its tokens' NLL times `rows.weight`, as it stands there (`Rows.scaled`).

    Args:
        engine: what is adapted.
        meta: where the loop starts and how far it goes.
        rows: the documents.
        graph: whether the result can be differentiated with respect to the meta-parameters; without, nothing is kept.
        documents_at_once: fold so many at a time: less memory for the same result. None for all on a GPU, and on a CPU
            for as many as keep it busy.

    Returns:
        Tensors with a first axis of documents.

    Raises:
        RunError: a tensor is no longer finite; the message names the document and the step.
    """
    if documents_at_once is not None and documents_at_once < 1:
        raise UserError(f"fold: documents_at_once is {documents_at_once}, expected at least 1.")
    each = documents_at_once or _busy(engine, rows)
    graph = graph and torch.is_grad_enabled()
    with contextlib.nullcontext() if graph else torch.no_grad():
        parts = [
            _fold(engine, meta, rows.part(start, start + each), graph=graph, offset=start)
            for start in range(0, rows.documents, each)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _busy(engine: Engine, rows: Rows) -> int:
    """More tokens at a time make a CPU no faster: equal parts of at most so many."""
    if engine.device.type != "cpu":
        return rows.documents
    parts = math.ceil(rows.weight.numel() / _CPU_TOKENS)
    return max(1, math.ceil(rows.documents / parts))


def _fold(engine: Engine, meta: MetaParameters, rows: Rows, *, graph: bool, offset: int) -> dict[str, Tensor]:
    options = engine.options
    steps = options.inner_steps
    kept = (steps if options.unroll is None else min(options.unroll, steps)) if graph else 0
    work = engine.work(rows)
    place = Place(engine.expand(meta.init, rows.documents), {}, {})
    for number in range(steps):
        step = (checkpointed_step if options.checkpoint else graph_step) if number >= steps - kept else constant_step
        place = step(engine, meta, work, place, number)
        _check_finite(place.phi, offset, number)
    return place.phi


def _check_finite(phi: dict[str, Tensor], offset: int, number: int) -> None:
    with torch.no_grad():
        total = torch.stack([t.flatten(1).sum(1) for t in phi.values()]).sum(0)
        finite: Any = torch.isfinite(total)
        wrong = [place for place, fine in enumerate(finite.tolist()) if not fine]
    if wrong:
        which = ", ".join(str(offset + place) for place in wrong[:8])
        raise RunError(
            f"fold: the inner loop is no longer finite in step {number} (counted from 0) for the document {which}; use "
            "a smaller inner learning rate, or look at the rows of that document."
        )
