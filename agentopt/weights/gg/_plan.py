"""Which tensors of a checkpoint are weights of linear layers: asked of the architecture, which is built without memory.

`plan(source)` builds the model of `source.config` on torch's meta device and looks its linear layers up in the
checkpoint. Names are kept as they are there: one of GPT-2 may lack the `transformer.` that the model's modules have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import matches
from agentopt.weights.gg._source import WeightSource
from agentopt.weights.load import need

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight that is to be quantized.

    Attributes:
        name: the layer, as the checkpoint calls it: its codes become `name.qweight`.
        tensor: its weight in the checkpoint.
        module: the module in the architecture.
        shape: (out, in), whatever way round it is stored.
        transposed: stored as (in, out), as transformers' Conv1D does.
        embedding: an embedding that is also the head.
    """

    name: str
    tensor: str
    module: str
    shape: tuple[int, int]
    transposed: bool = False
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of every tensor of a checkpoint.

    Attributes:
        layers: to be quantized, in the order of the names.
        kept: to be copied.
        dropped: a second copy of the embedding that is also the head, which is not written again.
        skip: linear layers that stay as they are, by names or parts of names: for `modules_to_not_convert`.
        left: the same, every module by its whole name.
        head: the module of the output head.
        tied: whether the head is the embedding.
        warnings: what the user should know.
    """

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    skip: tuple[str, ...]
    left: tuple[str, ...]
    head: str
    tied: bool
    warnings: tuple[str, ...]

    @property
    def conv1d(self) -> bool:
        """Whether some layers are transformers' Conv1D."""
        return any(layer.transposed for layer in self.layers)


def plan(source: WeightSource, *, skip: Sequence[str] = (), head: bool = False) -> Plan:
    """Sort the tensors of a checkpoint.

    Args:
        source: the checkpoint.
        skip: linear layers to leave as they are: names, or dotted parts of names ("layers.0", "down_proj").
        head: quantize the head too; when it is tied, the embedding.

    Raises:
        UserError: the architecture is unknown or not causal, an entry of `skip` matches no linear layer, the weights do
            not fit the architecture, or nothing is left to quantize.
    """
    model = skeleton(source.config, source.name)
    linear = _linear(model)
    found = _Names(source.names, model)
    parts = _Parts(source, model, linear, found)
    _check_skip(skip, linear)
    if head and matches(parts.head, skip):
        raise UserError(f"skip: found {parts.head} among {', '.join(skip)} beside head; leave out one of them.")
    layers: list[Layer] = []
    left = list(skip) if head else [parts.head, *skip]
    missing: list[str] = []
    for module in linear:
        tensor = found.weight(module)
        if tensor is None or module == parts.head:
            if module != parts.head and not matches(module, left):
                left.append(module)
                missing.append(module)
            continue
        if not matches(module, left):
            layers.append(parts.layer(module, tensor))
    dropped = parts.take_head(layers, head)
    if not layers:
        _nothing_left(source, linear, found)
    _check_dtypes(source, layers)
    order = {name: place for place, name in enumerate(source.names)}
    layers.sort(key=lambda layer: order[layer.tensor])
    taken = {layer.tensor for layer in layers} | set(dropped)
    kept = tuple(name for name in source.names if name not in taken)
    warnings = parts.warnings(kept, missing)
    quantized = {layer.module for layer in layers}
    whole = tuple(module for module in linear if module not in quantized)
    return Plan(tuple(layers), kept, dropped, tuple(dict.fromkeys(left)), whole, parts.head, parts.tied, warnings)


def _nothing_left(source: WeightSource, linear: Mapping[str, Any], names: _Names) -> NoReturn:
    if linear and not any(names.weight(module) for module in linear):
        found, expected = (source.names or ("nothing",))[0], next(iter(linear))
        raise UserError(
            f"model {source.name!r}: no tensor has the name of a linear layer of its architecture: found such as "
            f"{found}, expected such as {expected}.weight; write it anew with save_pretrained."
        )
    raise UserError(f"model {source.name!r}: found no linear layer left to quantize; skip fewer.")


def skeleton(config: Mapping[str, Any], name: str) -> Any:
    """The model of a configuration on the meta device: modules and shapes, no memory.

    Raises:
        UserError: transformers does not know the architecture, or it is not causal.
    """
    torch, transformers, hub = need("torch"), need("transformers"), need("huggingface_hub.errors")
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"model {name!r}: config.json has model_type {kind!r}, which transformers {transformers.__version__} does "
            "not have; a newer one may (code that comes with a model is not run)."
        )
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        typed = transformers.CONFIG_MAPPING[kind].from_dict(values)
        _check_causal(transformers, typed, name)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(typed)
    except (
        ValueError,
        TypeError,
        KeyError,
        ImportError,
        AttributeError,
        RuntimeError,
        hub.StrictDataclassError,
    ) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {name!r}: config.json does not describe a model: {first}") from error


def _check_causal(transformers: Any, config: Any, name: str) -> None:
    architectures = list(config.architectures or [])
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if known and (not architectures or any(mark in one for one in architectures for mark in _CAUSAL)):
        return
    found = ", ".join(architectures) or type(config).__name__
    raise UserError(f"model {name!r}: found {found}, expected a causal language model (one that writes text).")


