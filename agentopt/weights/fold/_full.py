"""All weights of the model, another set for every document (RECKONING, arXiv 2305.06349).

Only functions that need torch import this module. Documents run together through `torch.func.vmap`, or one after the
other where the model's code does not allow it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from agentopt.weights.fold import _head
from agentopt.weights.fold._attention import twice_differentiable
from agentopt.weights.fold._engine import Held, State, leaf, swapped
from agentopt.weights.fold._head import replaced
from agentopt.weights.fold._rows import Rows, Work
from agentopt.weights.fold._types import FoldOptions


class FullEngine(Held):
    """Every document with all weights of its own; their start is a trained copy of the model's."""

    def __init__(self, model: Any, options: FoldOptions) -> None:
        super().__init__(model, options)
        model.requires_grad_(False)
        # Vectorised, torch forgets that an embedding's row for padding has no gradient: let it have one everywhere.
        self._padded = [
            (module, module.padding_idx) for module in model.modules() if isinstance(module, torch.nn.Embedding)
        ]
        for module, _ in self._padded:
            module.padding_idx = None
        self._batched = self._allows_vmap()

    def init(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: leaf(parameter) for name, parameter in self.model.named_parameters()}

    def shared(self) -> dict[str, Tensor]:
        """See `Engine`: nothing is left to share."""
        return {}

    def expand(self, init: State, documents: int) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: tensor.unsqueeze(0).expand(documents, *tensor.shape) for name, tensor in init.items()}

    def tokens(self, state: State | None, work: Work, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        logits, hidden = self._run(state, work, twice=twice)
        return _head.nll(logits, work.targets), hidden

    def logits_at(self, state: State | None, rows: Rows, keep: Tensor) -> Tensor:
        """See `Engine`."""
        return self._run(state, self.work(Rows(rows.ids, keep.to(torch.float32))), twice=False)[0]

    def _run(self, state: State | None, work: Work, *, twice: bool) -> tuple[Tensor, Tensor]:
        """Logits (K, V) and hidden states (K, d) at the places of the work."""
        with twice_differentiable(self.model) if twice else contextlib.nullcontext():
            if state is None:
                rows = work.ids.reshape(-1, work.ids.shape[-1])
                logits, hidden = self._forward({}, rows, work.first)
            elif self._batched and work.ids.shape[0] > 1:
                logits, hidden = self._vectorised(state, work.ids, work.first)
            else:
                each = [
                    self._forward({name: tensor[place] for name, tensor in state.items()}, ids, work.first)
                    for place, ids in enumerate(work.ids)
                ]
                logits, hidden = (torch.stack(list(parts)) for parts in zip(*each, strict=True))
        columns = work.ids.shape[-1]
        places = work.places // columns * (columns - work.first) + work.places % columns - work.first
        return logits.reshape(-1, logits.shape[-1])[places], hidden.reshape(-1, hidden.shape[-1])[places]

    def _vectorised(self, state: State, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
        def one(own: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
            return self._forward(own, rows, first)

        # The fused kernels have no rule for another axis: torch would run them document by document.
        with twice_differentiable(self.model):
            return torch.func.vmap(one)(dict(state), ids)

    def _forward(self, state: Mapping[str, Tensor], rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        with replaced(self.fused), self.head.picking(lambda hidden: hidden[:, first:], skip=False):
            arguments = {"input_ids": rows, "use_cache": False}
            logits: Tensor = torch.func.functional_call(self.model, dict(state), (), arguments).logits
            hidden: Tensor = self.head.hidden
            self.head.hidden = None
        return logits, hidden

    def _allows_vmap(self) -> bool:
        """Code that looks at values cannot be vectorised."""
        state = {name: p.detach().unsqueeze(0).expand(2, *p.shape) for name, p in self.model.named_parameters()}
        ids = torch.zeros(2, 1, 2, dtype=torch.int64, device=self.device)
        try:
            with torch.no_grad():
                self._vectorised(state, ids, 0)
        except (RuntimeError, ValueError, TypeError):
            return False
        return True

    @contextlib.contextmanager
    def using(self, state: State) -> Generator[None]:
        """See `Engine`."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        one = {name: t if t.shape == shapes[name] else t.squeeze(0) for name, t in state.items()}
        with swapped(self.model, {}, one):
            yield

    def close(self) -> None:
        """Leave the model as it was before."""
        for module, place in self._padded:
            module.padding_idx = place
        super().close()
