"""The running sequences as one batch: rows join when their prompt was read and leave when they are done.

Every row has its own length; rows are padded on the left, the mask hides the padding, and positions are counted per
row, so that a row's tokens do not depend on its neighbours but for rounding. A key is stored with its position already
in it, so rows can be shifted against each other. This holds for full attention with a growing cache; models with other
caches (sliding windows, states) run one row at a time, which `joins` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Reading:
    """A prompt on its way into a cache of its own, some tokens at a time."""

    def __init__(self, tokens: Sequence[int], cache: Any) -> None:
        self.tokens, self.cache = tokens, cache
        self.done = 0
        """Tokens that were read."""
        self.logits: Any = None
        """(vocabulary,) after the last token that was read."""

    @property
    def complete(self) -> bool:
        """Whether all was read."""
        return self.done >= len(self.tokens)


class Rows:
    """A model's batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lengths: list[int] = []
        """Tokens of each row that are in the cache."""
        self._cache: Any = None
        self._positions = "position_ids" in inspect.signature(model.forward).parameters
        self.joins = self._positions and _full_attention(model.config)

    def __len__(self) -> int:
        return len(self.lengths)

    def begin(self, tokens: Sequence[int]) -> Reading:
        """A prompt that is to be read."""
        from transformers import DynamicCache

        return Reading(tokens, DynamicCache(config=self.model.config))

    def read(self, reading: Reading, most: int) -> None:
        """Read the next tokens of a prompt, at most so many. The batch is not touched."""
        device, start = self.model.device, reading.done
        part = torch.tensor([reading.tokens[start : start + most]], device=device)
        extra: dict[str, Any] = {}
        if self._positions:
            extra["position_ids"] = torch.arange(start, start + part.shape[1], device=device)[None]
        out = self.model(
            input_ids=part,
            past_key_values=reading.cache,
            use_cache=True,
            logits_to_keep=1,
            attention_mask=torch.ones((1, start + part.shape[1]), dtype=torch.long, device=device),
            **extra,
        )
        reading.cache, reading.logits = out.past_key_values, out.logits[0, -1]
        reading.done += int(part.shape[1])
        if self.joins and any(type(layer).__name__ != "DynamicLayer" for layer in reading.cache.layers):
            self.joins = False

    def join(self, reading: Reading) -> None:
        """Add a prompt that was read as the last row."""
        self.lengths.append(reading.done)
        if len(self.lengths) == 1:
            self._cache = reading.cache
            return
        longest = max(self.lengths)
        for own, other in zip(self._cache.layers, reading.cache.layers, strict=True):
            own.keys = torch.cat([_padded(own.keys, longest), _padded(other.keys, longest)])
            own.values = torch.cat([_padded(own.values, longest), _padded(other.values, longest)])

    def leave(self, rows: Sequence[int]) -> None:
        """Take rows out."""
        if not rows:
            return
        kept = [row for row in range(len(self.lengths)) if row not in set(rows)]
        self.lengths = [self.lengths[row] for row in kept]
        if not kept:
            self._cache = None
            return
        index = torch.tensor(kept, device=self.model.device)
        longest = max(self.lengths)
        for layer in self._cache.layers:
            layer.keys = layer.keys[index, :, layer.keys.shape[2] - longest :].contiguous()
            layer.values = layer.values[index, :, layer.values.shape[2] - longest :].contiguous()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token for each row; gives the logits (rows, vocabulary) after it."""
        device = self.model.device
        longest = max(self.lengths) + 1
        lengths = torch.tensor(self.lengths, device=device)
        places = torch.arange(longest, device=device)[None]
        mask = (places >= (longest - 1 - lengths)[:, None]).long()
        extra = {"position_ids": lengths[:, None]} if self._positions else {}
        out = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
            attention_mask=mask,
            **extra,
        )
        self._cache = out.past_key_values
        self.lengths = [length + 1 for length in self.lengths]
        return out.logits[:, -1]

    def clear(self) -> None:
        """Take all rows out."""
        self.lengths, self._cache = [], None


def _padded(held: Tensor, longest: int) -> Tensor:
    missing = longest - held.shape[2]
    if not missing:
        return held
    empty = held.new_zeros((held.shape[0], held.shape[1], missing, held.shape[3]))
    return torch.cat([empty, held], dim=2)


def _full_attention(config: Any) -> bool:
    about = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(about, "layer_types", None)
    if kinds is not None:
        return all(kind == "full_attention" for kind in kinds)
    window = getattr(about, "sliding_window", None)
    return window is None or getattr(about, "use_sliding_window", None) is False
