"""A task whose optimum is known: an agent that solves an example only when its instruction states the rule it needs.

`RulesTask` is the program, its data and its metric; `run` tunes it through the public `tune`. `perfect_reply` plays an
optimizer's model that always finds the rules (from the feedback, or from what kind of item an example is about) and
answers in whatever form it is asked; `garbage_lm` and `leaking_lm` play the bad ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import agentopt as ao
from agentopt.evaluation import (
    Dataset,
    EvaluationOptions,
    Evaluator,
    Example,
    Rollout,
    load_program,
    resolve_metric,
)
from agentopt.graph import ParameterSpec, declared_parameters
from agentopt.models import FunctionLM, ModelsConfig, OracleLM, Request, use
from agentopt.optimizers import ProposeContext

BASE = "Process the item."
RULES = (
    "Rule 1: answer in Latin letters.",
    "Rule 2: name the colour first.",
    "Rule 3: round down to tens.",
    "Rule 4: use the short form.",
    "Rule 5: leave out the unit.",
    "Rule 6: prefer the newer entry.",
    "Rule 7: sort by weight.",
    "Rule 8: close with the code.",
)
_PLACES = ("harbour", "station", "market", "museum", "garden", "library", "stadium", "theatre")
_RULE = re.compile(r"Rule (\d+)\b")
_KIND = re.compile(r"\bkind (\d+)\b")


@dataclass
class RulesTask:
    """A program with the prompt `rules.instruction`, and data that needs `k` (up to 8) rules.

    With `demos=True` there is also `rules.examples`, and a demonstration of the right kind of item does what stating
    its rule does. Scores are 0 or 1; the feedback of a wrong answer names the rule.
    """

    k: int = 4
    rows: int = 24
    demos: bool = False
    base: str = BASE
    scorer: Callable[[Any, Any, Example], Any] | None = None
    """Another metric, for tests that swap the program."""
    calls: list[Request] = field(default_factory=list[Request])
    """What the agent's model was asked."""

    def __post_init__(self) -> None:
        self.instruction = ao.prompt(self.base, name="rules.instruction")
        self.examples = ao.demos(name="rules.examples", max_items=8) if self.demos else None
        self.program: Callable[..., Any]
        self.train = self.data("train", self.rows, 0)
        self.validation = self.data("validation", self.rows, 1)
        self.test = self.data("test", 40, 2)

        @ao.agent
        async def answer_item(question: str) -> str:
            """Answers a question about one item."""
            given: dict[str, Any] = {} if self.examples is None else {"demos": self.examples}
            reply = await ao.lm("agent").complete(system=self.instruction, user=question, **given)
            return reply.text

        self.program = answer_item

    def data(self, name: str, count: int, split: int) -> Dataset:
        """`count` rows; every rule is needed equally often, every question and answer is unlike all others."""
        rows: list[Example] = []
        for number in range(count):
            kind = number % self.k + 1
            serial = split * 1000 + number
            place = _PLACES[serial * 7 % 8]
            question = f"Parcel {serial} of kind {kind} waits near the old {place} gate with tag T{serial}"
            rows.append(Example("", {"question": question}, _answer(serial, kind)))
        return Dataset(name, rows)

    def agent(self, request: Request) -> str:
        """The agent's model: the right answer if the rule is stated (or shown), else a wrong one."""
        self.calls.append(request)
        system = "\n".join(str(turn["content"]) for turn in request.messages if turn["role"] == "system")
        earlier = "\n".join(str(turn["content"]) for turn in request.messages[:-1] if turn["role"] == "user")
        question = str(request.messages[-1]["content"])
        found = _KIND.search(question)
        serial = re.search(r"Parcel (\d+)", question)
        if found is None or serial is None:
            return "unknown"
        kind = int(found.group(1))
        shown = self.demos and str(kind) in _KIND.findall(earlier)
        return _answer(int(serial.group(1)), kind) if shown or RULES[kind - 1] in system else f"unsure {serial[1]}"

    def metric(self, output: Any, expected: Any, example: Example) -> float | tuple[float, str]:
        """1 for the right answer; else 0 and the rule that was not followed."""
        if self.scorer is not None:
            return self.scorer(output, expected, example)
        if output == expected:
            return 1.0, "Right."
        found = _KIND.search(str(example.inputs["question"]))
        return 0.0, f"This rule was not followed: {RULES[int(found.group(1)) - 1]}" if found else "Wrong."

    @property
    def optimum(self) -> str:
        """An instruction that solves everything."""
        return improved(self.base, set(range(1, self.k + 1)))

    async def score(self, candidate: ao.Candidate) -> float:
        """The mean score on the test rows, without any optimizer."""
        models = {"agent": FunctionLM(self.agent)}
        found = await ao.aevaluate(
            self.program, self.test, self.metric, candidate=candidate, models=models, store=":memory:"
        )
        return found.mean


def _answer(serial: int, kind: int) -> str:
    return f"code {serial * 7919 % 9973} for {_PLACES[(serial + kind) % 8]} lane {serial} under seal {kind}"


def improved(text: str, rules: set[int]) -> str:
    """`text` with these rules stated, each once."""
    lines = [RULES[number - 1] for number in sorted(rules) if RULES[number - 1] not in text]
    return "\n".join([text.strip(), *lines])


