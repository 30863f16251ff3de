from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt import graph
from agentopt.graph import (
    AddPrinciple,
    Candidate,
    CountPrinciples,
    DropPrinciple,
    MergePrinciples,
    RewritePrinciple,
    apply_edits,
)
from agentopt.models import FunctionLM, OracleLM, Request
from agentopt.optimizers import PastProposal, Playbook, PlaybookOptions, ProposeContext, Update
from agentopt.optimizers._deltas import merge_operations, read_reflection
from tests.optimizers import arena

HARM = "Keep silent when in doubt."
NAME = "rules.book"


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield


class Book(arena.RulesTask):
    """The arena's task, with its rules in a list of principles; one of them makes the agent say nothing useful."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book = ao.principles(["Stay friendly."], name=NAME)

        @ao.agent
        async def answer_item(question: str) -> str:
            """Answers a question about one item."""
            reply = await ao.lm("agent").complete(system=f"Process the item.\n{self.book}", user=question)
            return reply.text

        self.program = answer_item

    def agent(self, request: Request) -> str:
        return "..." if HARM in arena.said(request) else super().agent(request)


def principled(request: Request) -> str:
    """The optimizer's model: every rule that the feedback names becomes a lesson, and the curator adds it."""
    text = arena.said(request)
    if "You review runs" in text:
        lessons = [arena.RULES[number - 1] for number in sorted(arena.rules_in(request))]
        return json.dumps({"reasoning": "rules are missing", "lessons": lessons, "helpful": [], "harmful": []})
    lessons = re.findall(r"^- (Rule .*)$", text.split("Lessons from the latest runs")[1], re.MULTILINE)
    operations = [{"op": "add", "ids": [], "text": lesson} for lesson in lessons]
    return json.dumps({"reasoning": "", "operations": operations})


def texts(candidate: Candidate) -> list[str]:
    value: Any = candidate.get(NAME, [])
    return [item["text"] for item in value]


@pytest.mark.anyio
async def test_a_perfect_model_reaches_the_optimum() -> None:
    task = Book()
    result = await arena.run(task, "playbook", OracleLM(principled))
    assert (result.claim.status, result.claim.tuned_mean) == ("improved", 1.0)
    assert texts(result.best)[0] == "Stay friendly."
    assert set(arena.RULES[: task.k]) <= set(texts(result.best))


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(3))
async def test_a_garbage_model_never_makes_it_worse(seed: int) -> None:
    task = Book()
    result = await arena.run(task, "playbook", OracleLM(principled, quality=0.0, seed=seed), rollouts=300)
    assert await task.score(result.best) >= await task.score(arena.baseline(task))


@pytest.mark.anyio
async def test_a_leaking_model_is_stopped() -> None:
    task = Book()
    copied = [f"{row.inputs['question']} gives {row.expected}" for row in task.train][:4]

    def leak(request: Request) -> str:
        if "You review runs" in arena.said(request):
            return json.dumps({"reasoning": "", "lessons": copied, "helpful": [], "harmful": []})
        operations = [{"op": "add", "ids": [], "text": text} for text in copied]
        return json.dumps({"reasoning": "", "operations": operations})

    events: list[Any] = []
    result = await arena.run(task, "playbook", OracleLM(leak), rollouts=300, on_event=events.append)
    assert texts(result.best) == ["Stay friendly."]
    assert any(getattr(event, "stage", "") == "leak" for event in events)


@pytest.mark.anyio
async def test_a_principle_that_is_tagged_harmful_is_dropped_by_the_curator() -> None:
    task = Book()
    task.book = ao.principles([*arena.RULES[:4], HARM], name="rules.harm")

    def drops(request: Request) -> str:
        if "You review runs" in arena.said(request):
            return json.dumps({"reasoning": "", "lessons": [], "helpful": ["p1"], "harmful": ["p5"]})
        return json.dumps({"reasoning": "", "operations": [{"op": "drop", "ids": ["p5"], "text": ""}]})

    result = await arena.run(task, "playbook", OracleLM(drops))
    assert result.claim.tuned_mean == 1.0
    kept: Any = result.best.get("rules.harm")
    assert [item["text"] for item in kept] == list(arena.RULES[:4])
    assert kept[0]["helpful"] == 1


