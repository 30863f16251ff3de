"""OptoPrime with several candidates per step: a spread of temperatures, second thoughts, several models.

The unit is one step: up to `context.count` different candidates of one parent. Which of them is best is not judged here
by text (likeness, votes, an opinion of a model): all are returned, and the screen compares them on data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number
from agentopt.models import BudgetExhausted, LMError, LMOptions, current_config
from agentopt.optimizers._legal import Proposals
from agentopt.optimizers._memory import gain
from agentopt.optimizers._optoprime import EDITABLE, OptoPrime, OptoPrimeOptions, read_values, reply_schema
from agentopt.optimizers._protocol import PastProposal, ProposeContext, Update
from agentopt.optimizers._repair import propose_legal

if TYPE_CHECKING:
    from agentopt.models import LM, Client, Message


@dataclass(frozen=True, slots=True)
class OptoPrimeMultiOptions:
    """Settings of `OptoPrimeMulti`."""

    base: OptoPrimeOptions = field(default_factory=OptoPrimeOptions)
    """Sizes, repairs and memory, as in `OptoPrime`; its temperature is not used."""
    temperatures: tuple[float, ...] = (0.0, 0.5, 0.9, 1.2)
    """Taken in turn by the candidates of a step."""
    refine_every: int = 3
    """Every so many candidates one is the model's second thoughts on an earlier one of its own; 0 for never."""
    models: tuple[str | LM | Client, ...] = ()
    """Who writes, in turn: roles of this run's models, clients or `LM` objects. Empty: the optimizer's model alone."""
    max_calls: int = 24
    """Conversations of one step at most, repeated suggestions included."""

    def __post_init__(self) -> None:
        if not self.temperatures or any(not 0.0 <= value <= 2.0 for value in self.temperatures):
            raise UserError(f"OptoPrimeMultiOptions: temperatures must lie in 0 to 2, found {self.temperatures!r}.")
        if self.refine_every < 0 or self.refine_every == 1:
            raise UserError(f"OptoPrimeMultiOptions: refine_every must be 0 or at least 2, found {self.refine_every}.")
        if self.max_calls < 1:
            raise UserError(f"OptoPrimeMultiOptions: max_calls must be at least 1, found {self.max_calls}.")


class OptoPrimeMulti:
    """Proposes several different candidates per step and leaves the choice to the data."""

    name = "optoprime-multi"

    def __init__(self, options: OptoPrimeMultiOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or OptoPrimeMultiOptions()
        self._single = OptoPrime(self.options.base, template=template)

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` different updates; a model that fails is left out for the rest of the step.

        Raises:
            LMError: a model failed and nothing was proposed.
            UserError: a role in `models` is not configured in this run.
        """
        names = [name for name, spec in context.specs.items() if spec.kind in EDITABLE]
        models = self._models(context)
        if not models or not names or not context.rollouts:
            return []
        proposals = Proposals(context)
        failed: dict[int, LMError] = {}
        for place in range(min(self.options.max_calls, 2 * context.count)):
            able = [number for number in range(len(models)) if number not in failed]
            if proposals.done or not able:
                break
            number = able[(context.iteration + place) % len(able)]
            try:
                update = await self._one(context, models[number], names, proposals.updates, place)
            except BudgetExhausted:
                raise
            except LMError as error:
                failed[number] = error
                proposals.drop(self.name, f"the language model failed: {error}")
                continue
            proposals.take(update)
        if failed and not proposals.updates:
            raise next(iter(failed.values()))
        return proposals.updates

    def _models(self, context: ProposeContext) -> list[LM]:
        if not self.options.models:
            return [] if context.lm is None else [context.lm]
        config = current_config()
        found: list[LM] = []
        for given in self.options.models:
            if isinstance(given, str) and given not in config.models:
                raise UserError(
                    f"OptoPrimeMulti: models names the role {given!r}, which has no model in this run; configured are "
                    f"{', '.join(config.models) or 'none'}. Give it one (models={{{given!r}: ...}}) or pass a client."
                )
            spec = config.models[given] if isinstance(given, str) else given
            found.append(config.build(given if isinstance(given, str) else "optimizer", spec))
        return found

    async def _one(
        self, context: ProposeContext, lm: LM, names: list[str], made: Sequence[Update], place: int
    ) -> Update | None:
        # With one proposal an iteration the iterations take turns instead.
        turn = context.iteration + place
        temperatures, models = self.options.temperatures, max(1, len(self.options.models))
        options = LMOptions(
            temperature=temperatures[turn // models % len(temperatures)],
            max_tokens=self.options.base.reply_tokens,
            seed=seed_number("optoprime-multi", context.seed, context.iteration, context.parent.hash, place),
            sample=place,
        )
        messages = self._single.messages(context)
        every = self.options.refine_every
        again = self._second_thoughts(context, made) if every and turn % every == every - 1 else []
        return await propose_legal(
            context,
            lm,
            [*messages, *again],
            options=options,
            read=lambda reply: read_values(context, reply, names),
            source=f"{self.name}.{'refined' if again else 'fresh'}",
            schema=reply_schema(names),
            repairs=self.options.base.repairs,
            turns=self._single.turns(names),
        )

    def _second_thoughts(self, context: ProposeContext, made: Sequence[Update]) -> list[Message]:
        """An earlier suggestion of its own as if just made, and the request to better it; [] when there is none.

        The best measured one of earlier rounds if it brought something, else the latest of this step.
        """
        own = [
            (gained, past)
            for past in context.history
            if past.update.source.startswith(self.name) and (gained := gain(past)) is not None
        ]
        best = max(own, key=lambda item: item[0], default=None)
        if best is not None and (best[0] > 0 or not made):
            update, outcome = best[1].update, _outcome(best[1])
        elif made:
            update, outcome = made[-1], "It has not been measured yet."
        else:
            return []
        turn = self._single.templates["optoprime_multi.refine"].fill({"outcome": outcome})
        said = {"reasoning": update.rationale, "suggestion": [_pair(edit.to_dict()) for edit in update.edits]}
        return [
            {"role": "assistant", "content": json.dumps(said, ensure_ascii=False)},
            {"role": "user", "content": turn},
        ]


def _outcome(past: PastProposal) -> str:
    kept = "it was kept" if past.accepted else "it was not kept"
    return (
        f"Measured on a minibatch it scored {past.screen:.2f}, the values before it {past.screen_parent:.2f}; {kept}."
    )


def _pair(edit: dict[str, Any]) -> dict[str, Any]:
    value = next((edit[key] for key in ("text", "source", "value") if key in edit), "")
    return {"name": edit["name"], "value": value}
