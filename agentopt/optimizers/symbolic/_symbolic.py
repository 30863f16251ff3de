"""Agent symbolic learning (arXiv 2406.18532): language loss, gradients, then edits of prompts, tools and pipelines.

The unit is one call of `propose`: the failing cases of one parent on one minibatch. Nothing is kept on the word of a
language loss: every update is measured by the search like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentopt.errors import UserError
from agentopt.graph import apply_edits
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._legal import Proposals
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._templates import load_templates
from agentopt.optimizers.symbolic._gradients import backward
from agentopt.optimizers.symbolic._options import Kind, SymbolicOptions
from agentopt.optimizers.symbolic._pipeline import PipelineOptimizer
from agentopt.optimizers.symbolic._prompt import PromptOptimizer
from agentopt.optimizers.symbolic._tool import ToolOptimizer
from agentopt.optimizers.symbolic._work import CallsUsedUp, LimitedLM, Work

if TYPE_CHECKING:
    from agentopt.graph import Edit

Part = PromptOptimizer | ToolOptimizer | PipelineOptimizer
_PARTS: dict[Kind, Part] = {"pipeline": PipelineOptimizer(), "tool": ToolOptimizer(), "prompt": PromptOptimizer()}
_FRUITLESS = 3
"""Answers in a row without an update after which a model has nothing to say."""


class Symbolic:
    """Proposes edits of prompts, tools and pipelines from language gradients.

    Args:
        options: settings; the defaults change everything that is tunable.
        template: a file that overrides fragments of the shipped meta-prompts (`symbolic.*`).
        name: shown in reports.

    Raises:
        UserError: the template file cannot be used.
    """

    def __init__(
        self,
        options: SymbolicOptions | None = None,
        *,
        template: str | Path | None = None,
        name: str = "symbolic",
    ) -> None:
        self.name = name
        self.options = options or SymbolicOptions()
        self.templates = load_templates(None if template is None else Path(template))

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates; [] without a model, a failing case or anything that fits.

        Raises:
            LMError: the model could not be reached, or refused everything.
            BudgetExhausted: the budget does not cover a call.
        """
        parts = self.parts(context)
        if context.lm is None or not parts or not context.rollouts:
            return []
        options = self.options
        work = Work(
            context,
            LimitedLM(context.lm, options.max_calls),
            self.templates,
            options,
            options.rate.at(context.iteration),
        )
        proposals = Proposals(context)
        try:
            await backward(work)
            if work.gradients:
                await self._updates(work, parts, proposals)
        except CallsUsedUp:
            work.drop(self.name, f"the limit of {options.max_calls} calls was reached; what was made before is used")
        return proposals.updates

    def parts(self, context: ProposeContext) -> list[Part]:
        """The optimizers that have something to change, in the order of this iteration."""
        fitting = [_PARTS[kind] for kind in self.options.kinds if _PARTS[kind].applies(context.specs)]
        if not fitting:
            return []
        turn = context.iteration % len(fitting)
        return [*fitting[turn:], *fitting[:turn]]

    async def _updates(self, work: Work, parts: Sequence[Part], proposals: Proposals) -> None:
        """Updates of one kind each, then one of all kinds together; more answers to the same questions after that.

        An answer that is of no use may be bad luck with a weak model: only several in a row end the asking.
        """
        fruitless = 0
        for place in range(work.context.count):
            made: list[Update] = []
            for part in parts:
                if proposals.full or (made and self.options.order == "round"):
                    break
                update = await part.update(work, place)
                if update is not None:
                    made.append(update)
                    proposals.offer(update)
            both = combined(work, made)
            if both is not None:
                proposals.offer(both)
            fruitless = 0 if made else fruitless + 1
            if proposals.full or fruitless == _FRUITLESS:
                return


def combined(work: Work, updates: Sequence[Update]) -> Update | None:
    """All updates as one, when that is legal and within the learning rate: structure first, then what depends on it."""
    if len(updates) < 2:
        return None
    order = ("symbolic.pipeline", "symbolic.tool", "symbolic.prompt")
    ordered = sorted(updates, key=lambda update: order.index(update.source))
    edits: list[Edit] = [edit for update in ordered for edit in update.edits]
    context = work.context
    try:
        apply_edits(context.parent, edits, context.specs)
    except UserError:
        return None
    kept, problems = work.bound.keep(context.parent, edits, context.specs)
    if problems:
        return None
    reason = cut(" ".join(update.rationale for update in ordered if update.rationale), 600)
    return Update(tuple(kept), reason, "symbolic.all")
