"""Proposals that cross to a worker: the context survives JSON, and the answer is the one that is given here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

import agentopt.graph as graph
from agentopt.evaluation import Dataset, Example, load_program
from agentopt.graph import IllegalEdit
from agentopt.models import FunctionLM, LMError, LMUnavailable, ModelsConfig, lm
from agentopt.optimizers import ProposeContext, Update, resolve_optimizer
from agentopt.search import Budget, TuneOptions, _remote, tune_program

pytestmark = pytest.mark.anyio


class InProcess:
    """An executor whose only worker is this process; what crosses is JSON text."""

    workers = 1

    async def run(self, job: Any, keep: Any) -> Any:
        raise NotImplementedError

    async def call(self, function: str, payload: Any) -> Any:
        assert function == "agentopt.search._remote:propose"
        crossed: Mapping[str, Any] = json.loads(json.dumps(payload))
        return json.loads(json.dumps(await _remote.propose(crossed)))


class Both:
    """Asks here and there, and lets the run go on with what came from there."""

    name = "both"

    def __init__(self, spec: str) -> None:
        self.here = resolve_optimizer(spec)
        self.there = _remote.RemoteOptimizer(spec, None, self.here, InProcess())
        self.asked = self.proposed = 0

    async def propose(self, context: ProposeContext) -> list[Update]:
        answer = self.here.propose(context)
        here = answer if isinstance(answer, list) else await answer
        dropped, context.dropped[:] = list(context.dropped), []
        there = await self.there.propose(context)
        assert there == here
        assert context.dropped == dropped
        self.asked += 1
        self.proposed += len(there)
        return there


def data(name: str, count: int) -> Dataset:
    rows = (Example(inputs={"text": f"{name} {i}"}, expected="yes" if i % 2 else "no") for i in range(count))
    return Dataset(name, rows)


def writer(request: Any) -> str:
    """An optimizer's model: sometimes legal, sometimes junk."""
    text = str(request.messages[-1]["content"])
    if len(text) % 3 == 0:
        return "I would rather not."
    value = f"Answer yes or no, carefully ({len(text)}): {{text}}"
    return json.dumps({"reasoning": "more care", "suggestion": [{"name": "rp.instruction", "value": value}]})


@pytest.mark.parametrize("spec", ["auto", "optoprime", "demonstrations+instructions", "values"])
async def test_what_comes_back_is_what_the_optimizer_says_here(spec: str) -> None:
    instruction = graph.prompt("Say yes or no: {text}", name="rp.instruction")
    examples = graph.demos(name="rp.examples", max_items=3)
    level = graph.number(0.0, 1.0, name="rp.level", default=0.5)

    @graph.agent
    async def program(text: str) -> str:
        reply = await lm("agent").complete(user=instruction.format(text=text), demos=examples)
        return reply.text if level.value < 0.9 else "yes"

    optimizer = Both(spec)
    await tune_program(
        load_program(program),
        data("train", 16),
        data("validation", 12),
        None,
        "exact_match",
        optimizer=optimizer,
        budget=Budget(rollouts=200),
        models=ModelsConfig(
            {
                "agent": FunctionLM(lambda request: "yes" if len(str(request.messages)) % 2 else "no", name="a"),
                "optimizer": FunctionLM(writer, name="w"),
            }
        ),
        options=TuneOptions(screen_size=8, patience=3),
    )
    assert optimizer.asked >= 1 and optimizer.proposed >= 1


async def test_failures_cross_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        name = "failing"

        def __init__(self, error: Exception) -> None:
            self.error = error

        def propose(self, context: ProposeContext) -> list[Update]:
            raise self.error

    instruction = graph.prompt("Say {text}", name="rp.failing")
    context = ProposeContext("p", graph.Candidate({}), {"rp.failing": instruction.spec}, data("train", 2))
    for error, kind in ((LMUnavailable("gone", retryable=True), LMError), (IllegalEdit(()), IllegalEdit)):
        failing = Failing(error)
        monkeypatch.setattr(_remote, "_optimizer", lambda spec, template, failing=failing: failing)
        with pytest.raises(kind) as caught:
            await _remote.RemoteOptimizer("values", None, failing, InProcess()).propose(context)
        assert str(caught.value) == str(error)
        assert getattr(caught.value, "retryable", True)
