from __future__ import annotations

import json
from typing import Any

import pytest

from agentopt import graph
from agentopt.evaluation import Dataset, Example
from agentopt.graph import SetText, apply_edits
from agentopt.models import LM
from agentopt.optimizers import Instructions, PastProposal, Update
from agentopt.optimizers._data import cue_words, describe
from agentopt.optimizers._space import noun_of, split_placeholders, subject_of

FREE = Instructions(lm=False)


def text_of(update: Update) -> str:
    [edit] = update.edits
    assert isinstance(edit, SetText)
    return edit.text


@pytest.mark.anyio
async def test_frames_without_a_model_name_the_labels_the_subject_and_keep_variables(make: Any) -> None:
    world = make.classifier(variables=True)
    context = world.context(count=40)
    updates = await FREE.propose(context)
    texts = [text_of(update) for update in updates]
    assert len(set(texts)) == 40
    assert all("{ticket}" in text for text in texts)
    assert any("support ticket" in text and all(label in text for label in ("billing", "shipping")) for text in texts)
    for update in updates:
        child = apply_edits(context.parent, update.edits, context.specs)
        assert "{" not in str(child.get("toy.instruction")).format(ticket="T")


@pytest.mark.anyio
async def test_frames_alone_improve_the_toy_program(make: Any) -> None:
    world = make.classifier()
    context = world.context(count=20)
    children = [apply_edits(context.parent, update.edits, context.specs) for update in await FREE.propose(context)]
    assert max(map(world.score, children)) == 1.0


@pytest.mark.anyio
async def test_the_pool_is_large_and_the_order_depends_on_the_seed_alone(make: Any) -> None:
    world = make.classifier()
    first = [text_of(u) for u in await FREE.propose(world.context(count=30))]
    again = [text_of(u) for u in await Instructions(lm=False).propose(world.context(count=30))]
    other = [text_of(u) for u in await FREE.propose(world.context(count=30, seed=1))]
    assert first == again
    assert first != other
    assert len(FREE.pool(world.context(), world.specs["toy.instruction"])) > 500


@pytest.mark.anyio
async def test_what_scored_well_is_crossed_with_other_parts(make: Any) -> None:
    world = make.classifier()
    context = world.context(count=30)
    updates = await FREE.propose(context)
    marker = "Label the support ticket with one of these"
    history: list[PastProposal] = []
    for place, update in enumerate(updates):
        child = apply_edits(context.parent, update.edits, context.specs)
        good = marker in text_of(update)
        history.append(PastProposal(child.hash, context.parent.hash, update, 0.9 if good else 0.3, accepted=good))
        if place == 0:
            text = marker + ": shipping, technical, billing."
            crossed = Update((SetText("toy.instruction", text),), "", "instructions-free")
            history.append(PastProposal("other", context.parent.hash, crossed, 0.95, 0.95, True))
    after = [text_of(update) for update in await FREE.propose(world.context(count=15, history=history, iteration=1))]
    assert sum(marker in text for text in after) > 7
    assert len(set(after)) == 15


@pytest.mark.anyio
async def test_a_parent_from_elsewhere_is_built_on(make: Any) -> None:
    world = make.classifier()
    parent = world.baseline.with_values({"toy.instruction": "Route each ticket like a seasoned clerk."})
    texts = [text_of(u) for u in await FREE.propose(world.context(parent, count=40))]
    assert any(text.startswith("Route each ticket like a seasoned clerk.") for text in texts)


def test_free_form_answers_get_free_form_frames(make: Any) -> None:
    graph.prompt("Solve the problem.", name="math.prompt")
    specs = dict(graph.declared_parameters())
    train = Dataset("t", [Example("", {"question": f"What is {n} plus 1?"}, str(n + 1)) for n in range(40)])
    context = make.classifier().context(specs=specs, train=train, rollouts=(), count=12)
    texts = [text for text, _ in FREE.free_texts(context, specs["math.prompt"], 12)]
    assert describe(train).answer == "number"
    assert all("Solve the problem." in text for text in texts)
    assert any("number" in text for text in texts)


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("Classify it.", (), ("Classify it.", "", False)),
        ("Classify it.\n\nTicket: {t}", ("t",), ("Classify it.", "Ticket: {t}", False)),
        ("Classify the ticket: {t}", ("t",), ("Classify the ticket.", "T: {t}", False)),
        ("Classify.\n<ticket>\n{t}\n</ticket>", ("t",), ("Classify.\n<ticket>\n{t}\n</ticket>", "", True)),
        ("Is it good or bad?\nText: {t}\nLabel:", ("t",), ("Is it good or bad?", "Text: {t}\nLabel:", False)),
        ("Put {t} into {lang}, please.", ("t", "lang"), ("Put {t} into {lang}, please.", "", True)),
        ("{t}", ("t",), ("", "{t}", False)),
    ],
)
def test_placeholder_lines_are_told_from_instructions(text: str, variables: tuple[str, ...], expected: Any) -> None:
    assert split_placeholders(text, variables) == expected


