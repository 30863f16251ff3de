"""The layers of a transformers model: which hold codes, put in their place, checked, and taken out again.

Only functions that need torch import this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import BOOK, CODES, SCALE, Checkpoint, matches
from agentopt.weights.gg._hf_files import Stored
from agentopt.weights.gg._linear import PACKED, RF8Embedding, RF8Linear
from agentopt.weights.gg._tables import table

_META = torch.device("meta")


def is_conv(module: Any) -> bool:
    """Whether this is the `Conv1D` of transformers, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def names_of(model: Any, name: str) -> list[str]:
    """How a checkpoint may call a module: with the prefix of the base model or without it."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return list(dict.fromkeys([name, name.removeprefix(prefix), prefix + name]))


def linear_layers(model: Any, skip: Iterable[str]) -> list[str]:
    """The layers that hold codes: linear ones whose name no entry of `skip` is a part of."""
    left = tuple(skip)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv(module)]
    return [name for name in found if not any(matches(one, left) for one in names_of(model, name))]


def head_of(model: Any) -> str | None:
    """The name of the output head; None for a model without one."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def embedding_of_head(model: Any) -> str | None:
    """The name of the embedding that the head is tied to; None where it is not."""
    head = head_of(model)
    if head is None or f"{head}.weight" not in model.all_tied_weights_keys:
        return None
    return str(model.all_tied_weights_keys[f"{head}.weight"]).removesuffix(".weight")


def tables_of(checkpoint: Checkpoint) -> Tensor:
    """The values of all codes, (K, 256): books of 255 levels are padded with 0."""
    # transformers builds a model within the context of the device `meta`, which a table must not be on.
    with torch.device("cpu"):
        padded = [[*book, *[0.0] * (256 - len(book))] for book in checkpoint.books]
        return table(checkpoint.format, torch.tensor(padded) if padded else None)


def put_linear(model: Any, name: str, held: Mapping[str, Tensor], values: Tensor, **how: Any) -> None:
    """Replace a linear layer by one of codes; the bias stays the same parameter. `values` is the table."""
    old = model.get_submodule(name)
    bias = old.bias
    if bias is not None:
        bias.requires_grad_(False)
    new = RF8Linear(held[CODES], held[SCALE], values, held.get(BOOK), bias, conv=is_conv(old), **how)
    model.set_submodule(name, new.train(old.training))


def put_embedding(model: Any, name: str, held: Mapping[str, Tensor], values: Tensor, **how: Any) -> None:
    """Replace an embedding by one of codes.

    Raises:
        UserError: it is of a kind that does more than looking up (and scaling).
    """
    old = model.get_submodule(name)
    factor = getattr(old, "scalar_embed_scale", None)
    if type(old) is not nn.Embedding and factor is None:
        raise UserError(f"{name}: {type(old).__name__} cannot hold codes; quantize without the head.")
    place = old.padding_idx
    new = RF8Embedding(held[CODES], held[SCALE], values, held.get(BOOK), padding_idx=place, factor=factor, **how)
    new.kind = type(old)
    model.set_submodule(name, new.train(old.training))


def empty(module: Any, several: bool) -> dict[str, Tensor]:
    """The tensors of a layer without memory, in the shapes that its checkpoint has."""
    out, wide = reversed(module.weight.shape) if is_conv(module) else module.weight.shape
    held = {
        CODES: torch.empty(out, wide, dtype=torch.uint8, device=_META),
        SCALE: torch.empty(out, 1, dtype=torch.float32, device=_META),
    }
    if several:
        held[BOOK] = torch.empty(out, 1, dtype=torch.uint8, device=_META)
    return held


def tie(model: Any, head: str, embedding: str, names: Iterable[str]) -> None:
    """Let transformers know that the head shares these tensors with the embedding, instead of a `weight`."""
    pairs = {f"{head}.{name}": f"{embedding}.{name}" for name in names}
    gone = {f"{head}.{name}" for name in ("weight", CODES, SCALE, BOOK)}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        before: dict[str, str] = getattr(model, attribute, None) or {}
        setattr(model, attribute, {key: value for key, value in before.items() if key not in gone} | pairs)


