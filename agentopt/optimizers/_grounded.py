"""Grounded instruction proposal, as in MIPROv2 (arXiv 2406.11695): the writer is told about data, program and module.

The unit is one new instruction for one prompt parameter. What is told: a summary of the training data, a description of
the program and of the part that uses the prompt (all written by the model, once per run), one demonstration set, and a
random tip. Feedback is not used; `Reflection` and `TextGrad` do that.

The summaries are kept in the object. They are functions of the data, the declared program and the model alone, so an
object that has them and one that does not propose the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentopt.errors import UserError
from agentopt.evaluation import seed_number, seeded
from agentopt.graph import SetText
from agentopt.models import LMOptions
from agentopt.optimizers._ask import ask
from agentopt.optimizers._bootstrap import Bootstrap, BootstrapOptions
from agentopt.optimizers._data import describe
from agentopt.optimizers._feedback import cut, shown
from agentopt.optimizers._legal import Proposals, current_value, with_variables
from agentopt.optimizers._optoprime import tidy
from agentopt.optimizers._problem import cases_of, outline
from agentopt.optimizers._protocol import ProposeContext, Update
from agentopt.optimizers._repair import Draft, propose_legal, repair_turns
from agentopt.optimizers._reply import parse_text
from agentopt.optimizers._templates import load_templates

if TYPE_CHECKING:
    from agentopt.evaluation import Example
    from agentopt.graph import ParameterSpec
    from agentopt.models import LM, Message

_SCHEMA = {
    "type": "object",
    "properties": {"instruction": {"type": "string"}},
    "required": ["instruction"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class GroundedOptions:
    """Settings of `Grounded`."""

    batches: int = 3
    """Batches of training examples that the summary of the data is made from."""
    batch_size: int = 10
    demos: int = 3
    """Demonstrations shown to the writer."""
    reply_tokens: int = 1024
    temperature: float = 1.0
    repairs: int = 3

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size", "demos", "reply_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"GroundedOptions: {name} must be at least 1, found {getattr(self, name)!r}.")


class Grounded:
    """Proposes instructions for prompts from what is known about data and program."""

    name = "grounded"

    def __init__(self, options: GroundedOptions | None = None, *, template: str | Path | None = None) -> None:
        """`template` is a file that overrides fragments of the shipped meta-prompts.

        Raises:
            UserError: the template file cannot be used.
        """
        self.options = options or GroundedOptions()
        self.templates = load_templates(None if template is None else Path(template))
        self._demos = Bootstrap(BootstrapOptions(bootstrapped=self.options.demos, labelled=self.options.demos))
        self._told: dict[tuple[str, ...], str] = {}

    async def propose(self, context: ProposeContext) -> list[Update]:
        """Up to `context.count` updates, each of one prompt; prompts take turns.

        Raises:
            LMError: the model could not be reached.
        """
        specs = [spec for spec in context.specs.values() if spec.kind == "prompt"]
        if context.lm is None or not specs:
            return []
        proposals = Proposals(context)
        for place in range(context.count):
            spec = specs[(context.iteration + place) % len(specs)]
            if not proposals.done:
                proposals.take(await self._written(context, context.lm, spec, place))
        return proposals.updates

    async def instructions(self, context: ProposeContext, spec: ParameterSpec, count: int) -> list[str]:
        """Up to `count` different texts for one prompt; the first is always the declared one.

        Raises:
            LMError: the model could not be reached.
        """
        found = [str(spec.default)]
        for place in range(count - 1 if context.lm is not None else 0):
            update = None if context.lm is None else await self._written(context, context.lm, spec, place)
            texts = [] if update is None else [edit.text for edit in update.edits if isinstance(edit, SetText)]
            found.extend(text for text in texts if text not in found)
        return found

    async def _written(self, context: ProposeContext, lm: LM, spec: ParameterSpec, place: int) -> Update | None:
        rng = seeded("grounded", context.seed, context.iteration, context.parent.hash, spec.name, place)
        options = LMOptions(
            temperature=self.options.temperature,
            max_tokens=self.options.reply_tokens,
            seed=rng.getrandbits(31),
            sample=place,
        )
        tips = [line for line in self.templates["grounded.tips"].text.splitlines() if line.strip()]
        tip, _, words = rng.choice(tips).partition(":") if tips else ("none", "", "")
        demo_seed = rng.randint(-1, 3)
        update = await propose_legal(
            context,
            lm,
            await self.messages(context, lm, spec, words.strip(), demo_seed),
            options=options,
            read=lambda reply: _read(spec, current_value(context, spec), reply),
            source=self.name,
            schema=_SCHEMA,
            repairs=self.options.repairs,
            turns=repair_turns(self.templates),
        )
        return None if update is None else Update(update.edits, f"written with the tip {tip.strip()!r}", self.name)

    # --- what the writer is told -----------------------------------------------------------------------------------

    async def messages(
        self, context: ProposeContext, lm: LM, spec: ParameterSpec, tip: str, demo_seed: int
    ) -> list[Message]:
        """The question for one instruction; asks for the summaries first where they are not there yet."""
        demos = self._demos.demo_set(context, spec, demo_seed)[: self.options.demos]
        cases = [case for case in cases_of(context.rollouts, context.graphs, list(context.specs)) if case.graph]
        needed = ", ".join("{" + name + "}" for name in spec.variables)
        fields = {
            "data": await self.data_summary(context, lm),
            "program": await self.program_description(context, lm),
            "module": await self.module_description(context, lm, spec),
            "outline": outline(cases[0]) if cases else "(not recorded)",
            "demos": "\n".join(f"- {cut(demo.input, 500)} -> {cut(demo.output, 300)}" for demo in demos) or "(none)",
            "name": spec.name,
            "current": str(current_value(context, spec)),
            "tip": tip,
            "variables": f"Keep these placeholders exactly as they are: {needed}." if needed else "",
        }
        system = self.templates["grounded.system"].fill({"objective": context.objective}).strip()
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": tidy(self.templates["grounded.task"].fill(fields))},
        ]

    async def data_summary(self, context: ProposeContext, lm: LM) -> str:
        """What the model makes of the training data; asked once for a data set."""
        counted = describe(context.train).text()
        key = ("data", context.train.id, lm.name)
        if key not in self._told:
            rows = list(context.train)
            seeded("grounded-data", context.train.id).shuffle(rows)
            size = self.options.batch_size
            observations: list[str] = []
            for start in range(0, min(len(rows), size * self.options.batches), size):
                batch = rows[start : start + size]
                fields = {
                    "count": str(len(batch)),
                    "examples": "\n".join(f"- {_row(row)}" for row in batch),
                    "observations": "\n".join(observations) or "(nothing yet)",
                }
                said = await self._say(lm, "grounded.observe", fields)
                if said and not said.strip().casefold().startswith("complete"):
                    observations.append(f"- {cut(said, 800)}")
            summary = counted
            if observations:
                fields = {"observations": "\n".join(observations), "counted": counted}
                summary = await self._say(lm, "grounded.summary", fields) or counted
            self._told[key] = cut(summary, 1500)
        return self._told[key]

    async def program_description(self, context: ProposeContext, lm: LM) -> str:
        """What the model makes of the program as it is declared; asked once."""
        about = context.program_summary or "(nothing)"
        specs = {name: spec for name, spec in context.specs.items() if isinstance(spec.default, str)}
        texts = "\n".join(f"- {name}: {cut(str(spec.default), 600)}" for name, spec in specs.items()) or "(none)"
        key = ("program", context.program_name, about, texts, lm.name)
        if key not in self._told:
            fields = {"name": context.program_name, "about": cut(about, 2000), "texts": texts}
            said = await self._say(lm, "grounded.program", fields)
            self._told[key] = cut(said or f"{context.program_name}. {context.program_summary}".strip(), 1200)
        return self._told[key]

    async def module_description(self, context: ProposeContext, lm: LM, spec: ParameterSpec) -> str:
        """What the model makes of the part that uses one prompt; asked once for a prompt."""
        program = await self.program_description(context, lm)
        key = ("module", program, spec.name, str(spec.default), lm.name)
        if key not in self._told:
            fields = {"program": program, "name": spec.name, "text": cut(str(spec.default), 3000)}
            said = await self._say(lm, "grounded.module", fields)
            self._told[key] = cut(said or spec.description or "it is used as an instruction.", 800)
        return self._told[key]

    async def _say(self, lm: LM, fragment: str, fields: dict[str, str]) -> str:
        text = self.templates[fragment].fill(fields)
        options = LMOptions(max_tokens=400, seed=seed_number(fragment, text))
        answer = await ask(lm, [{"role": "user", "content": text}], options=options, schema=None)
        return parse_text(answer.reply, "text", max_chars=8000) or ""


def _row(example: Example) -> str:
    inputs = "; ".join(f"{name}: {cut(_plain(value), 300)}" for name, value in example.inputs.items())
    return inputs if example.expected is None else f"{inputs} -> {cut(_plain(example.expected), 150)}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _read(spec: ParameterSpec, present: Any, reply: Any) -> Draft:
    text = parse_text(reply, "instruction")
    if text is None:
        return Draft(unreadable="it holds no instruction")
    text = with_variables(spec, text)
    try:
        text = str(spec.project(text))
    except (ValueError, TypeError):
        return Draft([SetText(spec.name, text)])
    return Draft([] if text == present else [SetText(spec.name, text)])
