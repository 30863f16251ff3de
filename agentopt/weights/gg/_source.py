"""Where weights come from: one tensor, or some rows of one, at a time, so that a model larger than memory can be read.

    with open_source("model-folder") as source:
        for name in source.names:
            source.read(name)

A folder of safetensors files, a hub model that is in the cache, a GGUF file or the embedded model (these two unpacked
in memory by transformers), and a `.ggz` archive. Nothing pickled is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import METHOD
from agentopt.weights.load import need

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RESULT = "quantize.json"
"""What a quantization leaves beside the weights it wrote."""
NOT_COPIED = ("config.json", INDEX, RESULT)
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
_LARGEST_COPY = 256 << 20
_MAPPED = 64 << 20
"""Bytes read from one file before it is opened anew: pages of an open one count as this process's memory."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors and what belongs to them.

    Attributes:
        name: as it was given.
        config: config.json; empty where there is none.
        names: of all tensors, numbers in them in counting order.
        identity: changes when the weights may have changed; cheap, not a hash of all bytes.
    """

    name: str
    config: dict[str, Any]
    names: tuple[str, ...]
    identity: str

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        ...

    def dtype(self, name: str) -> Any:
        """The torch dtype of one tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one tensor, along its first axis."""
        ...

    def files(self) -> dict[str, bytes]:
        """Tokenizer, generation settings, licence and the like: what a copy of the model needs beside its weights."""
        ...

    def close(self) -> None:
        """Let go of open files and memory."""
        ...


@contextlib.contextmanager
def opened(model: str | Path | WeightSource) -> Generator[WeightSource]:
    """A source for as long as it is needed; one that is given is left open.

    Raises:
        UserError: as `open_source`.
    """
    if isinstance(model, WeightSource):
        yield model
        return
    source = open_source(model)
    try:
        yield source
    finally:
        source.close()


def open_source(model: str | Path | WeightSource, *, quantized: bool = False) -> WeightSource:
    """Open a model for reading, tensor by tensor.

    Args:
        model: a folder with `config.json` and safetensors files, `"embedded"`, a `.gguf` path, a hub id, a `.ggz`
            archive, or a source.
        quantized: take a folder whose weights are quantized, and read its tensors as they are.

    Raises:
        UserError: there is no such model, a file is damaged or missing, the weights are pickled, or they are quantized.
    """
    if isinstance(model, WeightSource):
        return model
    text = str(model)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix not in (".ggz", ".gguf"):
        raise UserError(f"{text}: found a file, expected a model folder, a .gguf file or a .ggz archive.")
    if path.suffix == ".ggz":
        from agentopt.weights.gg._other_sources import ArchiveSource

        return ArchiveSource(path, text)
    if path.is_dir():
        return FolderSource(path, text, quantized=quantized)
    from agentopt.weights.gg._other_sources import LoadedSource, cached_folder

    folder = cached_folder(text)
    if folder is not None:
        return FolderSource(folder, text, quantized=quantized)
    return LoadedSource(text)


class FolderSource:
    """A folder of safetensors files, one file open at a time."""

    def __init__(self, path: Path, name: str, *, quantized: bool = False) -> None:
        self.path, self.name = path, name
        self.config = read_config(path, name)
        if not quantized:
            refuse_quantized(self.config, path, name)
        self._files = _weight_files(path, name)
        self._about: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self._open: tuple[str, Any] | None = None
        self._mapped = 0
        digest = hashlib.sha256()
        for file, wanted in self._files.items():
            self._survey(file, wanted)
            stat = (path / file).stat()
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        self.names = tuple(sorted(self._about, key=natural))
        digest.update(json.dumps([self.config, *self._about.items()], sort_keys=True).encode())
        self.identity = digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self._about[name][1]

    def dtype(self, name: str) -> Any:
        """The torch dtype of one tensor."""
        kind = self._about[name][2]
        if kind not in _DTYPES:
            raise UserError(f"{self._where(name)}: tensor {name!r} has the number type {kind}, which is not read here.")
        return getattr(need("torch"), _DTYPES[kind])

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with self._reading(name) as file:
            return self._count(file.get_tensor(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one tensor; only they are read."""
        with self._reading(name) as file:
            return self._count(file.get_slice(name)[start:stop])

    def files(self) -> dict[str, bytes]:
        """Small files beside the weights: everything that is text and not about the weights."""
        found: dict[str, bytes] = {}
        for path in sorted(self.path.rglob("*")):
            inner = path.relative_to(self.path)
            deep = len(inner.parts) > 1 and inner.parts[0] != "additional_chat_templates"
            if deep or not path.is_file() or not _is_copied(path):
                continue
            found[inner.as_posix()] = path.read_bytes()
        return found

    def close(self) -> None:
        """Close the open file."""
        self._open = None

    def _survey(self, file: str, wanted: tuple[str, ...] | None) -> None:
        """Names, shapes and number types in one file; `wanted` is what the index promises of it."""
        handle = self._handle(file)
        keys = list(handle.keys())
        missing = [] if wanted is None else sorted(set(wanted) - set(keys))
        if missing:
            raise UserError(
                f"{self.path / file}: found no tensor {missing[0]!r}, which {INDEX} places there; fetch it again."
            )
        for key in keys if wanted is None else wanted:
            part = handle.get_slice(key)
            self._about[key] = (file, tuple(part.get_shape()), part.get_dtype())

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None
            path = self.path / file
            safetensors = need("safetensors")
            try:
                self._open = (file, safetensors.safe_open(str(path), framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path}: {_damage(path, error)}") from error
        return self._open[1]

    @contextlib.contextmanager
    def _reading(self, name: str) -> Generator[Any]:
        handle = self._handle(self._about[name][0])
        try:
            yield handle
        except (OSError, need("safetensors").SafetensorError) as error:
            raise UserError(f"{self._where(name)}: tensor {name!r} cannot be read ({error}).") from error

    def _count(self, tensor: Tensor) -> Tensor:
        self._mapped += tensor.nbytes
        if self._mapped > _MAPPED:
            self._open, self._mapped = None, 0
        return tensor

    def _where(self, name: str) -> Path:
        return self.path / self._about[name][0]


def read_config(path: Path, name: str) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = (path / "adapter_config.json").is_file()
        hint = " (an adapter: merge it into its base model first)" if adapter else ""
        raise UserError(f"model {name!r}: found a folder without config.json{hint}; give a model folder.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: found {type(found).__name__}, expected a JSON object.")
    return cast("dict[str, Any]", found)


def refuse_quantized(config: Mapping[str, Any], path: Path, name: str) -> None:
    """Weights that were quantized once are not quantized again: the error would add up.

    Raises:
        UserError: config.json has a `quantization_config`.
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return
    about = cast("Mapping[str, Any]", found)
    method = about.get("quant_method", "an unnamed method")
    if method == METHOD:
        method = f"agentopt ({about.get('format')})"
    raise UserError(
        f"model {name!r}: found weights quantized by {method}, expected the original ones (16 or 32 bits); give "
        f"{_original(path) or 'the model that they were made from'}."
    )


def _original(path: Path) -> str:
    try:
        found = json.loads((path / RESULT).read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        return ""
    return repr(found) if isinstance(found, str) and found else ""


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _weight_files(path: Path, name: str) -> dict[str, tuple[str, ...] | None]:
    """Files with weights, each with the names that the index gives it; None for all that it holds."""
    # In this order, as transformers looks: beside a whole file an index is left over from other weights.
    if (path / SINGLE).is_file():
        return {SINGLE: None}
    index = path / INDEX
    if index.is_file():
        return _indexed(index)
    pickled = sorted(file.name for file in path.glob("*.bin")) + sorted(file.name for file in path.glob("*.pt*"))
    if pickled:
        raise UserError(
            f"model {name!r}: found {pickled[0]} (pickled weights, which can run code), expected {SINGLE}; load it "
            "with transformers where you trust it and write it with save_pretrained."
        )
    raise UserError(f"model {name!r}: found neither {SINGLE} nor {INDEX} in {path}; give a folder with weights.")


def _indexed(index: Path) -> dict[str, tuple[str, ...] | None]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        entries = cast("dict[str, str]", content["weight_map"]).items()
        placed = [(str(key), str(file)) for key, file in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read as an index of weights ({error}).") from None
    grouped: dict[str, list[str]] = {}
    for key, file in placed:
        grouped.setdefault(file, []).append(key)
    for file in grouped:
        if Path(file).name != file:
            raise UserError(f"{index}: found the file {file!r}, expected a name in the same folder.")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: {file} is missing ({len(grouped[file])} tensors); fetch the model again.")
    return {file: tuple(keys) for file, keys in sorted(grouped.items())}


def _is_copied(path: Path) -> bool:
    name = path.name
    if name in NOT_COPIED or name.endswith(".index.json") or name.startswith(("adapter_", ".")):
        return False
    fits = path.suffix in _COPIED or name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    return fits and path.stat().st_size <= _LARGEST_COPY


def _damage(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file; fetch the model again."
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})."
    size = path.stat().st_size
    return f"damaged or cut off ({size:,} bytes; {error}); fetch the model again."
