"""Which layers a checkpoint holds as codes, by the names of its tensors. No vLLM and no torch here.

vLLM fuses layers and renames them, and calls linear layers what transformers does not (the router of a mixture of
experts). The tensors in the files say for certain what is quantized; where their names are not at hand (a model that is
not a folder), or a layer has another name in the files, the list in config.json decides.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentopt.weights.gg._checkpoint import CODES, matches


def stored_layers(folder: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the layers that are stored as codes, and of those with a plain weight; none where there is no folder."""
    place = Path(folder)
    names: set[str] = set()
    if (index := place / "model.safetensors.index.json").is_file():
        names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    elif place.is_dir():
        open_file: Any = importlib.import_module("safetensors").safe_open
        for path in sorted(place.glob("*.safetensors")):
            with open_file(str(path), framework="numpy") as file:
                names.update(file.keys())
    return _ending(names, CODES), _ending(names, "weight")


def _ending(names: Iterable[str], last: str) -> frozenset[str]:
    return frozenset(name.removesuffix(f".{last}") for name in names if name.endswith(f".{last}"))


class Layers:
    """The layers of a checkpoint: `skip` from config.json, `codes` and `plain` from the names of the tensors."""

    def __init__(self, skip: Sequence[str], codes: Iterable[str] = (), plain: Iterable[str] = ()) -> None:
        self.skip, self.codes, self.plain = frozenset(skip), frozenset(codes), frozenset(plain)

    def rename(self, mapped: Callable[[list[str]], list[str]]) -> None:
        """Know the layers by these names too."""
        self.skip |= {*mapped([*self.skip])}
        # A mapper may know a name only as a tensor's.
        self.codes |= _ending(mapped([f"{name}.{CODES}" for name in self.codes]), CODES)
        self.plain |= _ending(mapped([f"{name}.weight" for name in self.plain]), "weight")

    def inside(self, prefix: str) -> bool:
        """Whether anything below this name is stored as codes."""
        return any(name == prefix or name.startswith(f"{prefix}.") for name in self.codes)

    def quantized(self, prefix: str, fused: Mapping[str, Sequence[str]] | None = None) -> bool:
        """Whether this layer is ours. `fused` tells what a layer's last name stands for ("qkv_proj": q, k and v).

        Raises:
            ValueError: only a part of what is fused is stored as codes.
        """
        before, _, last = prefix.rpartition(".")
        parts = (fused or {}).get(last, ())
        names = [prefix] if prefix in self.codes | self.plain or not parts else [f"{before}.{part}" for part in parts]
        ours = {name: self._ours(name, prefix) for name in names}
        if len({*ours.values()}) > 1:
            kept = ", ".join(name for name, quantized in ours.items() if not quantized)
            raise ValueError(
                f"{prefix}: found {kept} left as it was and the rest quantized, expected all or none of "
                f"{', '.join(parts)}: vLLM makes one layer of them. Quantize again with all of them skipped, or none."
            )
        return all(ours.values())

    def _ours(self, name: str, prefix: str) -> bool:
        if name in self.codes or name in self.plain:
            return name in self.codes
        return not (matches(name, self.skip) or matches(prefix, self.skip))