def _linear(model: Any) -> dict[str, Any]:
    torch, utils = need("torch"), need("transformers.pytorch_utils")
    kinds = (torch.nn.Linear, utils.Conv1D)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


class _Names:
    """From the architecture's names to the checkpoint's."""

    def __init__(self, names: Iterable[str], model: Any) -> None:
        self._names = set(names)
        self._prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""

    def weight(self, module: str) -> str | None:
        """The weight of a module; None when the checkpoint has none by that name."""
        tensor = f"{module}.weight"
        bare = tensor.removeprefix(self._prefix)
        for one in (tensor, bare, f"{self._prefix}{tensor}"):
            if one in self._names:
                return one
        return None


class _Parts:
    """The architecture and the checkpoint beside each other."""

    def __init__(self, source: WeightSource, model: Any, linear: Mapping[str, Any], names: _Names) -> None:
        self._source, self._model, self._linear, self._names = source, model, linear, names
        modules = {id(module): name for name, module in model.named_modules()}
        self.head = modules.get(id(model.get_output_embeddings()), "lm_head")
        self._embedding = modules.get(id(model.get_input_embeddings()), "")
        declared = bool(getattr(model.config, "tie_word_embeddings", False))
        self._second = names.weight(self.head) if declared else None
        self.tied = declared
        if not declared and names.weight(self.head) is None and self.head in linear:
            raise UserError(
                f"model {source.name!r}: found no {self.head}.weight, though config.json does not tie it to the "
                "embedding; the checkpoint is incomplete."
            )

    def layer(self, module: str, tensor: str) -> Layer:
        """A linear layer; its stored shape is that of the architecture."""
        transposed = not hasattr(self._linear[module], "in_features")
        expected = tuple(self._linear[module].weight.shape)
        self._check_shape(tensor, expected)
        rows, columns = reversed(expected) if transposed else expected
        return Layer(tensor.removesuffix(".weight"), tensor, module, (rows, columns), transposed)

    def take_head(self, layers: list[Layer], head: bool) -> tuple[str, ...]:
        """Add the head to the layers where it is asked for; returns names that are not written."""
        if not head:
            return ()
        if not self.tied:
            tensor = self._names.weight(self.head)
            if tensor is not None and self.head in self._linear:
                layers.append(self.layer(self.head, tensor))
            return ()
        tensor = self._names.weight(self._embedding)
        if tensor is None:
            raise UserError(f"model {self._source.name!r}: found no {self._embedding}.weight, which is also the head.")
        shape = tuple(self._model.get_input_embeddings().weight.shape)
        self._check_shape(tensor, shape)
        layers.append(Layer(tensor.removesuffix(".weight"), tensor, self._embedding, shape, embedding=True))
        if self._second is None:
            return ()
        torch = need("torch")
        if not torch.equal(self._source.read(self._second), self._source.read(tensor)):
            raise UserError(
                f"model {self._source.name!r}: config.json ties the head to the embedding, but {self._second} and "
                f"{tensor} differ; set tie_word_embeddings to false, or leave head out."
            )
        return (self._second,)

    def warnings(self, kept: Sequence[str], missing: Sequence[str]) -> tuple[str, ...]:
        """What stays as it is although one might expect otherwise."""
        found: list[str] = []
        experts = [name for name in kept if ".experts." in name and len(self._source.shape(name)) > 1]
        if experts:
            found.append(
                f"{len(experts)} expert weights of mixture-of-experts layers are kept as they are ({experts[0]}, ...): "
                "only linear layers are quantized."
            )
        if missing:
            noun, more = ("layer", "") if len(missing) == 1 else ("layers", ", ...")
            found.append(
                f"{len(missing)} linear {noun} of the architecture without a weight of that name in the checkpoint: "
                f"kept as they are ({missing[0]}{more})."
            )
        return tuple(found)

    def _check_shape(self, tensor: str, expected: tuple[int, ...]) -> None:
        found = self._source.shape(tensor)
        if found != expected:
            raise UserError(
                f"model {self._source.name!r}: {tensor} has the shape {found}, config.json says {expected}; they do "
                "not belong together."
            )


def _check_skip(skip: Sequence[str], linear: Mapping[str, Any]) -> None:
    for entry in skip:
        if any(matches(name, [entry]) for name in linear):
            continue
        parts = {part for name in linear for part in name.split(".") if not part.isdigit()}
        near = difflib.get_close_matches(entry, [*sorted(parts), *linear], n=3, cutoff=0.5) or sorted(parts)[:6]
        raise UserError(
            f"skip: found {entry!r}, which is no linear layer or part of its name; such as {', '.join(near)}."
        )


def _check_dtypes(source: WeightSource, layers: Iterable[Layer]) -> None:
    torch = need("torch")
    known = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for layer in layers:
        found = source.dtype(layer.tensor)
        if found not in known:
            raise UserError(
                f"model {source.name!r}: {layer.tensor} holds {str(found).removeprefix('torch.')}, expected numbers of "
                "16 or 32 bits; give the model before it was quantized."
            )