def test_a_text_that_begins_the_answer_gets_other_beginnings(make: Any) -> None:
    world = make.classifier()
    graph.prompt("", name="toy.cue")
    world.specs = {"toy.cue": graph.declared_parameters()["toy.cue"], **world.specs}
    texts = [text for text, _ in FREE.free_texts(world.context(count=8), world.specs["toy.cue"], 8)]
    assert {"Label:", "Queue:", "Category:"} <= set(texts)
    assert all(len(text.split()) < 8 for text in texts)


@pytest.mark.parametrize(
    ("text", "labels", "subject", "noun"),
    [
        ("Is the movie review positive or negative?", ("positive", "negative"), "movie review", "sentiment"),
        ("What type of question is this?", ("entity", "number"), "question", "type"),
        ("Classify the sentiment of the following tweet.", ("pos", "neg"), "tweet", "sentiment"),
        ("Sort it.", ("a", "b"), "question", "category"),
    ],
)
def test_subject_and_noun_come_from_the_original_text(text: str, labels: Any, subject: str, noun: str) -> None:
    assert subject_of(text, labels, ["question"]) == subject
    assert noun_of(text, labels) == noun


def test_cue_words_are_single_words_that_speak_for_their_label(make: Any) -> None:
    train = make.classifier().train
    cues = cue_words(train, ("billing", "shipping", "technical"))
    assert cues == {"billing": ("invoice",), "shipping": ("parcel",), "technical": ("crash",)}


def test_the_description_counts_labels_and_json_fields() -> None:
    rows = [Example("", {"q": f"text {n}"}, {"queue": "a" if n % 2 else "b", "note": f"free {n}"}) for n in range(20)]
    data = describe(Dataset("t", rows))
    assert data.answer == "json"
    assert data.fields == {"queue": ("a", "b"), "note": ()}
    assert "queue: one of a, b" in data.text()
    assert describe(Dataset("t", [Example("", {"q": f"{n}"}, f"free text {n}") for n in range(20)])).answer == "text"
    assert describe(Dataset("t", [Example("", {"q": "x"})])).answer == "none"


@pytest.mark.anyio
async def test_a_written_instruction_is_grounded_and_gets_its_lost_placeholder_back(make: Any) -> None:
    world = make.classifier(variables=True)
    client = make.client(lambda _: json.dumps({"instruction": "Choose billing, shipping or technical."}))
    world.lm = LM(client)
    context = world.context(program_summary="Sorts tickets.", history=(
        PastProposal("h", "p", Update((SetText("toy.instruction", "An older text {ticket}"),)), 0.25),
    ))  # fmt: skip
    [update] = await Instructions().propose(context)
    assert text_of(update) == "Choose billing, shipping or technical.\n\nTicket: {ticket}"
    asked = str(client.requests[0].messages[-1]["content"])
    for fact in ("Sorts tickets.", "billing (12)", "score 0.25: An older text", "{ticket}", "Expected 'shipping'"):
        assert fact in asked


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reply", ["", "I'm sorry, no.", "{", "1 2 3", '{"instruction": null}', '{"instruction": "{other}"}']
)
async def test_D12_garbage_instructions_are_dropped_or_legal(make: Any, reply: str) -> None:
    world = make.classifier(variables=True)
    world.lm = LM(make.client(lambda _: reply))
    context = world.context(count=3)
    for update in await Instructions().propose(context):
        assert apply_edits(context.parent, update.edits, context.specs).hash != context.parent.hash
