"""Shorter prompts: the capsulator as an optimizer, for runs in which tokens or cost count beside the score.

The unit is one text parameter (or one list of demonstrations) of the parent. Four kinds of shorter values are proposed,
cheapest idea first: the text after the edits that lose nothing; the units worth most within a share of its length;
the text without one part of its units (halves, then quarters, ...); and, with a model that writes, a verified
rewriting. What is worth keeping is measured, not guessed: a proposal whose score is not shown to be lower and whose
prompt is shorter becomes the next parent (`TuneOptions.objectives`), and its own halves are tried next. With the score
as the only objective a shorter value has to score higher, as every other proposal does.

Placeholders that the program fills are keep spans, so they are in every proposal; whatever else a parameter demands is
checked as for every edit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.counting._tokens import TokenBudget
from agentopt.capsules.extraction._demos import label_of, spread
from agentopt.capsules.extraction._extract import extract
from agentopt.capsules.extraction._render import render
from agentopt.capsules.extraction._terms import Vocabulary
from agentopt.capsules.units._lossless import lossless
from agentopt.capsules.units._units import parse
from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.graph import set_value
from agentopt.optimizers._legal import TEXT_KINDS, Proposals, current_value, edit_for
from agentopt.optimizers._protocol import ProposeContext, Update

if TYPE_CHECKING:
    from agentopt.capsules._types import Document
    from agentopt.graph import ParameterSpec

KINDS = TEXT_KINDS | {"demos"}
SHORTER = frozenset({"tokens", "cost"})
"""Objectives for which a shorter prompt is a gain."""
TOKENIZER = "bytes"
"""Budgets are shares of a length, and which model reads the prompt is not known: bytes are there for every text."""


@dataclass(frozen=True, slots=True)
class CapsulesOptions:
    """Settings of `Capsules`."""

    ratios: tuple[float, ...] = (0.5, 0.75, 0.25)
    """Shares of a text's length that are tried, in this order."""
    parts: int = 8
    """Into how many parts a text's units are divided at most, to leave out one of them."""
    max_calls: int = 2
    """Rewritings that one round may ask the optimizer's model for; 0 for none."""
    repairs: int = 1
    """Rounds in which a rewriting that failed its checks is sent back."""

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise UserError(f"CapsulesOptions: ratios must lie between 0 and 1, found {self.ratios!r}.")
        if self.parts < 2:
            raise UserError(f"CapsulesOptions: parts must be at least 2, found {self.parts!r}.")
        if min(self.max_calls, self.repairs) < 0:
            raise UserError("CapsulesOptions: max_calls and repairs must not be negative.")


