"""Whether a folder may be given to the engine as an adapter of the served model.

    facts = check_adapter("handbook", base)             # UserError: one sentence, why not

A folder is taken when it is a plain LoRA adapter in peft's layout, whole and finite, with nothing beside it that a
loader could run, whose factors fit layers of the base, and, for a folded one, whose base is the served model. No torch
is needed: headers and numbers are read as bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.serving.adapters._base import BaseFacts
from agentopt.serving.adapters._config import CONFIG, LARGEST_CONFIG, WEIGHTS, LoraConfig, read_config
from agentopt.serving.adapters._contents import check_files, digest_of, read_small
from agentopt.serving.adapters._hashes import BaseHashes
from agentopt.serving.adapters._header import Tensor, is_finite, read_header

CARD = "fold.json"
_LARGEST_CARD = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]*(/[A-Za-z0-9_][A-Za-z0-9._:@+-]*)*")
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter that was checked."""

    name: str
    folder: Path
    rank: int
    """The largest of its layers."""
    layers: tuple[str, ...]
    """Names of the base's layers that it changes."""
    bytes: int
    digest: str
    """sha256 of the configuration and the weights that were checked."""
    stamp: tuple[tuple[int, ...], ...]
    """Changes when one of the files may have changed."""
    config: LoraConfig
    folded: bool = False
    """`agentopt fold` made it."""
    accepted: bool | None = None
    """What the gate of its folder said of it; None for adapters that are no folds."""
    recall: float | None = None
    facts: int = 0
    """How many facts were folded."""
    base: str = "by the shapes of its layers"
    """How it was compared with the served model."""
    notes: tuple[str, ...] = ()
    """What should be known before it is served, a sentence each."""
    created: int = 0
    """When its weights were written, seconds since the epoch."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the admin side and for lists."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "rank": self.rank,
            "layers": len(self.layers),
            "bytes": self.bytes,
            "digest": self.digest,
            "folded": self.folded,
            "accepted": self.accepted,
            "recall": self.recall,
            "facts": self.facts,
            "base": self.base,
            "notes": list(self.notes),
            "created": self.created,
        }


def parse_adapter(text: str) -> tuple[str, Path]:
    """The name and the folder of `name=DIR`.

    Raises:
        UserError: it is no such pair.
    """
    name, equals, folder = text.partition("=")
    if not equals or not folder.strip():
        raise UserError(f"adapter: found {text!r}, expected NAME=FOLDER.")
    return check_name(name.strip()), Path(folder.strip()).expanduser()


def check_name(name: str) -> str:
    """A name that an adapter can be asked by.

    Raises:
        UserError: it has other characters, or is too long.
    """
    if len(name) > 128 or not _NAME.fullmatch(name):
        raise UserError(
            f"adapter: found the name {name!r:.160}, expected at most 128 letters of A to Z, digits and . _ : @ + - "
            "(and / between two parts), beginning with a letter or a digit."
        )
    return name


def check_adapter(
    folder: str | Path, base: BaseFacts, *, name: str = "", hashes: BaseHashes | None = None
) -> AdapterFacts:
    """Check a folder against the served model.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        base: what it has to fit.
        name: by which it will be asked; the folder's name when empty.
        hashes: of the base, for adapters that say for which base they were folded.

    Raises:
        UserError: it cannot be served; one sentence.
    """
    path = Path(folder).expanduser()
    check_files(path)
    text = read_small(path, CONFIG, LARGEST_CONFIG)
    before = stamp(path)
    config = read_config(path, text)
    tensors = read_header(path / WEIGHTS)
    layers = _check_tensors(path, tensors, config, base)
    for key, tensor in tensors.items():
        if not is_finite(path / WEIGHTS, tensor):
            raise UserError(f"adapter {str(path)!r}: {key!r:.120} holds NaN or infinity; it cannot answer anything.")
    about = (path / WEIGHTS).stat()
    facts = AdapterFacts(
        name=name or path.name,
        folder=path,
        rank=max(tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key),
        layers=tuple(layers),
        bytes=about.st_size,
        digest=digest_of(text, path / WEIGHTS),
        stamp=before,
        config=config,
        created=int(about.st_mtime),
    )
    card = _card(path)
    if not _unchanged(path, before):  # the hash is of what will be copied: it has to be what was looked at
        raise UserError(f"adapter {str(path)!r}: it changed while it was checked; try again when it is complete.")
    return facts if card is None else _with_card(facts, card, base, hashes)


def stamp(folder: Path) -> tuple[tuple[int, ...], ...]:
    """Sizes and times of the files that matter; quick, for asking whether a folder has changed.

    Raises:
        OSError: a file is gone.
    """
    found: list[tuple[int, ...]] = []
    for file in (CONFIG, WEIGHTS, CARD):
        try:
            about = (folder / file).stat()
        except FileNotFoundError:
            if file != CARD:
                raise
            continue
        # The time of the last change of the file's entry too: unlike the other nobody can set it back.
        found.append((about.st_size, about.st_mtime_ns, about.st_ino, about.st_ctime_ns))
    return tuple(found)


def _unchanged(folder: Path, before: tuple[tuple[int, ...], ...]) -> bool:
    try:
        return stamp(folder) == before
    except OSError:
        return False


# --- tensors ---------------------------------------------------------------------------------------------------------


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base: BaseFacts) -> list[str]:
    """The layers of the base that the factors are for."""
    where = f"adapter {str(path)!r}"
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or len(tensor.shape) != 2 or tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{where}: {_strange(key, tensor)}, expected lora_A and lora_B of linear layers alone.")
        pairs.setdefault(found["layer"], {})[found["side"]] = tensor
    if not pairs:
        raise UserError(f"{where}: {WEIGHTS} holds no factors.")
    layers: list[str] = []
    for layer, pair in pairs.items():
        own = base.find(layer)
        if own is None:
            raise UserError(f"{where}: has factors for {layer!r:.120}, {_no_layer(layer, base)}.")
        _check_pair(where, layer, pair, base.layers[own], config, base.max_rank)
        layers.append(own)
    return layers


def _strange(key: str, tensor: Tensor) -> str:
    if "embedding" in key or "embed_tokens" in key or "lm_head" in key:
        return f"changes the embedding or the output head ({key!r:.120})"
    if "magnitude" in key:
        return f"has a magnitude as DoRA does ({key!r:.120})"
    return f"found the tensor {key!r:.120} ({tensor.dtype} {list(tensor.shape)})"


def _no_layer(layer: str, base: BaseFacts) -> str:
    if re.search(r"(^|\.)(lm_head|embed_tokens|wte|embed_out)$", layer):
        return "the embedding or the output head, which no engine takes; leave them out when training"
    return f"which is no linear layer of {base.folder.name!r} (it has {', '.join(base.ends[:12])}): for another base"


def _check_pair(
    where: str,
    layer: str,
    pair: Mapping[str, Tensor],
    shape: tuple[int, int] | None,
    config: LoraConfig,
    most: int,
) -> None:
    if len(pair) != 2:
        raise UserError(f"{where}: {layer!r:.120} has lora_{next(iter(pair))} alone, expected lora_A and lora_B.")
    (rank, inner), (out, second) = pair["A"].shape, pair["B"].shape
    if rank != second or rank < 1:
        raise UserError(f"{where}: the factors of {layer!r:.120} have ranks {rank} and {second}, expected one rank.")
    if rank != config.rank_of(layer):
        raise UserError(
            f"{where}: the factors of {layer!r:.120} have rank {rank}, but {CONFIG} says {config.rank_of(layer)}."
        )
    if rank > most:
        raise UserError(f"{where}: rank {rank} is above the server's {most}; start it with --max-rank {rank}.")
    if shape is not None and (inner, out) != shape:
        raise UserError(
            f"{where}: {layer!r:.120} is for a layer of {inner} by {out} numbers, the served model's has {shape[0]} by "
            f"{shape[1]}: for another base."
        )


# --- what a fold says of itself --------------------------------------------------------------------------------------


def _card(path: Path) -> dict[str, Any] | None:
    if not (path / CARD).is_file():
        return None
    try:
        found: Any = json.loads(read_small(path, CARD, _LARGEST_CARD))
    except (ValueError, RecursionError):
        raise UserError(f"adapter {str(path)!r}: {CARD} is not JSON; copy the folder again.") from None
    if not isinstance(found, dict) or not isinstance(cast("dict[str, Any]", found).get("base_hash"), str):
        raise UserError(f"adapter {str(path)!r}: {CARD} does not say its base's hash; fold its documents again.")
    return cast("dict[str, Any]", found)


def _with_card(
    facts: AdapterFacts, card: Mapping[str, Any], base: BaseFacts, hashes: BaseHashes | None
) -> AdapterFacts:
    recall, known = card.get("recall"), card.get("facts")
    accepted = card.get("accepted")
    notes: list[str] = []
    if accepted is False:
        notes.append("the gate of its folder did not accept it: its answers are unreliable")
    compared = _compare(facts.folder, str(card["base_hash"]), base, hashes)
    if compared.startswith("not"):
        notes.append(f"its base was {compared}")
    return replace(
        facts,
        folded=True,
        accepted=accepted if isinstance(accepted, bool) else None,
        recall=_share(recall),
        facts=len(cast("list[object]", known)) if isinstance(known, list) else 0,
        base=compared,
        notes=tuple(notes),
    )


def _share(value: object) -> float | None:
    """A number from 0 to 1; None for anything else, which no list of adapters may stumble over."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= 1 else None


def _compare(folder: Path, wanted: str, base: BaseFacts, hashes: BaseHashes | None) -> str:
    """How the base was compared; UserError when it is another one."""
    if hashes is None:
        return "not compared by its hash, only by the shapes of its layers"
    found = hashes.find(wanted)
    if found is not None:
        return f"by its hash, with {found}"
    reasons = "; ".join(one for one in hashes.reasons if one)
    if not hashes.sure:
        return f"not compared by its hash ({reasons or 'it cannot be computed here'})"
    own = ", ".join(one[:12] for one in hashes.known())
    made = f" and what it was made from ({', '.join(base.origins)})" if base.origins else ""
    why = f" ({reasons})" if reasons else ""
    raise UserError(
        f"adapter {str(folder)!r}: it was folded for another base (hash {wanted[:12]}; {base.folder.name!r}{made} has "
        f"{own}){why}; fold its documents again on the served model."
    )