def equal(output: Any, expected: Any, example: Example) -> float:
    """1 for the expected output, else 0; says nothing more."""
    return float(output == expected)


def said(request: Request) -> str:
    """Everything a request says, as one text."""
    return "\n".join(str(turn["content"]) for turn in request.messages)


def rules_in(request: Request) -> set[int]:
    """Numbers of the rules that a request names, or needs for the kinds of item it shows."""
    text = said(request)
    found = {int(number) for number in (*_RULE.findall(text), *_KIND.findall(text))}
    return {number for number in found if 1 <= number <= len(RULES)}


def in_form(request: Request, text: str) -> str:
    """`text` in the form that a request asks for: by its schema, else in a fenced block."""
    if request.schema is None:
        return f"```\n{text}\n```"
    return json.dumps(_filled(request.schema, text))


def _filled(schema: dict[str, Any], text: str) -> Any:
    if schema.get("enum"):
        return next((name for name in schema["enum"] if name == "rules.instruction"), schema["enum"][0])
    match schema.get("type"):
        case "object":
            return {name: _filled(part, text) for name, part in schema.get("properties", {}).items()}
        case "array":
            return [_filled(schema.get("items", {}), text)]
        case "number" | "integer":
            return 1
        case "boolean":
            return True
        case _:
            return text


def perfect_reply(request: Request) -> str:
    """The best answer there is: the instruction with every rule that the request lets one know."""
    return in_form(request, improved(BASE, rules_in(request)))


def perfect_lm(answer: Callable[[Request], str] = perfect_reply) -> OracleLM:
    """An optimizer's model that is always right."""
    return OracleLM(answer)


def garbage_lm(answer: Callable[[Request], str] = perfect_reply, *, seed: int = 0) -> OracleLM:
    """An optimizer's model that never answers rightly: random text, nothing, cut answers, refusals."""
    return OracleLM(answer, quality=0.0, seed=seed, name="garbage")


def leaking_lm(task: RulesTask) -> OracleLM:
    """An optimizer's model that copies training rows, answers included, into what it writes."""
    copied = "\n".join(f"{row.inputs['question']} -> {row.expected}" for row in task.train)

    def answer(request: Request) -> str:
        return in_form(request, improved(BASE, rules_in(request)) + "\nKnown cases:\n" + copied)

    return OracleLM(answer, name="leaking")


def leaks(task: RulesTask, candidate: ao.Candidate) -> bool:
    """Whether a candidate's instruction holds a training question or answer."""
    text = str(candidate.get("rules.instruction", ""))
    return any(str(row.inputs["question"]) in text or str(row.expected) in text for row in task.train)


async def run(
    task: RulesTask,
    optimizer: Any,
    lm: Any,
    *,
    driver: Any = "auto",
    rollouts: int = 800,
    seed: int = 0,
    options: ao.TuneOptions | None = None,
    on_event: Callable[[Any], None] | None = None,
) -> ao.TuneResult:
    """Tune `task` through the public `tune`, in a store in memory."""
    return await ao.atune(
        task.program,
        train=task.train,
        val=task.validation,
        test=task.test,
        metric=task.metric,
        optimizer=optimizer,
        driver=driver,
        budget=ao.Budget(rollouts=rollouts),
        seed=seed,
        # A model that only ever leaks ends a run by `max_failures`; here it must end by itself, with a result.
        options=options or ao.TuneOptions(screen_size=8, max_failures=50),
        models={"agent": FunctionLM(task.agent), "optimizer": lm},
        store=":memory:",
        on_event=on_event,
    )


async def rollouts(task: RulesTask, candidate: ao.Candidate | None = None, *, count: int = 8) -> list[Rollout]:
    """Recorded rollouts of a candidate (the declared values without one) on the first training rows."""
    evaluator = Evaluator(load_program(task.program), resolve_metric(task.metric), EvaluationOptions(keep_traces="all"))
    with use(ModelsConfig({"agent": FunctionLM(task.agent)})):
        ids = [row.id for row in task.train.examples[:count]]
        result = await evaluator.evaluate(candidate or baseline(task), task.train, ids=ids)
    return list(result.rollouts)


def baseline(task: RulesTask) -> ao.Candidate:
    """The declared values."""
    return ao.Candidate({name: spec.default for name, spec in specs(task).items()})


def specs(task: RulesTask) -> dict[str, ParameterSpec]:
    """The task's parameters."""
    return {name: spec for name, spec in declared_parameters().items() if name.startswith("rules.")}


async def context(task: RulesTask, lm: Any = None, *, count: int = 1, batch: int = 8, **changes: Any) -> ProposeContext:
    """What an optimizer is given in one iteration: the parent's recorded rollouts on the first `batch` rows."""
    parent = changes.pop("parent", None) or baseline(task)
    fields: dict[str, Any] = {
        "program_name": "rules",
        "parent": parent,
        "specs": specs(task),
        "train": task.train,
        "rollouts": await rollouts(task, parent, count=batch),
        "lm": lm,
        "count": count,
        "metric_name": "metric",
        **changes,
    }
    return ProposeContext(**fields)
