"""OPRO: a language model as black-box optimizer over scored solutions (arXiv 2309.03409).

The unit is one solution: a value for every editable parameter, with its mean score. The model sees the best solutions
in ascending order and a few training examples, and neither traces nor feedback: this is the baseline that everything
which reads the program's record has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number, seeded
from agentopt.graph import apply_edits
from agentopt.models import LMOptions
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import Proposals, headline
from agentopt.optimizers._memory import measured
from agentopt.optimizers._optoprime import EDITABLE, read_values, reply_schema
from agentopt.optimizers._problem import constraint_line, estimate_tokens
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._repair import Turns, propose_legal
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import Candidate
    from agentopt.models import Message


@dataclass(frozen=True, slots=True)
class OproOptions:
    """Settings of `Opro`."""

    solutions: int = 20
    """Scored solutions shown, the best ones."""
    examples: int = 3
    """Training examples shown."""
    history_tokens: int = 3000
    """Estimated tokens of the solutions; values are cut, then the worst left out, to stay within."""
    reply_tokens: int = 2048
    temperature: float = 1.0
    repairs: int = 3

    def __post_init__(self) -> None:
        for name in ("solutions", "history_tokens", "reply_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"OproOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class Solution:
    """A candidate and the most trustworthy mean score known of it."""

    candidate: Candidate
    score: float


class Opro:
    """Proposes new values from the scored history alone."""

    name = "opro"

    def __init__(self, options: OproOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or OproOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, sampled from the same question; [] without a model.

        Raises:
            LMError: the model could not be reached.
        """
        names = [name for name, spec in context.specs.items() if spec.kind in EDITABLE]
        if context.lm is None or not names:
            return []
        proposals = Proposals(context)
        messages = self.messages(context)
        turns = Turns(self.templates["optoprime.unreadable"], self.templates["optoprime.illegal"], ", ".join(names))
        for place in range(context.count):
            if proposals.done:
                break
            update = await propose_legal(
                context,
                context.lm,
                messages,
                options=LMOptions(
                    temperature=self.options.temperature,
                    max_tokens=self.options.reply_tokens,
                    seed=seed_number("opro", context.seed, context.iteration, context.parent.hash, place),
                    sample=place,
                ),
                read=lambda reply: read_values(context, reply, names),
                source=self.name,
                schema=reply_schema(names),
                repairs=self.options.repairs,
                turns=turns,
            )
            proposals.take(update)
        return proposals.updates

    def messages(self, context: ProposeContext) -> list[Message]:
        """The question. A pure function of the context."""
        specs = {name: spec for name, spec in context.specs.items() if spec.kind in EDITABLE}
        names = ", ".join(specs)
        fields = {
            "history": self._history(solutions(context), list(specs)) or "(nothing was measured yet)",
            "examples": self._examples(context) or "(none)",
            "constraints": "\n".join(constraint_line(spec) for spec in specs.values()),
            "output_format": self.templates["optoprime.output_format"].fill({"names": names}),
        }
        system = self.templates["opro.system"].fill({"objective": context.objective}).strip()
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": self.templates["opro.task"].fill(fields)},
        ]

    def _history(self, known: Sequence[Solution], names: Sequence[str]) -> str:
        kept = list(known[-self.options.solutions :])
        while kept:
            for limit in (2400, 1200, 600):
                text = "\n\n".join(_shown(solution, names, limit) for solution in kept)
                if estimate_tokens(text) <= self.options.history_tokens:
                    return text
            if len(kept) == 1:
                return cut(_shown(kept[0], names, 600), 3 * self.options.history_tokens)
            del kept[0]
        return ""

    def _examples(self, context: ProposeContext) -> str:
        rows = list(context.train)
        seeded("opro-examples", context.seed, context.iteration).shuffle(rows)
        lines: list[str] = []
        for row in rows[: self.options.examples]:
            inputs = "; ".join(f"{headline(name)}: {cut(_plain(value), 400)}" for name, value in row.inputs.items())
            answer = "" if row.expected is None else f" -> {cut(_plain(row.expected), 200)}"
            lines.append(f"- {inputs}{answer}")
        return "\n".join(lines)


def solutions(context: ProposeContext) -> list[Solution]:
    """Every measured solution whose values can be told, worst first; equal scores keep their order in time.

    History holds edits, not values: values are found by applying them, parents first. The parent and the declared
    values count too, with what they scored on minibatches. Of solutions that differ in nothing which may be edited now
    the best score stands.
    """
    baseline = context.parent.with_values({name: spec.default for name, spec in context.specs.items()})
    known: dict[str, Candidate] = {context.history[0].parent_hash: baseline} if context.history else {}
    known[context.parent.hash] = context.parent
    scores: dict[str, float] = {}
    beside: dict[str, list[float]] = {}
    for past in context.history:
        if past.screen_parent is not None:
            beside.setdefault(past.parent_hash, []).append(past.screen_parent)
        parent = known.get(past.parent_hash)
        if parent is None:
            continue
        edits = [edit for edit in past.update.edits if edit.name in context.specs]
        try:
            child = apply_edits(parent, edits, context.specs)
        except UserError:
            continue  # made under other declarations
        known.setdefault(past.candidate_hash, child)
        score = measured(past)
        if score is not None:
            scores[past.candidate_hash] = score
    if context.rollouts:
        mean = sum(rollout.row.score for rollout in context.rollouts) / len(context.rollouts)
        beside.setdefault(context.parent.hash, []).append(mean)
    for key, means in beside.items():
        scores.setdefault(key, sum(means) / len(means))
    best: dict[str, Solution] = {}
    for key, candidate in known.items():
        if key in scores:
            seen = repr([candidate.get(name, spec.default) for name, spec in context.specs.items()])
            if seen not in best or best[seen].score < scores[key]:
                best[seen] = Solution(candidate, scores[key])
    return sorted(best.values(), key=lambda solution: solution.score)


def _shown(solution: Solution, names: Sequence[str], limit: int) -> str:
    lines = [f"{name} =\n{cut(_plain(solution.candidate.get(name, '')), limit)}" for name in names]
    return "\n".join([*lines, f"score: {solution.score:.3f}"])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
