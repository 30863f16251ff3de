"""Weights that are not a folder: a loaded model (GGUF, the embedded one, a hub id not in the cache), a `.ggz`."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.weights import load
from agentopt.weights.gg._source import INDEX, NOT_COPIED, SINGLE, natural, refuse_quantized

if TYPE_CHECKING:
    from torch import Tensor


def cached_folder(name: str) -> Path | None:
    """The folder of a hub model in the cache, when its weights are there as safetensors files."""
    if name == "embedded" or name.startswith(("embedded/", "hf:", ".", "/", "~")) or name.endswith(".gguf"):
        return None
    if not name.strip() or name.count("/") > 1:
        return None
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        folder = Path(hub.snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError):  # the hub's own errors are among these two
        return None
    whole = (folder / "config.json").is_file() and ((folder / SINGLE).is_file() or (folder / INDEX).is_file())
    return folder if whole else None


class LoadedSource:
    """A model in memory.

    Args:
        model: a name for `agentopt.weights.load.model`, or a transformers model; its weights are not changed.
        tokenizer: of a given model, to be written beside its weights.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        if isinstance(model, str):
            self.name = model
            model, tokenizer = load.model(model, device="cpu")
        else:
            self.name = str(getattr(model.config, "name_or_path", "") or "a model in memory")
        self.model, self.tokenizer = model, tokenizer
        self.config: dict[str, Any] = dict(model.config.to_dict())
        self.config["architectures"] = [type(model).__name__]
        refuse_quantized(self.config, Path(self.name), self.name)
        kept = next(iter(model.parameters())).dtype
        self.config["dtype"] = str(kept).removeprefix("torch.")
        self.config.pop("_name_or_path", None)
        self._tensors = _saved(model)
        self.names = tuple(sorted(self._tensors, key=natural))
        digest = hashlib.sha256()
        for name in self.names:
            tensor = self._tensors[name]
            # A few numbers of every tensor: enough to tell two trainings of one model apart.
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sample.double().tolist()}\n".encode())
        self.identity = digest.hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> Any:
        """The torch dtype of one tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name].detach().cpu()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one tensor."""
        return self._tensors[name].detach()[start:stop].cpu()

    def files(self) -> dict[str, bytes]:
        """What the tokenizer and the generation settings write when they are saved."""
        found: dict[str, bytes] = {}
        with tempfile.TemporaryDirectory(prefix="agentopt-files-") as place:
            folder = Path(place)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            settings = getattr(self.model, "generation_config", None)
            if settings is not None:
                settings.save_pretrained(folder)
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    found[path.relative_to(folder).as_posix()] = path.read_bytes()
        return found

    def close(self) -> None:
        """Let go of the model."""
        self._tensors.clear()
        self.model = self.tokenizer = None


def _saved(model: Any) -> dict[str, Any]:
    """The tensors that a saved copy of the model would hold: of tied ones the first, no buffers that are rebuilt."""
    found: dict[str, Any] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor
    return found


class ArchiveSource:
    """A `.ggz` archive, decoded tensor by tensor."""

    def __init__(self, path: Path, name: str) -> None:
        from agentopt.weights.gg import archive

        if not path.is_file():
            raise UserError(f"model {name!r}: no such file (looked at {path.absolute()}).")
        self.name = name
        opener: Any = archive
        self._archive = opener.Archive(path)
        self.config: dict[str, Any] = dict(self._archive.config)
        refuse_quantized(self.config, path, name)
        self.names = tuple(sorted(self._archive.names, key=natural))
        stat = path.stat()
        self.identity = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {self.names}".encode()).hexdigest()
        self._last: tuple[str, Any] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._archive.info(name).shape)

    def dtype(self, name: str) -> Any:
        """The torch dtype of one tensor."""
        return getattr(load.need("torch"), self._archive.info(name).dtype)

    def read(self, name: str) -> Tensor:
        """One tensor; it is kept until another one is asked for."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._archive.read(name))
        return self._last[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one tensor, which is decoded as a whole."""
        return self.read(name)[start:stop]

    def files(self) -> dict[str, bytes]:
        """The small files that were packed with the weights."""
        return {name: content for name, content in self._archive.files().items() if name not in NOT_COPIED}

    def close(self) -> None:
        """Close the archive."""
        self._last = None
        self._archive.close()
