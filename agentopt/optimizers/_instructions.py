"""Instruction proposals for prompts: written by a language model, or put together from frames without one.

The unit is one prompt parameter. Written proposals are grounded in the data description, the program summary, a tip and
past texts with their scores (as in MIPRO, arXiv 2406.11695, and OPRO, 2309.03409). Frame proposals need no model at
all (see `_frames`), so a weak or absent optimizer model still gives candidates worth measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agentopt.evaluation import seed_number, seeded
from agentopt.graph import SetText
from agentopt.models import LMOptions
from agentopt.optimizers._ask import ask
from agentopt.optimizers._data import cue_words, describe
from agentopt.optimizers._feedback import cut
from agentopt.optimizers._frames import Observation, Pool
from agentopt.optimizers._legal import Proposals, current_value, headline, with_variables
from agentopt.optimizers._memory import measured
from agentopt.optimizers._problem import cases_of
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._reply import parse_text
from agentopt.optimizers._space import text_space
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.graph import ParameterSpec
    from agentopt.models import LM, Message

# The variance of a mean over about 16 screening rows, and over about 100 validation rows, of a 0/1 score.
_SCREEN_VARIANCE = 0.015
_VALIDATION_VARIANCE = 0.0025
_SCHEMA = {
    "type": "object",
    "properties": {"instruction": {"type": "string"}},
    "required": ["instruction"],
    "additionalProperties": False,
}


class Instructions:
    """Proposes new texts for prompt parameters.

    Args:
        lm: True asks the optimizer's language model; False builds texts from frames and asks nothing.
        template: a file that overrides fragments of the shipped meta-prompts and frames.
        max_calls: language model calls of one `propose`, at most.

    Raises:
        UserError: the template file cannot be used.
    """

    def __init__(self, *, lm: bool = True, template: str | Path | None = None, max_calls: int = 4) -> None:
        self.name = "instructions" if lm else "instructions-free"
        self._lm = lm
        self._max_calls = max_calls
        self.templates = load_templates(None if template is None else Path(template))
        self._pools: dict[tuple[str, ...], Pool] = {}

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, each of one prompt; prompts take turns.

        Raises:
            LMError: the model could not be reached (never without `lm`).
        """
        specs = [spec for spec in context.specs.values() if spec.kind == "prompt"]
        if not specs:
            return []
        proposals = Proposals(context)
        if not self._lm:
            self._free(context, specs, proposals)
        elif context.lm is not None:
            for place in range(min(context.count, self._max_calls)):
                spec = specs[(context.iteration + place) % len(specs)]
                await self._written(context, context.lm, spec, proposals, place)
        return proposals.updates

    # --- frames ----------------------------------------------------------------------------------------------------

    def _free(self, context: ProposeContext, specs: Sequence[ParameterSpec], proposals: Proposals) -> None:
        ranked = [self.free_texts(context, spec, 2 * context.count + len(context.taken) + 4) for spec in specs]
        longest = max(map(len, ranked))
        for place in range(longest):
            for turn in range(len(specs)):
                at = (context.iteration + turn) % len(specs)
                if place < len(ranked[at]):
                    text, why = ranked[at][place]
                    proposals.offer(Update((SetText(specs[at].name, text),), why, self.name))

    def free_texts(self, context: ProposeContext, spec: ParameterSpec, count: int) -> list[tuple[str, str]]:
        """Up to `count` (text, why) for one prompt, best first; legal texts only."""
        pool = self.pool(context, spec)
        seen = observations(context, spec)
        parts = (context.seed, context.iteration, context.parent.hash, spec.name)
        return pool.ranked(seen, count=count, seed_parts=parts)

    def pool(self, context: ProposeContext, spec: ParameterSpec) -> Pool:
        """The frame texts of one prompt; built once for one (parameter, data, parent text, labels)."""
        original = str(spec.default)
        data = describe(context.train)
        space = text_space(context, spec, data, original)
        key = (context.train.id, spec.name, original, space.subject, space.noun, *space.labels)
        base = self._pools.get(key)
        if base is None:
            cues = cue_words(context.train, space.labels)
            base = self._pools[key] = Pool(space, self.templates, cues=cues, key=context.train.id)
        parent_text = str(current_value(context, spec))
        if parent_text == original or parent_text in base or space.fixed:
            return base
        core = text_space(context, spec, data, parent_text).core
        extended = (*key, core)
        if extended not in self._pools:
            cues = cue_words(context.train, space.labels)
            self._pools[extended] = Pool(space, self.templates, cues=cues, key=context.train.id, extra_head=core)
        return self._pools[extended]

    # --- written by a model ----------------------------------------------------------------------------------------

    async def _written(
        self, context: ProposeContext, lm: LM, spec: ParameterSpec, proposals: Proposals, place: int
    ) -> None:
        options = LMOptions(
            temperature=0.8,
            max_tokens=700,
            seed=seed_number("instructions", context.seed, context.iteration, spec.name, place),
            sample=place,
        )
        answer = await ask(lm, self.messages(context, spec, place), options=options, schema=_SCHEMA)
        text = parse_text(answer.reply, "instruction")
        if text is None:
            proposals.drop(self.name, f"{spec.name}: the answer holds no instruction")
            return
        edit = SetText(spec.name, str(spec.project(with_variables(spec, text))))
        proposals.offer(Update((edit,), "written by the optimizer model", self.name))

    def messages(self, context: ProposeContext, spec: ParameterSpec, place: int) -> list[Message]:
        """What the model is asked for proposal number `place`. A pure function of the context."""
        tips = [tip for tip in self.templates["instructions.tips"].text.splitlines() if tip.strip()]
        rng = seeded("tips", context.seed, context.iteration, spec.name)
        rng.shuffle(tips)
        needed = ", ".join("{" + name + "}" for name in spec.variables)
        failing = [case for case in cases_of(context.rollouts, context.graphs, [spec.name]) if case.failed]
        failures = "\n".join(
            f"- {cut('; '.join(f'{headline(k)}: {v}' for k, v in case.rollout.example.inputs.items()), 240)} | "
            f"{cut(case.feedback, 200)}"
            for case in failing[:4]
        )
        fields = {
            "name": spec.name,
            "current": str(current_value(context, spec)),
            "data": describe(context.train).text(),
            "summary": cut(context.program_summary or context.program_name, 1000),
            "past": _past(context, spec) or "(none yet)",
            "failures": failures or "(none seen)",
            "tip": tips[place % len(tips)] if tips else "",
            "variables": f"Keep these placeholders exactly as they are: {needed}." if needed else "",
        }
        system = self.templates["instructions.system"].fill({"objective": context.objective})
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": self.templates["instructions.task"].fill(fields)},
        ]


def observations(context: ProposeContext, spec: ParameterSpec) -> list[Observation]:
    """Every measured text of one prompt; a text proposed together with other edits counts less."""
    found: list[Observation] = []
    for past in context.history:
        score = measured(past)
        text = next((e.text for e in past.update.edits if isinstance(e, SetText) and e.name == spec.name), None)
        if text is None or score is None:
            continue
        variance = _VALIDATION_VARIANCE if past.validation is not None else _SCREEN_VARIANCE
        found.append(Observation(text, score, variance * (1 if len(past.update.edits) == 1 else 4)))
    return found


def _past(context: ProposeContext, spec: ParameterSpec) -> str:
    best = sorted(observations(context, spec), key=lambda seen: (-seen.score, seen.text))
    return "\n".join(f"- score {seen.score:.2f}: {cut(seen.text, 300)}" for seen in best[:6])
