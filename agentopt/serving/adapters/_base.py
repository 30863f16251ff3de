"""What an adapter has to fit: the layers of the served model, from the headers of its files. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.serving.adapters._header import Tensor, read_header

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TRANSPOSED = frozenset(("gpt2", "openai-gpt", "imagegpt"))
"""Model types whose linear layers are stored (in, out)."""
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|wpe|embed_in|embed_out|word_embeddings|embed_positions|lm_head)$")
_PREFIX = re.compile(r"^(model|transformer|language_model|base_model)\.")


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A served model, as far as adapters must know it; made by `BaseFacts.of`."""

    folder: Path
    max_rank: int
    """The largest rank that the engine takes."""
    layers: Mapping[str, tuple[int, int] | None] = field(repr=False)
    """(in, out) of every layer that can be adapted; None where the way it is packed hides the shape."""
    method: str | None = None
    """How its weights are quantized, as config.json calls it; None for weights that are not."""
    origins: tuple[str, ...] = ()
    """What the folder was made from (folders or GGUF files): an adapter for one of them fits as well."""

    @classmethod
    def of(cls, folder: str | Path, max_rank: int, *, origins: Sequence[str | Path] = ()) -> BaseFacts:
        """Read config.json and the headers of the weights; no weights, no torch.

        Args:
            folder: the model folder that the engine serves.
            max_rank: the largest rank that the engine takes.
            origins: models that the folder was made from, besides the one that its `quantize.json` names.

        Raises:
            UserError: it is no model folder, or a file in it is damaged.
        """
        path = Path(folder).expanduser()
        config = _read_object(path / "config.json", str(folder))
        about = config.get("quantization_config")
        method = str(cast("dict[str, Any]", about).get("quant_method")) if isinstance(about, dict) else None
        turned = config.get("model_type") in _TRANSPOSED and method is None
        tensors = read_folder(path)
        named = dict.fromkeys(str(one) for one in (*origins, *_source(path)))
        others = tuple(one for one in named if Path(one).expanduser().resolve() != path.resolve())
        return cls(path, max_rank, _layers(tensors, turned), method, others)

    def find(self, name: str) -> str | None:
        """The layer that an adapter calls so; files leave out or add the first component."""
        if name in self.layers:
            return name
        short = _PREFIX.sub("", name)
        return next((own for own in (short, f"model.{short}", f"transformer.{short}") if own in self.layers), None)

    @property
    def ends(self) -> list[str]:
        """The last components of the layers' names, for errors."""
        return sorted({name.rpartition(".")[2] for name in self.layers})


def read_folder(path: Path) -> dict[str, Tensor]:
    """The tensors of a model folder, from one file or from several with an index.

    Raises:
        UserError: there is none, or a file is damaged or missing.
    """
    if (path / _SINGLE).is_file():
        return read_header(path / _SINGLE)
    if not (path / _INDEX).is_file():
        raise UserError(f"model {str(path)!r}: found neither {_SINGLE} nor {_INDEX}; give a folder with weights.")
    placed: Any = _read_object(path / _INDEX, str(path)).get("weight_map")
    if not isinstance(placed, dict):
        raise UserError(f"{path / _INDEX}: found no weight_map; fetch the model again.")
    found: dict[str, Tensor] = {}
    for file in sorted({str(one) for one in cast("dict[str, Any]", placed).values()}):
        if Path(file).name != file:
            raise UserError(f"{path / _INDEX}: found the file {file!r}, expected a name in the same folder.")
        found |= read_header(path / file)
    return found


def _layers(tensors: Mapping[str, Tensor], turned: bool) -> dict[str, tuple[int, int] | None]:
    found: dict[str, tuple[int, int] | None] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if _EMBEDDINGS.search(layer) or kind not in ("weight", "qweight", "weight_packed"):
            continue
        hidden = kind == "weight_packed" or (kind == "qweight" and tensor.dtype != "U8")
        hidden = hidden or f"{layer}.weight.absmax" in tensors
        if hidden:
            found[layer] = None
        elif len(tensor.shape) == 2:
            out, inner = tensor.shape
            found[layer] = (out, inner) if turned else (inner, out)
    return found


def _source(path: Path) -> list[str]:
    """What `agentopt quantize` made the folder from."""
    try:
        found = json.loads((path / "quantize.json").read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        return []
    return [found] if isinstance(found, str) and found else []


def _read_object(file: Path, name: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model {name!r}: found no {file.name}, expected a model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: found {type(found).__name__}, expected a JSON object.")
    return cast("dict[str, Any]", found)
