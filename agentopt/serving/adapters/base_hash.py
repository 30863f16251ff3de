"""`python -m agentopt.serving.adapters.base_hash MODEL`: the hashes by which folded adapters name their base.

A fold writes the fingerprint of its base's parameters, in the number type that it was loaded in. The same values have
another fingerprint in each number type, so each is computed, one JSON line each, until the one that is looked for is
found. A process of its own, because it needs torch and the gateway must not.

A folder of safetensors files is read tensor by tensor; GGUF files, the embedded model and folders whose parameters are
named otherwise than their tensors are loaded whole.

With `--made FOLDER --record` the hashes of the model go into FOLDER, which was made from it (quantized, converted):
adapters for the model are then taken by a server that has FOLDER alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError
from agentopt.serving.adapters import _prepared

_DTYPES = ("float32", "bfloat16", "float16")
RECORD = "base_hashes.json"
"""In a folder that was made from another model: the hashes of that one."""
_SMALL = 5.0
"""Seconds."""
_PACKED = ("qweight", "weight_scale", "book_id")


def main() -> None:
    """Print {"dtype", "hash"} per line; {"why"} when there is nothing to be computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--wanted", default="", help="stop when this hash is found")
    parser.add_argument("--made", default="", help="a folder that must have been made from the model")
    parser.add_argument("--record", action="store_true", help="write what is found into that folder")
    asked = parser.parse_args()
    held: dict[str, str] = {}
    began = time.perf_counter()
    try:
        source = _open(asked.model)
        if asked.made and not _is_source(source, Path(asked.made)):
            _say({"why": f"{asked.made} was not made from what {asked.model} holds now"})
            return
        for dtype, found in _hashes(_parameters(source)):
            _say({"dtype": dtype, "hash": found})
            held[dtype] = found
            # Of a small model all are computed at once: the next start of this process would take longer.
            if found == asked.wanted and not asked.record and time.perf_counter() - began > _SMALL:
                return
        if asked.made and asked.record:
            record = json.dumps({"version": 1, "model": asked.model, "hashes": held}, indent=1)
            (Path(asked.made) / RECORD).write_text(record + "\n", encoding="utf-8")
    except (AgentoptError, OSError, MemoryError, ValueError, RuntimeError, KeyError) as error:
        _say({"why": str(error) or type(error).__name__})


def _say(line: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def record_prepared(folder: Path, model: str, files: _prepared.Marks, made_from: Any = None) -> None:
    """Write down the hashes of a folder that has just been made, beside it.

    Args:
        folder: that was made.
        model: what it was made from, as the server calls it.
        files: `_prepared.marks` of that, from before it was read.
        made_from: that, opened or loaded, in the number type in which it is kept; None: its hashes are not known.

    Raises:
        AgentoptError, OSError, MemoryError, ValueError, RuntimeError, KeyError: it cannot be done.
    """
    own = _prepared.marks(str(folder))
    known = _prepared.Prepared(
        dict(_hashes(_parameters(_open(str(folder))))),
        model,
        {} if made_from is None else dict(_hashes(_parameters(made_from))),
        files,
    )
    _prepared.write(folder, own, known)


def _open(model: str) -> Any:
    """Opened once for all that is done with it: to load a GGUF file takes longer than to hash it."""
    from agentopt.weights.gg._source import FolderSource, open_source

    path = Path(model).expanduser()
    return FolderSource(path, model, quantized=True) if path.is_dir() else open_source(model, quantized=True)


def _hashes(parameters: Callable[[], Iterable[tuple[str, Any]]]) -> Generator[tuple[str, str]]:
    from agentopt.weights.load import need
    from agentopt.weights.zeroth import fingerprint

    torch = need("torch")
    for dtype in _DTYPES:
        yield dtype, fingerprint(_cast(parameters(), getattr(torch, dtype)))


def _parameters(source: Any) -> Callable[[], Iterable[tuple[str, Any]]]:
    """Names and values in the order of `model.named_parameters()`, which a fold hashes; of a source or a model."""
    from agentopt.weights import load
    from agentopt.weights.gg._source import FolderSource

    if isinstance(source, FolderSource):
        names = _ordered(str(source.path), frozenset(source.names))
        if names is not None:
            return lambda: ((name, source.read(stored)) for name, stored in names)
    model: Any = source if hasattr(source, "named_parameters") else getattr(source, "model", None)
    if model is None:
        model = load.model(source.path if isinstance(source, FolderSource) else source.name, device="cpu")[0]
    return model.named_parameters


def _ordered(model: str, stored: frozenset[str]) -> list[tuple[str, str]] | None:
    """(parameter, tensor in the files) in the model's order; None where the files name them otherwise."""
    from agentopt.weights import load
    from agentopt.weights.load import need

    torch, transformers = need("torch"), need("transformers")
    config = load.config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(config)
    prefix = str(getattr(shape, "base_model_prefix", "")) + "."
    found: list[tuple[str, str]] = []
    for name, _ in shape.named_parameters():
        parts = [name]
        layer, _, last = name.rpartition(".")
        if last == "weight" and name not in stored and f"{layer}.qweight" in stored:
            parts = [f"{layer}.{end}" for end in _PACKED if f"{layer}.{end}" in stored]
        for part in parts:
            place = next((one for one in (part, part.removeprefix(prefix)) if one in stored), None)
            if place is None:
                return None
            found.append((part, place))
    return found


def _cast(parameters: Iterable[tuple[str, Any]], dtype: Any) -> Generator[tuple[str, Any]]:
    """As loading in this number type does: codes and their scales stay what they are."""
    for name, value in parameters:
        stays = not value.is_floating_point() or name.endswith(".weight_scale")
        yield name, value if stays else value.to(dtype)


# --- whether one was made from the other -----------------------------------------------------------------------------


def _is_source(source: Any, made: Path) -> bool:
    """Whether the weights of a folder are those of the model: quantized, or in another number type.

    A quantized folder records the sha256 of what was quantized; others are compared number by number.
    """
    from agentopt.weights.gg._source import FolderSource
    from agentopt.weights.load import need

    torch = need("torch")
    folder = FolderSource(made, str(made), quantized=True)
    about: Any = folder.config.get("quantization_config") or {}
    recorded: Any = about.get("source_sha256")
    try:
        if recorded is None:
            return _same_numbers(source, folder)
        packed = {name.removesuffix("qweight") for name in folder.names if name.endswith(".qweight")}
        names = {f"{name}weight" for name in packed}
        names |= {name for name in folder.names if not any(name == f"{one}{end}" for one in packed for end in _PACKED)}
        kinds = [None, *(getattr(torch, dtype) for dtype in _DTYPES)]
        return any(_digest(source, sorted(names), kind) == recorded for kind in kinds)
    finally:
        folder.close()


def _same_numbers(source: Any, folder: Any) -> bool:
    for name in folder.names:
        held = folder.read(name)
        if name not in source.names or not bool((source.read(name).to(held.dtype) == held).all()):
            return False
    return True


def _digest(source: Any, names: list[str], dtype: Any) -> str:
    """As `agentopt quantize` records it."""
    whole = hashlib.sha256()
    torch: Any = __import__("torch")
    for name in names:
        value = source.read(name)
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        inner = hashlib.sha256(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy())).hexdigest()
        whole.update(f"{name} {value.dtype} {list(value.shape)} {inner}\n".encode())
    return whole.hexdigest()


if __name__ == "__main__":
    main()
