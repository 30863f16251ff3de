"""The adapters of one model: whose turn it is, where they are kept, how they leave."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.weights.adapters import _files
from agentopt.weights.load import need

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from agentopt.weights.adapters._files import Factors
    from agentopt.weights.adapters._layer import LoraLinear, Selection

_FACTORS = ("lora_A", "lora_B")


class Adapters:
    """Low-rank adapters that are attached to a model; made by `attach` and `load`.

    With several copies, a batch is split into one equal chunk of rows per copy, in order, unless `rows` says which
    copy each row uses.
    """

    def __init__(self, model: Any, layers: dict[str, LoraLinear], thawed: Sequence[Parameter]) -> None:
        self.model = model
        self.layers = layers
        self.copies = next(iter(layers.values())).copies
        self._thawed = list(thawed)
        self._selection: Selection = next(iter(layers.values())).selection
        self._attached = True

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters().values())
        return f"Adapters({len(self.layers)} layers, copies={self.copies}, {count:,} parameters)"

    def parameters(self) -> dict[str, Parameter]:
        """The factors under the names that `model.named_parameters()` gives them."""
        return {
            f"{name}.{factor}": getattr(layer, factor) for name, layer in self.layers.items() for factor in _FACTORS
        }

    def state(self) -> dict[str, Tensor]:
        """A copy of the factors, which `use` takes."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    @contextlib.contextmanager
    def rows(self, index: Sequence[int] | Tensor) -> Generator[None]:
        """Within, row r of a batch uses adapter `index[r]`.

        A batch of n times as many rows (beams, several samples per row) is split into equal chunks of consecutive rows.

        Raises:
            UserError: an index is empty or outside the adapters.
        """
        torch = need("torch")
        numbers: list[Any] = torch.as_tensor(index).tolist()
        held = self._held()
        wrong = [number for number in numbers if not isinstance(number, int) or not 0 <= number < held]
        if wrong or not numbers:
            found = wrong[0] if wrong else "no row"
            raise UserError(
                f"adapters: found {found!r} as the adapter of a row, expected a number from 0 to {held - 1}."
            )
        each = len(numbers) // held
        # Equal chunks in order need no copy of the factors per row.
        chunked = numbers == [number for number in range(held) for _ in range(each)]
        before = self._selection.index
        device = next(iter(self.layers.values())).lora_A.device
        self._selection.index = None if chunked else torch.tensor(numbers, device=device)
        try:
            yield
        finally:
            self._selection.index = before

    def _held(self) -> int:
        """Adapters side by side, those of `use` included."""
        pairs = ((layer.lora_A, layer.lora_B) if layer.override is None else layer.override for layer in self._layers())
        return max(1 if factor.dim() == 2 else int(factor.shape[0]) for pair in pairs for factor in pair)

    def _layers(self) -> list[LoraLinear]:
        if not self._attached:
            raise UserError(
                "adapters: these have left their model (merge_ or detach_model was called); attach new ones."
            )
        return list(self.layers.values())

    @contextlib.contextmanager
    def use(self, state: dict[str, Tensor]) -> Generator[None]:
        """Within, the model computes with these factors in place of its own.

        Gradients flow into them, also second derivatives. A factor may have a first axis of n adapters, whatever
        `copies` is. What the state leaves out keeps its own value. With gradient checkpointing, call backward within.

        Args:
            state: factors under the names of `parameters()`.

        Raises:
            UserError: an unknown name or a shape that does not fit.
        """
        pairs = self._pairs(state)
        before = {name: self.layers[name].override for name in pairs}
        for name, pair in pairs.items():
            self.layers[name].override = pair
        try:
            yield
        finally:
            for name, override in before.items():
                self.layers[name].override = override

    def _pairs(self, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        self._layers()
        own = self.parameters()
        counts: dict[int, str] = {}
        for name, tensor in state.items():
            if name not in own:
                raise UserError(f"adapters: found the name {name!r}, expected names such as {next(iter(own))!r}.")
            expected = tuple(own[name].shape[-2:])
            if tensor.dim() not in (2, 3) or tuple(tensor.shape[-2:]) != expected:
                raise UserError(
                    f"adapters: {name} has the shape {tuple(tensor.shape)}, expected {expected}, or (n, *{expected})."
                )
            if tensor.dim() == 3 and tensor.shape[0] > 1:
                counts.setdefault(int(tensor.shape[0]), name)
        if len(counts) > 1:
            (one, first), (other, second) = list(counts.items())[:2]
            raise UserError(f"adapters: {first} holds {one} adapters but {second} holds {other}.")
        touched = dict.fromkeys(name.rpartition(".")[0] for name in state)
        return {
            layer: (
                state.get(f"{layer}.lora_A", self.layers[layer].lora_A),
                state.get(f"{layer}.lora_B", self.layers[layer].lora_B),
            )
            for layer in touched
        }

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, copy: int = 0) -> Path:
        """Write one adapter in the format of peft, which transformers and vLLM read as well."""
        self._check_copy(copy)
        return _files.save(folder, self.model, self.layers, copy)

    def load(self, folder: str | Path, copy: int = 0) -> None:
        """Fill one of these adapters with a stored one; layers that it leaves out get a zero `lora_B`.

        A smaller rank is padded with zeros and another alpha is multiplied into `lora_B`: what the layers compute is
        what was stored.

        Raises:
            UserError: it has a layer, a rank or a shape for which there is no room here.
        """
        self._check_copy(copy)
        self.fill(_files.load(folder), str(folder), copy)

    def fill(self, stored: dict[str, Factors], origin: str, copy: int = 0) -> None:
        """Copy factors that were read into one of these adapters; `origin` names them in errors."""
        for name, factors in stored.items():
            layer = self.layers.get(name)
            if layer is None:
                raise UserError(f"adapter {origin!r}: has factors for {name}, where this model has no adapter.")
            expected = (layer.rank, layer.in_features, layer.out_features)
            found = (factors.rank, int(factors.a.shape[1]), int(factors.b.shape[0]))
            if found[1:] != expected[1:] or found[0] > expected[0]:
                raise UserError(
                    f"adapter {origin!r}: {name} has (rank, in, out) = {found}, expected {expected} or a smaller rank."
                )
        with need("torch").no_grad():
            for name, layer in self.layers.items():
                a, b = (self._copy_of(getattr(layer, factor), copy) for factor in _FACTORS)
                b.zero_()
                if name in stored:
                    factors = stored[name]
                    a.zero_()[: factors.rank].copy_(factors.a)
                    b[:, : factors.rank].copy_(factors.b)
                    if factors.scale != layer.scale:
                        b.mul_(factors.scale / layer.scale)

    def _check_copy(self, copy: int) -> None:
        if not 0 <= copy < self.copies:
            raise UserError(f"adapters: found copy {copy!r}, expected a number from 0 to {self.copies - 1}.")

    @staticmethod
    def _copy_of(parameter: Any, copy: int) -> Any:
        return parameter if parameter.dim() == 2 else parameter[copy]

    # --- leaving -----------------------------------------------------------------------------------------------------

    def merge_(self, copy: int = 0) -> Any:
        """Add one adapter to the base weights and take the layers out again: the plain model, which is returned.

        Raises:
            UserError: a base weight is quantized, or it is shared with another layer (a tied head).
        """
        self._check_copy(copy)
        for name, layer in zip(self.layers, self._layers(), strict=True):
            self._check_mergeable(name, layer)
        torch = need("torch")
        from agentopt.weights.adapters._layer import is_conv

        with torch.no_grad():
            for layer in self._layers():
                weight = layer.weight
                a, b = (self._copy_of(getattr(layer, factor), copy) for factor in _FACTORS)
                delta = (b @ a) * layer.scale
                delta = delta.mT if is_conv(layer.base) else delta
                # One rounding: the sum is taken in float32 also when the base is 16 bit.
                weight.copy_(weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta)
        return self.detach_model()

    def _check_mergeable(self, name: str, layer: LoraLinear) -> None:
        weight: Any = getattr(layer.base, "weight", None)
        # `RF8Linear` has a weight that says what it would be, and no numbers.
        if weight is None or not weight.is_floating_point() or hasattr(layer.base, "qweight"):
            raise UserError(
                f"adapters: {name} is quantized, so nothing can be added to it without loss; save the adapter, load "
                "the model in full precision, load the adapter there and merge."
            )
        for other, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter is weight and other != f"{name}.base.weight":
                raise UserError(
                    f"adapters: {name} shares its weight with {other}, which merging would change as well; save the "
                    "adapter instead, or attach without this layer."
                )

    def detach_model(self) -> Any:
        """Take the layers out without merging: the model as it was before `attach`, which is returned.

        The factors stay here: `save` and `state` still work.
        """
        for name, layer in zip(self.layers, self._layers(), strict=True):
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, layer.base)
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        self._attached = False
        return self.model