class Capsules:
    """Proposes shorter values of texts and demonstrations.

    Args:
        options: shares, parts, calls.
    """

    name = "capsule"

    def __init__(self, options: CapsulesOptions | None = None) -> None:
        self.options = options or CapsulesOptions()

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates of one parameter each; [] when nothing shorter is left to try.

        Raises:
            LMError: the model could not be reached.
        """
        proposals = Proposals(context)
        queues = [(spec, self._shorter(context, spec)) for spec in _long_first(context)]
        while queues and not proposals.full:
            for spec, queue in list(queues):
                found = next(queue, None)
                if found is None:
                    queues.remove((spec, queue))
                elif not proposals.full:
                    proposals.offer(found)
        if not proposals.full:
            await self._rewritten(context, proposals)
        return proposals.updates

    # --- without a model ---

    def _shorter(self, context: ProposeContext, spec: ParameterSpec) -> Iterator[Update]:
        value = current_value(context, spec)
        if spec.kind == "demos":
            return self._fewer(spec, cast("list[Any]", value))
        return self._texts(spec, cast("str", value), context.seed)

    def _texts(self, spec: ParameterSpec, text: str, seed: int) -> Iterator[Update]:
        """Shorter texts, one at a time; each is made when it is asked for."""
        keep = _placeholders(spec, text)
        document = parse(text, keep)
        edited = lossless(text)[0]
        if len(edited) < len(text):
            yield self._update(spec, edited, "lossless", "the same text without what carries nothing")
            document = parse(edited, keep)
        whole = TokenBudget(1, tokenizer=TOKENIZER).meter().total([text])
        for ratio in self.options.ratios:
            shorter = extracted(document, max(1, round(ratio * whole)), seed)
            if shorter is not None:
                yield self._update(spec, shorter, "extract", f"the units worth most in {ratio:.0%} of the length")
        for shorter, why in _without_parts(document, self.options.parts):
            yield self._update(spec, shorter, "drop", why)

    def _fewer(self, spec: ParameterSpec, items: list[Any]) -> Iterator[Update]:
        """Fewer demonstrations: those farthest from one another, as many of each label, in their order; then none."""
        order = _spread(items)
        sizes = [len(items) - 1, *(round(ratio * len(items)) for ratio in self.options.ratios), 0]
        for size in dict.fromkeys(size for size in sizes if 0 <= size < len(items)):
            kept = [items[place] for place in sorted(order[:size])]
            why = f"{size} of {len(items)} demonstrations of {spec.name}"
            yield Update((set_value(spec, kept),), why, f"{self.name}.demos")

    def _update(self, spec: ParameterSpec, text: str, part: str, why: str) -> Update:
        return Update((edit_for(spec, text),), f"shortens {spec.name}: {why}", f"{self.name}.{part}")

    # --- with one ---

    async def _rewritten(self, context: ProposeContext, proposals: Proposals) -> None:
        """Rewritings that passed their checks; one that did not is dropped with the reason."""
        from agentopt.optimizers._auto import is_weak, model_name

        if context.lm is None or is_weak(model_name(context)):
            return
        specs = [spec for spec in _long_first(context) if spec.kind in TEXT_KINDS]
        jobs = [(spec, ratio) for ratio in self.options.ratios for spec in specs]
        start = seed_number("capsule", context.seed, context.iteration, context.parent.hash) if jobs else 0
        for turn in range(min(self.options.max_calls, len(jobs))):
            if proposals.full:
                return
            spec, ratio = jobs[(start + turn) % len(jobs)]
            update = await self._rewrite(context, spec, ratio, proposals)
            if update is not None:
                proposals.offer(update)

    async def _rewrite(
        self, context: ProposeContext, spec: ParameterSpec, ratio: float, proposals: Proposals
    ) -> Update | None:
        from agentopt.capsules import CapsuleOptions, make_capsule

        text = cast("str", current_value(context, spec))
        budget = TokenBudget(max(1, round(ratio * len(text.encode("utf-8", "surrogatepass")))), tokenizer=TOKENIZER)
        options = CapsuleOptions(seed=context.seed, repairs=self.options.repairs, styles=("prose",))
        source = f"{self.name}.rewrite"
        try:
            made = await make_capsule(
                text, budget=budget, keep=_placeholders(spec, text), mode="rewrite", lm=context.lm, options=options
            )
        except BudgetInfeasible as short:
            proposals.drop(source, f"{spec.name}: {short}")
            return None
        if made.made != "rewrite":
            proposals.drop(source, f"{spec.name}: {made.fallback or 'no rewriting was needed'}")
            return None
        return self._update(spec, made.text, "rewrite", f"rewritten in {ratio:.0%} of the length")


def _long_first(context: ProposeContext) -> list[ParameterSpec]:
    """The parameters that can be shorter, the longest value first."""
    found: list[tuple[int, ParameterSpec]] = []
    for spec in context.specs.values():
        value: Any = current_value(context, spec)
        if spec.kind in TEXT_KINDS and isinstance(value, str) and value.strip():
            found.append((len(value), spec))
        elif spec.kind == "demos" and isinstance(value, list) and value:
            found.append((sum(len(str(item)) for item in cast("list[Any]", value)), spec))
    return [spec for _, spec in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]


def _placeholders(spec: ParameterSpec, text: str) -> list[str]:
    """Patterns of what the program fills: in braces, or the bare name where `text` has it in another syntax."""
    found: list[str] = []
    for name in spec.variables:
        braces = rf"\{{+\s*{re.escape(name)}\b[^{{}}\n]*\}}+"
        found.append(braces if re.search(braces, text) else rf"(?<!\w){re.escape(name)}(?!\w)")
    return found


def extracted(document: Document, limit: int, seed: int) -> str | None:
    """Whole units within the limit, or within the least that is possible; None when a unit would have to be cut."""
    try:
        found = extract([document], TokenBudget(limit, tokenizer=TOKENIZER).meter(), seed=seed)
    except BudgetInfeasible as short:
        try:
            found = extract([document], TokenBudget(short.minimum, tokenizer=TOKENIZER).meter(), seed=seed)
        except BudgetInfeasible:
            return None
    if any(unit.reason == "cut" for unit in found.dropped) or len(found.texts[0]) >= len(document.text):
        return None
    return found.texts[0]


def _without_parts(document: Document, most: int) -> Iterator[tuple[str, str]]:
    """The text without one of 2, 4, ... equal parts of the units that may leave."""
    free = [place for place, unit in enumerate(document.units) if not unit.keep]
    parts = 2
    while parts // 2 < len(free) and parts <= most:
        cuts = [round(number * len(free) / parts) for number in range(parts + 1)]
        for number in range(parts):
            gone = frozenset(free[cuts[number] : cuts[number + 1]])
            if gone and len(gone) < len(document.units):
                text = render(document, [place not in gone for place in range(len(document.units))])
                yield text, f"without part {number + 1} of {parts}"
        parts *= 2


def _spread(items: list[Any]) -> list[int]:
    """The order in which demonstrations are worth keeping."""
    vocabulary = Vocabulary()
    texts = [" ".join(map(str, cast("Mapping[str, Any]", item).values())) for item in items]
    lists = [vocabulary.read(text) for text in texts]
    answers = [str(cast("Mapping[str, Any]", item).get("output", "")) for item in items]
    return spread(lists, len(vocabulary), [label_of(answer) for answer in answers])
