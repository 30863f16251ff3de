"""What folds: an engine, the meta-parameters, texts as rows. Meta-training, folding and asking share one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.weights.fold._answers import Written, write_answers
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._encoding import Asked, Encoder, FactRows, Pick
from agentopt.weights.fold._types import FoldOptions
from agentopt.weights.load import need

MAX_NEW = 96


@dataclass
class Kit:
    """A model made ready for folding."""

    engine: Any
    meta: Any
    encoder: Encoder
    options: FoldOptions
    max_new: int = MAX_NEW
    """Most tokens that recalled facts, or an answer, may have."""

    @property
    def codec(self) -> Codec:
        """Tokenizer and format."""
        return self.encoder.codec

    def named(self) -> dict[str, Any]:
        """Every meta-parameter under the name that `state_dict` gives it."""
        meta = self.meta
        kinds = {"init": meta.init, "rates": meta.rates, "token_weights": meta.token_weights, "shared": meta.shared}
        return {f"{kind}/{name}": tensor for kind, held in kinds.items() for name, tensor in held.items()}

    def folded(self, facts: Sequence[Sequence[str]], *, graph: bool) -> dict[str, Any]:
        """The adapted tensors after the inner loop, one knowledge base beside the other."""
        return self.fold([self.encoder.facts(one) for one in facts], graph=graph)

    def fold(self, bases: Sequence[FactRows], *, graph: bool) -> dict[str, Any]:
        """The same of rows."""
        from agentopt.weights.fold._inner import fold_rows

        rows = self.encoder.fold_rows(bases).scaled(self.options.sum_over)
        return fold_rows(self.engine, self.meta, rows, graph=graph)

    def start(self, documents: int) -> dict[str, Any]:
        """The adapted tensors before the inner loop."""
        return self.engine.expand(self.meta.init, documents)

    def recalled(self, state: Mapping[str, Any], bases: Sequence[FactRows]) -> list[list[float]]:
        """exp(-mean loss per token) of every fact of every knowledge base, read without the others."""
        torch = need("torch")
        rows = self.encoder.fold_rows(bases)
        with torch.no_grad():
            nll: list[Any] = self.engine.nll(dict(state), rows).sum(-1).cpu().tolist()
        counts: list[Any] = rows.weight.sum(-1).tolist()
        found: list[list[float]] = []
        for base, losses, tokens in zip(bases, nll, counts, strict=True):
            sums = [[0.0, 0.0] for _ in range(max(base.fact) + 1)]
            for owner, loss, count in zip(base.fact, losses, tokens, strict=False):
                sums[owner][0] += loss
                sums[owner][1] += count
            found.append([math.exp(-loss / count) for loss, count in sums])
        return found

    def losses(self, state: Mapping[str, Any], asked: Asked) -> tuple[Any, Any]:
        """Mean loss per token of the answers and of the recalled facts, each the mean over questions."""
        nll = self.engine.nll(dict(state), asked.rows)
        return _mean(nll, asked.answer.to(nll.device)), _mean(nll, asked.recall.to(nll.device))

    def row_loss(self, state: Mapping[str, Any], picks: Sequence[Pick]) -> Any:
        """Mean loss per token of the relevant facts as rows, without any question before them; 0 without any."""
        bases: list[FactRows] = []
        for pick in picks:
            wanted = {place for number in pick.questions for place in pick.task.questions[number].relevant}
            bases.append(self.encoder.facts([pick.task.facts[place] for place in sorted(wanted)]))
        if not any(base.ids for base in bases):
            return 0.0
        rows = self.encoder.fold_rows(bases)
        nll = self.engine.nll(dict(state), rows)
        return _mean(nll, rows.weight.to(nll.device))

    def write(
        self,
        state: Mapping[str, Any],
        index: Sequence[int],
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[str]],
        max_new: int | None = None,
    ) -> list[Written]:
        """Answers of knowledge base `index[r]` to prompt r."""
        model, most = self.engine.model, max_new or self.max_new
        if self.options.adapts == "lora":
            with self.engine.using(state), self.engine.adapters.rows(index):
                return write_answers(model, self.codec, prompts, choices, max_new=most)
        found: dict[int, Written] = {}
        for document in dict.fromkeys(index):
            places = [place for place, number in enumerate(index) if number == document]
            with self.engine.using({name: tensor[document] for name, tensor in state.items()}):
                part = write_answers(
                    model,
                    self.codec,
                    [prompts[place] for place in places],
                    [choices[place] for place in places],
                    max_new=most,
                )
            found |= dict(zip(places, part, strict=True))
        return [found[place] for place in range(len(prompts))]


def _mean(nll: Any, mask: Any) -> Any:
    counts = mask.sum(-1)
    rows = (nll * mask).sum(-1) / counts.clamp(min=1)
    return rows.sum() / (counts > 0).sum().clamp(min=1)