def packed(model: Any) -> Iterator[tuple[str, Any]]:
    """All layers that hold codes, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PACKED):
            yield name, module


def check_layers(
    model: Any, stored: Mapping[str, Stored], names: Iterable[str], architectures: Iterable[str]
) -> list[str]:
    """Which of the layers that should hold codes have any in the files; the others are new heads.

    Raises:
        UserError: codes of a layer are missing or have another shape, or stand there for a layer that has none.
    """
    found: list[str] = []
    known = type(model).__name__ in list(architectures)
    prefix = f"{model.base_model_prefix}."
    should = list(names)
    tied = embedding_of_head(model)
    for name in should:
        place = find(model, stored, name, CODES)
        if place is None and tied is not None and name == head_of(model):
            place = find(model, stored, tied, CODES)
        if place is None and not known and not name.startswith(prefix):
            continue
        if place is None:
            raise UserError(
                f"{_files(stored)}: {name}.{CODES} is missing, and config.json does not list {name} under "
                "modules_to_not_convert; the checkpoint is incomplete: fetch it again."
            )
        shape = tuple(empty(model.get_submodule(name), False)[CODES].shape)
        if stored[place].shape != shape:
            raise UserError(f"{stored[place].file}: {place} has the shape {stored[place].shape}, expected {shape}.")
        found.append(name)
    _check_surplus(model, stored, set(found) | ({tied} if tied else set()))
    return found


def find(model: Any, stored: Mapping[str, Stored], layer: str, last: str) -> str | None:
    """The name of a layer's tensor in the files."""
    return next((key for one in names_of(model, layer) if (key := f"{one}.{last}") in stored), None)


def _check_surplus(model: Any, stored: Mapping[str, Stored], layers: set[str]) -> None:
    modules = {one: name for name, _ in model.named_modules() for one in names_of(model, name)}
    for key, about in stored.items():
        layer, _, last = key.rpartition(".")
        if last == CODES and layer in modules and modules[layer] not in layers:
            raise UserError(f"{about.file}: found {key}, but config.json says that {layer} is not quantized.")


def _files(stored: Mapping[str, Stored]) -> str:
    return ", ".join(sorted({about.file for about in stored.values()})) or "no file"


def check_values(model: Any, checkpoint: Checkpoint) -> None:
    """Codes, books and scales are ones that the format has. Layers that are offloaded (on `meta`) are not looked at.

    Raises:
        UserError: one is not: the files are damaged.
    """
    levels = torch.tensor([len(book) for book in checkpoint.books] or [256])
    for name, module in packed(model):
        if module.qweight.device.type == "meta":
            continue
        scale, book = module.weight_scale.detach(), module.book_id
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            row = int((~(torch.isfinite(scale) & (scale > 0))).flatten().nonzero()[0])
            raise _damaged(f"{name}.{SCALE}", f"{float(scale[row])} in row {row}", "finite numbers above 0")
        if book is not None and module.qweight.numel() and int(book.max()) >= len(levels):
            raise _damaged(f"{name}.{BOOK}", str(int(book.max())), f"at most {len(levels) - 1}")
        most = levels.to(scale.device)[0 if book is None else book.flatten().long()]
        if module.qweight.numel() and bool((module.qweight.amax(dim=1).int() >= most).any()):
            raise _damaged(f"{name}.{CODES}", "the code 255", "codes of a book with 255 levels, at most 254")


def _damaged(name: str, found: str, expected: str) -> UserError:
    return UserError(f"{name}: found {found}, expected {expected}; the checkpoint is damaged: fetch it again.")


def unpack(model: Any, dtype: torch.dtype) -> None:
    """Put ordinary layers of decoded weights in the place of all that hold codes."""
    shared: dict[int, nn.Parameter] = {}
    head, tied = head_of(model), False
    for name, module in list(packed(model)):
        key = module.qweight.data_ptr()
        tied |= key in shared and name == head
        weight = shared.setdefault(key, nn.Parameter(module.dequantize(dtype)))
        model.set_submodule(name, _plain(module, weight, dtype).train(module.training))
    if tied and head is not None:
        embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        tie(model, head, embedding, ["weight"])


def _plain(module: Any, weight: nn.Parameter, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, RF8Embedding):
        sizes = (module.num_embeddings, module.embedding_dim, module.padding_idx)
        scaled = {} if module.factor is None else {"embed_scale": module.factor}
        with _META:
            new: Any = module.kind(*sizes, **scaled)
        if scaled:
            new.embed_scale = torch.tensor(module.factor, device=weight.device)
        new.weight = weight
        return new
    bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype))
    if module.conv:
        from transformers.pytorch_utils import Conv1D

        with _META:
            new = cast(Any, Conv1D)(module.out_features, module.in_features)
        new.weight = nn.Parameter(weight.detach().mT.contiguous())
    else:
        new = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device=_META)
        new.weight = weight
    new.bias = bias
    return new
