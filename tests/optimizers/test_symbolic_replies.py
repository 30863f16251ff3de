"""Wild answers: whatever a model sends, reading it never raises and never makes an illegal update."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.graph import Candidate, apply_edits, declared_parameters, parameter_scope
from agentopt.optimizers import ProposeContext, Symbolic, SymbolicOptions
from agentopt.optimizers.symbolic._work import fields_of, words_of
from tests.optimizers.symbolic_model import Model
from tests.optimizers.test_symbolic_gradients import run

NAMES = [
    "analysis", "text", "rules", "add", "drop", "rewrite", "merge", "id", "ids", "operation", "operations", "node",
    "to", "after", "task", "route", "route_cases", "max_visits", "tool", "name", "description", "parameters", "source",
    "examples", "args", "expected", "delete", "change", "comments", "suggestion",
]  # fmt: skip
WORDS = [
    "", "p1", "p2", "add_node", "set_edges", "delete_node", "set_route", "create", "edit_code", "delete", "write",
    "end", "Write {topic}.", "def add(a): pass", "{", "next", "llm", "field", "add", "improve_description",
]  # fmt: skip
ATOMS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(WORDS) | st.text(max_size=8)
DATA = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6)
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), DATA, max_size=10)


def everything() -> tuple[Any, Any]:
    """A program with every kind of parameter, and its rollouts."""

    def add(a: int) -> int:
        """Adds."""
        return a

    parts = ao.components(name="parts", task="Do {topic}.", principles=["One.", "Two."])
    box = ao.toolbox([add], name="box")
    flow = ao.Pipeline({"nodes": {"write": "Write {topic}.", "check": "Check {write}."}}, name="flow")

    @ao.agent
    def program(topic: str) -> str:
        box.call("add", {"a": 1})
        return f"{parts.format(topic=topic)} {len(flow.value)}"

    specs = {name: spec.unfrozen() for name, spec in declared_parameters().items()}
    return specs, [run(program, {"topic": "sea"})]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(replies=st.lists(OBJECTS, min_size=1, max_size=4), cut=st.integers(0, 40))
@pytest.mark.anyio
async def test_wild_answers_make_no_illegal_update(replies: list[dict[str, Any]], cut: int) -> None:
    with parameter_scope():
        specs, rollouts = everything()
        texts = [json.dumps(reply)[: -cut or None] for reply in replies]
        count = 0

        def reply(_: Any) -> str:
            nonlocal count
            count += 1
            return texts[count % len(texts)]

        keys = ("operation", "change", "operations", "name", "parameters", "source", "delete", "merge", "rules", "text")
        lm: Any = Model(dict.fromkeys((*keys, "drop"), reply))
        parent = Candidate({name: spec.default for name, spec in specs.items()})
        train = ao.Dataset("train", [rollout.example for rollout in rollouts])
        context = ProposeContext("program", parent, specs, train, rollouts, lm=lm, count=2)
        for update in await Symbolic(SymbolicOptions(max_calls=24)).propose(context):
            apply_edits(parent, update.edits, specs)


@given(DATA | st.text(max_size=60))
def test_reading_never_raises(reply: Any) -> None:
    for given_reply in (reply, json.dumps(reply)):
        found = fields_of(given_reply, ["text", "analysis"])
        assert found is None or "text" in found or "analysis" in found
        assert isinstance(words_of(given_reply, "comments"), str)
