from __future__ import annotations

from collections import Counter
from typing import Any

from agentopt.evaluation import Dataset, Example
from agentopt.graph import SetDemos, apply_edits
from agentopt.models import Request
from agentopt.optimizers import Demonstrations, PastProposal, Update
from agentopt.optimizers._data import describe
from agentopt.optimizers._demonstrations import fill_form, form_of


def sets(updates: list[Update]) -> list[list[dict[str, str]]]:
    found: list[list[dict[str, str]]] = []
    for update in updates:
        [edit] = update.edits
        assert isinstance(edit, SetDemos)
        found.append([dict(item) for item in edit.items])
    return found


def label_in_demos(request: Request) -> str:
    """A model that learns nothing from its instruction, and everything from demonstrations."""
    pairs: dict[str, str] = {}
    for place, message in enumerate(request.messages[:-1]):
        if message["role"] == "user":
            word = str(message["content"]).split()[-2]
            pairs[word] = str(request.messages[place + 1]["content"])
    return pairs.get(str(request.messages[-1]["content"]).split()[-2], "billing")


def test_sets_are_balanced_over_labels_of_several_sizes_and_only_from_train(make: Any) -> None:
    world = make.classifier(demos=True)
    context = world.context(count=12)
    proposed = sets(Demonstrations().propose(context))
    ids = {example.id: example for example in world.train}
    assert len(proposed) == 12
    assert len({str(items) for items in proposed}) == 12
    assert {len(items) for items in proposed} == {3, 6}
    for items in proposed:
        counts = Counter(item["output"] for item in items)
        assert max(counts.values()) == min(counts.values())
        for item in items:
            example = ids[item["source"]]
            assert item["input"] == f"Ticket: {example.inputs['ticket']}"
            assert item["output"] == example.expected


def test_a_set_improves_a_program_that_learns_from_examples(make: Any) -> None:
    world = make.classifier(demos=True, answer=label_in_demos)
    context = world.context(count=4)
    children = [
        apply_edits(context.parent, update.edits, context.specs) for update in Demonstrations().propose(context)
    ]
    assert world.score(world.baseline) < 0.4
    assert max(map(world.score, children)) == 1.0


def test_demos_never_come_from_rollouts_of_other_splits(make: Any) -> None:
    world = make.classifier(demos=True)
    held_out = Dataset(
        "test", [Example("", {"ticket": f"secret {n} about my invoice now"}, "billing") for n in range(9)]
    )
    world_rollouts = world.rollouts(world.baseline, list(held_out))
    proposed = sets(Demonstrations().propose(world.context(rollouts=world_rollouts, count=8)))
    known = {example.id for example in world.train}
    assert proposed
    for items in proposed:
        for item in items:
            assert item["source"] in known
            assert "secret" not in item["input"]


def test_only_successes_are_bootstrapped_when_replies_are_not_labels(make: Any) -> None:
    from agentopt import graph
    from agentopt.models import LM

    lm = LM(make.client(lambda request: "right" if "parcel" in str(request.messages[-1]["content"]) else "wrong"))
    examples = graph.demos(name="free.examples", max_items=4)

    @graph.agent
    def program(ticket: str) -> str:
        return "shipping" if lm.complete_sync(user=ticket, demos=examples).text == "right" else "other"

    world = make.classifier()
    world.program = program
    world.specs = {"free.examples": graph.declared_parameters()["free.examples"]}
    proposed = sets(Demonstrations().propose(world.context(count=6)))
    assert proposed
    for items in proposed:
        assert all(item["output"] == "right" and "parcel" in item["input"] for item in items)


def test_without_any_usable_rollout_nothing_is_proposed_for_free_text(make: Any) -> None:
    world = make.classifier(demos=True)
    rows = [Example("", {"ticket": f"t{n}", "channel": "web"}, f"answer {n}") for n in range(10)]
    assert Demonstrations().propose(world.context(train=Dataset("t", rows), rollouts=())) == []


def test_a_parent_with_demos_gets_small_changes_too_and_the_limit_holds(make: Any) -> None:
    world = make.classifier(demos=True)
    first = Demonstrations().propose(world.context())[0]
    parent = apply_edits(world.baseline, first.edits, world.specs)
    context = world.context(parent, count=20, iteration=3)
    updates = Demonstrations().propose(context)
    assert len(updates) == 20
    assert any("swaps" in update.rationale for update in updates)
    assert all(len(items) <= 6 for items in sets(updates))


def test_sizes_that_scored_well_are_drawn_more_often(make: Any) -> None:
    world = make.classifier(demos=True)
    history: list[PastProposal] = []
    for place, update in enumerate(Demonstrations().propose(world.context(count=16))):
        [edit] = update.edits
        assert isinstance(edit, SetDemos)
        good = len(edit.items) == 3
        history.append(PastProposal(f"h{place}", "p", update, 0.9 if good else 0.2))
    later = sets(Demonstrations().propose(world.context(count=12, history=history, iteration=1)))
    assert Counter(map(len, later))[3] > 9


def test_proposals_are_the_same_for_the_same_context(make: Any) -> None:
    world = make.classifier(demos=True)
    assert Demonstrations().propose(world.context(count=5)) == Demonstrations().propose(world.context(count=5))


def test_the_form_of_messages_is_read_off_and_refused_when_it_varies() -> None:
    data = describe(Dataset("t", [Example("", {"a": "one thing", "b": "web"}, "x")]))
    one = ("From web\nTicket: one thing\nQueue:", {"a": "one thing", "b": "web"})
    two = ("From mail\nTicket: other words\nQueue:", {"a": "other words", "b": "mail"})
    form = form_of([one, two], data)
    assert form is not None
    assert fill_form(form, {"a": "A", "b": "B"}) == "From B\nTicket: A\nQueue:"
    assert fill_form(form, {"a": "A"}) is None
    assert form_of([one, ("Something else: other words", two[1])], data) is None
    assert form_of([("no field in it", one[1])], data) is None
