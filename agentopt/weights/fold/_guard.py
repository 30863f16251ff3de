"""A guard against interference: what folding does to prompts that have nothing to do with the facts.

The KL divergence from the base's next-token distribution to the folded model's, on unrelated sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.weights.fold._kit import Kit
from agentopt.weights.load import need

SENTENCES = (
    "The train to the coast leaves at noon and arrives before dark.",
    "Water boils at a lower temperature high up in the mountains.",
    "She closed the window because the street was loud.",
    "A good knife should be sharpened before it gets dull.",
    "The committee will meet again in the second week of March.",
    "Bread needs flour, water, salt and some time.",
    "Please send the invoice to the address below.",
    "Two plus three makes five, and five plus five makes ten.",
    "The library is closed on Mondays, except in summer.",
    "He wrote the letter by hand and forgot to sign it.",
    "In winter the lake freezes, and children skate on it.",
    "To install the package, run the command in a terminal.",
    "The novel begins with a storm and ends with a wedding.",
    "Plants turn light into sugar.",
    "My neighbour plays the violin every evening at eight.",
    "What time does the shop open tomorrow?",
)
"""Used when no prompts are given."""
_AT_ONCE = 4
_MOST = 64
"""Tokens of a prompt that are looked at."""


class Guard:
    """Unrelated prompts and what the base says after each of their tokens.

    Args:
        kit: before it is trained: the base is what it is now.
        prompts: a text each.
        seed: of the draw of prompts for a step.

    Raises:
        UserError: no prompt has two tokens.
    """

    def __init__(self, kit: Kit, prompts: Sequence[str], seed: int) -> None:
        self.torch = need("torch")
        self.kit, self.seed = kit, seed
        lead = kit.codec.lead
        rows = [[*lead, *kit.codec.ids(prompt)][:_MOST] for prompt in dict.fromkeys(prompts)]
        self.rows = [row for row in rows if len(row) >= 2]
        if not self.rows:
            raise UserError("guard: found no prompt of at least two tokens, expected sentences.")

    def divergence(self, state: Mapping[str, Any], documents: int, *place: int) -> Any:
        """Mean over documents and tokens of KL(base || folded), on prompts drawn for this place.

        Args:
            state: folded tensors.
            documents: how many there are.
            place: step and part, which the draw depends on.
        """
        torch = self.torch
        draw = np.random.Generator(np.random.Philox(key=seed_number("fold-guard", self.seed, *place)))
        numbers: list[int] = draw.permutation(len(self.rows))[:_AT_ONCE].tolist()
        chosen = [self.rows[number] for number in numbers]
        rows, keep = self._rows(chosen, documents)
        own, own_keep = self._rows(chosen, 1)
        with torch.no_grad():
            base = self.kit.engine.logits_at(None, own, own_keep).float().log_softmax(-1)
        folded = self.kit.engine.logits_at(dict(state), rows, keep).float().log_softmax(-1)
        folded = folded.reshape(documents, -1, folded.shape[-1])
        return (base.exp() * (base - folded)).sum(-1).mean()

    def _rows(self, chosen: Sequence[Sequence[int]], documents: int) -> tuple[Any, Any]:
        from agentopt.weights.fold._rows import Rows

        width = max(map(len, chosen))
        ids = np.full((len(chosen), width), self.kit.codec.pad, dtype=np.int64)
        keep = np.zeros(ids.shape, dtype=bool)
        for number, row in enumerate(chosen):
            ids[number, : len(row)] = row
            keep[number, 1 : len(row)] = True
        torch = self.torch
        shape = (documents, *ids.shape)
        wide = torch.from_numpy(np.broadcast_to(ids, shape).copy())
        mask = torch.from_numpy(np.broadcast_to(keep, shape).copy())
        return Rows(wide, mask.float()), mask