# --- contexts --------------------------------------------------------------------------------------------------------


def listed(*items: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [
        {"id": f"p{place}", "text": text, "helpful": good, "harmful": bad}
        for place, (text, good, bad) in enumerate(items, start=1)
    ]


async def context_of(lm: Any, items: Sequence[dict[str, Any]] | None = None, **changes: Any) -> ProposeContext:
    task = Book()
    parent = arena.baseline(task)
    if items is not None:
        value: Any = list(items)
        parent = parent.with_values({NAME: value})
    return await arena.context(task, lm, parent=parent, **changes)


@pytest.mark.anyio
async def test_harmful_principles_are_proposed_for_dropping_without_a_model() -> None:
    items = listed(("Be brief.", 1, 2), ("Answer twice.", 0, 4), ("Say please.", 2, 4), ("Be kind.", 5, 0))
    context = await context_of(None, items, count=4)
    updates = await Playbook().propose(context)
    assert [update.edits for update in updates] == [(DropPrinciple(NAME, "p2"),), (DropPrinciple(NAME, "p3"),)]
    assert "harmful 4 times" in updates[0].rationale
    strict = PlaybookOptions(harm_margin=5)
    assert await Playbook(strict).propose(context) == []


@pytest.mark.anyio
async def test_tags_of_updates_that_were_not_kept_still_count() -> None:
    items = listed(("Be brief.", 0, 1), ("Be kind.", 0, 0))
    context = await context_of(None, items)
    counted = CountPrinciples(NAME, harmful=("p1",))
    past = Update((counted, AddPrinciple(NAME, "Be bold.")))
    other = Update((CountPrinciples(NAME, harmful=("p2",)),))
    history = [
        PastProposal("x", context.parent.hash, past, 0.1),
        PastProposal("y", context.parent.hash, Update((counted, AddPrinciple(NAME, "Be loud."))), 0.1),
        PastProposal("z", "another list", other, 0.1),
        PastProposal("w", "another list", other, 0.1),
    ]
    updates = await Playbook().propose(await context_of(None, items, history=history, count=3))
    assert [update.edits for update in updates] == [(DropPrinciple(NAME, "p1"),)]


@pytest.mark.anyio
async def test_reflector_and_curator_see_the_list_the_runs_and_the_lessons() -> None:
    seen: list[str] = []

    def answer(request: Request) -> str:
        seen.append(arena.said(request))
        return principled(request)

    items = listed(("Stay friendly.", 3, 1))
    context = await context_of(FunctionLM(answer), items)
    [update] = await Playbook().propose(context)
    assert all(isinstance(edit, AddPrinciple) for edit in update.edits)
    reflector, curator = seen
    assert "[p1] Stay friendly." in reflector
    assert "This rule was not followed: Rule 1" in reflector
    assert "Parcel 0 of kind 1" in reflector
    assert "[p1] (+3 -1) Stay friendly." in curator
    assert f"- {arena.RULES[0]}" in curator
    assert "Parcel" not in curator


@pytest.mark.anyio
async def test_several_updates_ask_the_reflector_once_and_are_equal_for_equal_contexts() -> None:
    roles: list[str] = []

    def answer(request: Request) -> str:
        text = arena.said(request)
        roles.append("reflector" if "You review runs" in text else "curator")
        if roles[-1] == "curator":
            number = request.options.sample + 1
            operations = [{"op": "add", "ids": [], "text": arena.RULES[number]}]
            return json.dumps({"reasoning": "", "operations": operations})
        return principled(request)

    found = [await Playbook().propose(await context_of(FunctionLM(answer), count=3)) for _ in range(2)]
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert roles == ["reflector", "curator", "curator", "curator"] * 2


@pytest.mark.anyio
async def test_an_unknown_id_goes_back_and_is_repaired() -> None:
    def answer(request: Request) -> str:
        text = arena.said(request)
        if "You review runs" in text:
            return principled(request)
        named = "p1" if "rewrite names 'p9'" in text else "p9"
        operation = {"op": "rewrite", "ids": [named], "text": "Stay friendly and exact."}
        return json.dumps({"reasoning": "", "operations": [operation]})

    [update] = await Playbook().propose(await context_of(FunctionLM(answer)))
    assert update.edits == (RewritePrinciple(NAME, "p1", "Stay friendly and exact."),)


@pytest.mark.anyio
async def test_a_curator_that_cannot_keep_the_form_leaves_the_lessons_as_they_are() -> None:
    def answer(request: Request) -> str:
        return principled(request) if "You review runs" in arena.said(request) else "I would add them all!"

    context = await context_of(FunctionLM(answer))
    [update] = await Playbook().propose(context)
    assert update.edits == tuple(AddPrinciple(NAME, rule) for rule in arena.RULES[:4])
    assert any("could not be read" in item.problem for item in context.dropped)


@pytest.mark.anyio
async def test_a_curator_that_wants_no_change_is_heeded() -> None:
    def answer(request: Request) -> str:
        lessons = "You review runs" in arena.said(request)
        return principled(request) if lessons else json.dumps({"reasoning": "fine", "operations": []})

    assert await Playbook().propose(await context_of(FunctionLM(answer))) == []


# --- merging ---------------------------------------------------------------------------------------------------------

ITEMS = listed(("Be brief.", 0, 0), ("Cite the source.", 0, 0), ("Round down to tens.", 0, 0), ("Use metres.", 0, 0))


def merged(*operations: Any, most: int = 6) -> list[Any]:
    return merge_operations(ITEMS, operations, NAME, most)[0]


def test_edits_come_in_a_fixed_order_and_doubles_are_left_out() -> None:
    add = {"op": "add", "ids": [], "text": "Name the colour first."}
    edits, left_out, problems = merge_operations(
        ITEMS,
        [
            add,
            {"op": "add", "ids": [], "text": "be brief!"},
            {"op": "add", "ids": [], "text": "Name the  COLOUR first"},
            {"op": "rewrite", "ids": ["p2"], "text": "Cite the source of every number."},
            {"op": "drop", "ids": ["p1"], "text": ""},
            {"op": "drop", "ids": ["p3"], "text": ""},
            {"op": "rewrite", "ids": ["p1"], "text": "Be very brief."},
        ],
        NAME,
        6,
    )
    assert edits == [
        DropPrinciple(NAME, "p1"),
        RewritePrinciple(NAME, "p2", "Cite the source of every number."),
        AddPrinciple(NAME, "Name the colour first."),
    ]
    assert len(left_out) == 4
    assert problems == []


def test_rules_that_differ_in_a_number_only_are_two_rules() -> None:
    edits = merged(
        {"op": "add", "text": "Close with code 1 of the list."}, {"op": "add", "text": "Close with code 2 of the list."}
    )
    assert len(edits) == 2


def test_a_merge_counts_as_one_rule_less() -> None:
    operations = [{"op": "merge", "ids": ["p1", "p2", "p4"], "text": "Be brief, cite, use metres."}]
    assert merged(*operations) == [MergePrinciples(NAME, ("p1", "p2", "p4"), "Be brief, cite, use metres.")]
    assert merged(*operations, {"op": "drop", "ids": ["p3"]}) == merged(*operations)


WORDS = st.sampled_from(["add", "drop", "merge", "rewrite", "p1", "p2", ""])
KEYS = st.sampled_from(["op", "ids", "id", "text", "operations", "lessons", "helpful", "harmful"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | WORDS | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(st.dictionaries(st.sampled_from(["op", "ids", "id", "text"]), JUNK), max_size=8), reply=JUNK)
def test_strange_answers_give_legal_edits_or_none(operations: list[dict[str, Any]], reply: Any) -> None:
    with graph.parameter_scope():
        book = ao.principles([item["text"] for item in ITEMS], name=NAME)
        edits = merge_operations(ITEMS, operations, NAME, 6)[0]
        parent = Candidate({NAME: book.value})
        child = apply_edits(parent, edits, graph.declared_parameters())
        assert len(texts(child)) >= len(ITEMS) // 2
        for answer in (reply, json.dumps(reply)):
            found = read_reflection(answer, ["p1", "p2"])
            assert {*found.helpful, *found.harmful} <= {"p1", "p2"}
            assert not {*found.helpful} & {*found.harmful}
