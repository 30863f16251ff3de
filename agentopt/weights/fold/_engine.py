"""What the inner loop moves and how the model computes with it, for many documents at once.

Only functions that need torch import this module. `make_engine` gives a `LoraEngine` (factors of every document through
the batched LoRA layer: one forward pass for all of them) or a `FullEngine` (all weights, in `_full`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights import adapters
from agentopt.weights.fold import _head
from agentopt.weights.fold._attention import check_attention, twice_differentiable
from agentopt.weights.fold._head import Head, fused, replaced
from agentopt.weights.fold._rows import Rows, Work, unpack, work
from agentopt.weights.fold._types import FoldOptions

State = Mapping[str, Tensor]

B_START = 0.02
"""`lora_B` starts uniform between plus and minus this: with zero, `lora_A` would get no gradient."""


class Engine(Protocol):
    """A model whose adapted tensors may be another set for every document."""

    model: Any
    options: FoldOptions
    device: Any
    hidden_size: int
    """Width of the hidden states that the head is given."""

    def init(self) -> dict[str, Tensor]:
        """New leaf tensors to start the inner loop from, without document axis; a function of the options' seed."""
        ...

    def shared(self) -> dict[str, Tensor]:
        """The base's other weights when they are trained, else {}: leaf tensors that the engine computes with.
        The model's own stay as they are.
        """
        ...

    def expand(self, init: State, documents: int) -> dict[str, Tensor]:
        """The start of every document: a first axis without copies."""
        ...

    def work(self, rows: Rows) -> Work:
        """Rows prepared for `tokens`."""
        ...

    def tokens(self, state: State | None, work: Work, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        """NLL (K,) of the predicted tokens, and the hidden states (K, d) that predict them."""
        ...

    def nll(self, state: State | None, rows: Rows, *, twice: bool = False) -> Tensor:
        """NLL (E, R, L) of every token of weight other than 0, else 0.

        Args:
            state: tensors with a document axis; None for the base as it was given.
            rows: as many documents as the state has.
            twice: whether the result will be differentiated twice.
        """
        ...

    def nll_hidden(self, state: State | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """`nll` and the hidden states (E, R, L, d) that predict the tokens; 0 where the weight is 0."""
        ...

    def logits_at(self, state: State | None, rows: Rows, keep: Tensor) -> Tensor:
        """Logits (K, V) that predict the tokens where `keep` (E, R, L) is true, in that order."""
        ...

    def using(self, state: State) -> AbstractContextManager[None]:
        """Within, the model itself computes with one document's tensors (no document axis, or one of 1)."""
        ...

    def close(self) -> None:
        """Leave the model as it was before."""
        ...


def make_engine(model: Any, options: FoldOptions) -> Engine:
    """The engine for what the options adapt. The model is in evaluation mode until `close`.

    Raises:
        UserError: the model has adapters already, a target names nothing, more layers than there are, or its attention
            has no second derivative.
    """
    check_attention(model, options.unroll)
    if options.adapts == "lora":
        return LoraEngine(model, options)
    from agentopt.weights.fold._full import FullEngine

    return FullEngine(model, options)


class Held(ABC):
    """A model while an engine has it: in evaluation mode, with its head in hand, put back by `close`."""

    def __init__(self, model: Any, options: FoldOptions) -> None:
        self.model, self.options = model, options
        self._training = bool(model.training)
        self._needs = [(p, p.requires_grad) for p in model.parameters()]
        self._quiet = [m for m in model.modules() if hasattr(m, "warn_if_padding_and_no_attention_mask")]
        for module in self._quiet:  # padding on the right needs no mask; the look at the values would stop vmap
            module.warn_if_padding_and_no_attention_mask = _nothing
        model.eval()
        try:
            self.fused = fused(model)
            self.head = Head(model)
            self.device: Any = self.head.module.weight.device
            self.hidden_size = int(self.head.hidden.shape[-1]) if self.head.hidden is not None else self._width()
        except BaseException:  # nobody has an engine to close then
            Held.close(self)
            raise

    def _width(self) -> int:
        with torch.no_grad(), self.head.picking(lambda hidden: hidden, skip=False):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
        return int(self.head.hidden.shape[-1])

    def close(self) -> None:
        """Leave the model as it was before."""
        for parameter, needs in self._needs:
            parameter.requires_grad_(needs)
        for module in self._quiet:
            module.__dict__.pop("warn_if_padding_and_no_attention_mask", None)
        self.model.train(self._training)

    def work(self, rows: Rows) -> Work:
        """See `Engine`."""
        return work(rows, self.device)

    @abstractmethod
    def tokens(self, state: State | None, work: Work, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        """See `Engine`."""

    def nll(self, state: State | None, rows: Rows, *, twice: bool = False) -> Tensor:
        """See `Engine`."""
        return unpack(self.tokens(state, self.work(rows), twice=twice)[0], rows)

    def nll_hidden(self, state: State | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        nll, hidden = self.tokens(state, self.work(rows))
        return unpack(nll, rows), unpack(hidden, rows)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class LoraEngine(Held):
    """LoRA factors per document on a frozen base (PERK, arXiv 2507.06415), or on one that is trained as well.

    With the base frozen, the layers under the lowest adapted one compute the same in every inner step: what they give
    for a block of rows is kept with its `Work`.
    """

    def __init__(self, model: Any, options: FoldOptions) -> None:
        base = {name: p for name, p in model.named_parameters()}
        blocks = decoder_blocks(model)
        targets = _targets(model, blocks, options)
        super().__init__(model, options)
        rank = options.rank
        try:
            self.adapters = adapters.attach(
                model, rank=rank, alpha=options.alpha or rank, targets=targets, seed=options.seed
            )
        except UserError:
            super().close()
            raise
        self._shared: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        if options.trains == "all":
            now = {id(p): name for name, p in model.named_parameters()}
            self._shared = {name: leaf(p) for name, p in base.items()}
            self._names = {name: now[id(p)] for name, p in base.items()}
        lowest = min(i for i, (name, _) in enumerate(blocks) if any(t.startswith(f"{name}.") for t in targets))
        self._below: list[Any] = [] if self._shared else [module for _, module in blocks[:lowest]]
        self._zero = {
            name: torch.zeros_like(p) for name, p in self.adapters.parameters().items() if name.endswith("lora_B")
        }

    def init(self) -> dict[str, Tensor]:
        """See `Engine`."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.adapters.state().items():
            if name.endswith("lora_B"):
                bits = np.random.Philox(key=seed_number("fold-lora-b", self.options.seed, name))
                draw = np.random.Generator(bits).random(tuple(tensor.shape), dtype=np.float32)
                tensor.copy_(torch.as_tensor((draw * 2 - 1) * np.float32(B_START)))
            double = self.head.module.weight.dtype == torch.float64
            found[name] = (tensor.double() if double else tensor).requires_grad_()
        return found

    def shared(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._shared

    def expand(self, init: State, documents: int) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: tensor.unsqueeze(0).expand(documents, -1, -1) for name, tensor in init.items()}

    def tokens(self, state: State | None, work: Work, *, twice: bool = False) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        lean = self.head.plain and not self._shared
        out = self._forward(state, work, work.places, skip=lean, twice=twice)
        hidden: Tensor = self.head.hidden[0]
        self.head.hidden = None
        return self.head.lean_nll(hidden, work.targets) if lean else _head.nll(out, work.targets), hidden

    def logits_at(self, state: State | None, rows: Rows, keep: Tensor) -> Tensor:
        """See `Engine`."""
        kept = self.work(Rows(rows.ids, keep.to(torch.float32)))
        return self._forward(state, kept, kept.places, skip=False, twice=False)

    def _forward(self, state: State | None, work: Work, places: Tensor, *, skip: bool, twice: bool) -> Tensor:
        """The head's output at these places, (K, V), or with `skip` its input."""
        rows = work.ids.reshape(-1, work.ids.shape[-1])
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.adapters.use(dict(self._zero if state is None else state)))
            stack.enter_context(replaced(self.fused))
            stack.enter_context(
                self.head.picking(lambda hidden: hidden.reshape(-1, hidden.shape[-1])[places].unsqueeze(0), skip=skip)
            )
            if self._below:
                stack.enter_context(self._known_below(work))
            if twice:
                stack.enter_context(twice_differentiable(self.model))
            arguments = {"input_ids": rows, "use_cache": False}
            if self._shared and state is not None:
                weights = {self._names[name]: tensor for name, tensor in self._shared.items()}
                return torch.func.functional_call(self.model, weights, (), arguments).logits[0]
            return self.model(**arguments).logits[0]

    @contextlib.contextmanager
    def _known_below(self, work: Work) -> Generator[None]:
        """Within, layers under the adapted ones are skipped once what comes out of the last of them is known."""
        last = self._below[-1]
        if work.below is None:

            def keep(_module: Any, _given: Any, out: Any) -> None:
                work.below = out

            handle = last.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()
            return
        wrapped = isinstance(work.below, tuple)

        def skipped(hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
            return (hidden,) if wrapped else hidden

        def known(*_args: Any, **_kwargs: Any) -> Any:
            return work.below

        with replaced([(layer, known if layer is last else skipped) for layer in self._below]):
            yield

    @contextlib.contextmanager
    def using(self, state: State) -> Generator[None]:
        """See `Engine`."""
        with self.adapters.use(dict(state)), swapped(self.model, self._names, self._shared):
            yield

    def close(self) -> None:
        """Leave the model as it was before."""
        self.adapters.detach_model()
        super().close()


def leaf(parameter: Tensor) -> Tensor:
    """A trained copy, in float32 at least."""
    number = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(number, copy=True).requires_grad_()


@contextlib.contextmanager
def swapped(model: Any, names: Mapping[str, str], values: State) -> Generator[None]:
    """Within, parameters hold other values; `names` are theirs in the model."""
    own = dict(model.named_parameters())
    before = {name: own[names.get(name, name)].data for name in values}
    for name, tensor in values.items():
        own[names.get(name, name)].data = tensor.detach()
    try:
        yield
    finally:
        for name, data in before.items():
            own[names.get(name, name)].data = data


def decoder_blocks(model: Any) -> list[tuple[str, Any]]:
    """The decoder's layers with their names, lowest first.

    Raises:
        UserError: none are found.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return [(f"{name}.{place}", layer) for place, layer in enumerate(module)]
    raise UserError(f"fold: found no list of decoder layers in {type(model).__name__}.")


def _targets(model: Any, blocks: list[tuple[str, Any]], options: FoldOptions) -> list[str]:
    """Whole names of the linear layers to adapt."""
    from agentopt.weights.adapters._layer import is_linear

    if options.layers is not None and options.layers > len(blocks):
        raise UserError(f"fold: layers is {options.layers}, expected at most {len(blocks)}: the model has no more.")
    top = tuple(f"{name}." for name, _ in blocks[-(options.layers or len(blocks)) :])
    wanted = (options.targets,) if isinstance(options.targets, str) else options.targets
    every = wanted == (adapters.ALL_LINEAR,)
    linear = [name for name, module in model.named_modules() if name.startswith(top) and is_linear(module)]
    found = [name for name in linear if every or any(name == one or name.endswith(f".{one}") for one in wanted)]
    missing = [one for one in wanted if not every and not any(n == one or n.endswith(f".{one}") for n in linear)]
    if missing or not found:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise UserError(
            f"fold: found the target {(missing or list(wanted))[0]!r}, expected {adapters.ALL_LINEAR!r} or linear "
            f"layers of the adapted decoder layers: {ends}."
        )
    return found
