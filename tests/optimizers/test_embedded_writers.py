"""Optimizers that write, with the real embedded model as the writer: junk in, legal edits or recorded drops out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

import agentopt as ao
from agentopt.evaluation import Dataset, EvaluationOptions, Evaluator, Example, load_program, resolve_metric
from agentopt.graph import AddNode, Candidate, apply_edits, declared_parameters
from agentopt.models import LM, ModelsConfig, Reply, Request, connect, use
from agentopt.optimizers import (
    CodeRepair,
    Grounded,
    GroundedOptions,
    Opro,
    OproOptions,
    OptoPrimeMulti,
    OptoPrimeMultiOptions,
    OptoPrimeOptions,
    Playbook,
    PlaybookOptions,
    ProposeContext,
    Reflection,
    ReflectionOptions,
    Symbolic,
    SymbolicOptions,
    TextGrad,
    TextGradOptions,
)
from agentopt.optimizers.symbolic._options import Kind
from agentopt.search import Climb

pytestmark = [pytest.mark.embedded, pytest.mark.anyio]
MODEL = "embedded/smollm2-135m-instruct"
REPLY = 32
ASKED = 5
"""Calls of one conversation with one repair: the form, its repair, plain words, and two repairs at most."""
LABELS = ("positive", "negative")
ROWS = Dataset(
    "train",
    [
        Example("", {"review": "simply wonderful from start to end"}, "positive"),
        Example("", {"review": "a dull mess, far too long"}, "negative"),
        # Not an answer that is offered: there is always a failing case to write about.
        Example("", {"review": "fine music, weak plot"}, "mixed"),
    ],
)


class Brief:
    """The embedded model with short replies; keeps what it was asked."""

    deterministic = True
    own_timeout = True

    def __init__(self) -> None:
        self._client = connect(MODEL)
        self.name = self._client.name
        self.requests: list[Request] = []

    async def send(self, request: Request) -> Reply:
        self.requests.append(request)
        limit = min(REPLY, request.options.max_tokens or REPLY)
        return await self._client.send(replace(request, options=replace(request.options, max_tokens=limit)))

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        yield await self.send(request)

    async def aclose(self) -> None:
        await self._client.aclose()


def prompted() -> Any:
    instruction = ao.prompt("Is the movie review positive or negative?", name="review.instruction")

    @ao.agent
    async def classify(review: str) -> str:
        """Sorts a movie review."""
        return (await ao.lm("agent").complete(system=instruction, user=review, choices=LABELS)).text

    return classify


def principled() -> Any:
    parts = ao.components(
        name="review", task="Is this movie review positive or negative?\n{review}", principles=["Look at the tone."]
    )

    @ao.agent
    async def classify(review: str) -> str:
        """Sorts a movie review."""
        return (await ao.lm("agent").complete(user=parts.format(review=review), choices=LABELS)).text

    return classify


def tooled() -> Any:
    def count_words(text: str) -> str:
        """Counts the words of a text."""
        return str(len(text))

    box = ao.toolbox([count_words], name="review.tools")

    @ao.agent
    async def classify(review: str) -> str:
        """Sorts a movie review by its length."""
        words = await box.acall("count_words", {"text": review})
        return (await ao.lm("agent").complete(user=f"{review} ({words} words)", choices=LABELS)).text

    return classify


def piped() -> Any:
    return ao.Pipeline(
        {"nodes": {"gist": "Say in a few words: {review}", "judge": "Positive or negative? {gist}"}}, name="review"
    )


def coded() -> Any:
    @ao.bundle(trainable=True)
    def tone(review: str) -> str:
        """Whether a movie review is positive or negative."""
        return "positive" if "good" in review else "negative"

    @ao.agent
    def classify(review: str) -> str:
        """Sorts a movie review."""
        found: Any = tone(review)
        return getattr(found, "value", found)

    return classify


async def recorded(program: Any, writer: Brief) -> ProposeContext:
    """The program's real runs on three rows, one of which always fails."""
    specs = {name: spec.unfrozen() for name, spec in declared_parameters().items()}
    parent = Candidate({name: spec.default for name, spec in specs.items()})
    evaluator = Evaluator(load_program(program), resolve_metric("exact_match"), EvaluationOptions(keep_traces="all"))
    with use(ModelsConfig({"agent": Brief()})):
        rollouts = list((await evaluator.evaluate(parent, ROWS)).rollouts)
    assert all(rollout.row.error is None for rollout in rollouts)
    return ProposeContext(
        "reviews", parent, specs, ROWS, rollouts, lm=LM(writer), optimizer_model=MODEL, metric_name="exact_match"
    )


def symbolic(kind: Kind, *, loss: Literal["lm", "metric"] = "metric", max_calls: int = 4) -> Symbolic:
    options = SymbolicOptions(
        kinds=(kind,),
        loss=loss,
        cases=1,
        visits=1,
        max_calls=max_calls,
        questions=1,
        repairs=1,
        reply_tokens=REPLY,
        text_chars=200,
    )
    return Symbolic(options)


@dataclass
class Writer:
    optimizer: Any
    program: Callable[[], Any]
    calls: int


_SMALL = OptoPrimeOptions(problem_tokens=200, reply_tokens=REPLY, repairs=1)
WRITERS: dict[str, Callable[[], Writer]] = {
    # A question within its limit is repaired once by the `LM` itself: at most two calls each.
    "symbolic-prompt": lambda: Writer(symbolic("prompt", loss="lm", max_calls=6), principled, 12),
    "symbolic-tool": lambda: Writer(symbolic("tool"), tooled, 8),
    "symbolic-pipeline": lambda: Writer(symbolic("pipeline"), piped, 8),
    "textgrad": lambda: Writer(
        TextGrad(TextGradOptions(max_calls=3, cases=1, gradient_tokens=REPLY, reply_tokens=REPLY, repairs=1)),
        prompted,
        2 + ASKED,
    ),
    "opro": lambda: Writer(Opro(OproOptions(history_tokens=200, reply_tokens=REPLY, repairs=1)), prompted, ASKED),
    "reflection": lambda: Writer(
        Reflection(ReflectionOptions(record_tokens=200, reply_tokens=REPLY, repairs=1)), prompted, ASKED
    ),
    # One batch of observations, a summary of them, the program, the module.
    "grounded": lambda: Writer(
        Grounded(GroundedOptions(batches=1, batch_size=3, reply_tokens=REPLY, repairs=1)), prompted, 4 + ASKED
    ),
    "optoprime-multi": lambda: Writer(OptoPrimeMulti(OptoPrimeMultiOptions(base=_SMALL, max_calls=1)), prompted, ASKED),
    "code": lambda: Writer(CodeRepair(max_calls=2, repairs=1), coded, ASKED),
    # The reflector's answer, in its form or plain, and one conversation with the curator.
    "playbook": lambda: Writer(
        Playbook(PlaybookOptions(max_calls=1, run_tokens=200, reply_tokens=REPLY, repairs=1)), principled, 3 + ASKED
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("symbolic") else name for name in WRITERS]
)
async def test_a_real_small_model_as_writer_gives_legal_edits_or_recorded_drops(name: str) -> None:
    made = WRITERS[name]()
    writer = Brief()
    context = await recorded(made.program(), writer)
    updates = await made.optimizer.propose(context)
    assert 0 < len(writer.requests) <= made.calls
    assert len(updates) <= context.count
    for update in updates:
        assert update.edits
        assert apply_edits(context.parent, update.edits, context.specs) != context.parent
    # An answer cut after a few words cannot be a whole form; without an update there is a reason on record.
    assert updates or context.dropped
    assert all(drop.source and drop.problem and 1 <= drop.tries <= 3 for drop in context.dropped)


async def test_a_pipeline_of_two_nodes_runs_on_the_real_model_before_and_after_an_edit() -> None:
    pipeline = piped()
    [spec] = [spec for spec in declared_parameters().values() if spec.kind == "pipeline"]
    edit = AddNode(spec.name, "again", {"prompt": {"task": "Shorten: {judge}"}}, after="judge")
    child = apply_edits(Candidate({spec.name: spec.default}), [edit], {spec.name: spec})
    agent = Brief()
    with use(ModelsConfig({"agent": agent})):
        found = await pipeline.run(review="simply wonderful")
        with child.active():
            longer = await pipeline.run(review="simply wonderful")
    assert found["path"] == ["gist", "judge"]
    assert found["output"] == found["judge"]
    assert found["gist"] and found["gist"] in str(agent.requests[1].messages[-1]["content"])
    assert longer["path"] == ["gist", "judge", "again"]
    assert (longer["gist"], longer["judge"]) == (found["gist"], found["judge"])  # a pure function of the request


async def test_an_agent_of_components_runs_on_the_real_model_and_shows_it_its_principles() -> None:
    program = principled()
    agent = Brief()
    specs = dict(declared_parameters())
    edit = ao.graph.AddPrinciple("review.principles", "Praise means positive.")
    child = apply_edits(Candidate({name: spec.default for name, spec in specs.items()}), [edit], specs)
    with use(ModelsConfig({"agent": agent})), child.active():
        assert await program(review="simply wonderful") in LABELS
    [request] = agent.requests
    assert "- Look at the tone.\n- Praise means positive." in str(request.messages[-1]["content"])


@pytest.mark.slow
async def test_tune_with_climb_and_reflection_ends_with_a_verdict_within_its_budget() -> None:
    good = ("a joy", "warm and funny", "the best of the year", "wonderful", "a delight", "superb acting", "moving")
    bad = ("a dull mess", "boring", "an awful script", "far too long", "a waste", "no plot at all", "painful")

    def rows(name: str, count: int, closing: str) -> Dataset:
        pairs = [
            (text, label) for pair in zip(good, bad, strict=True) for text, label in zip(pair, LABELS, strict=True)
        ]
        return Dataset(name, [Example("", {"review": f"{text}, {closing}"}, label) for text, label in pairs[:count]])

    result = await ao.atune(
        prompted(),
        train=rows("train", 8, "said a friend"),
        val=rows("validation", 6, "wrote the paper"),
        test=rows("test", 12, "says my neighbour"),
        metric="exact_match",
        optimizer=Reflection(ReflectionOptions(record_tokens=200, reply_tokens=REPLY, repairs=1)),
        driver=Climb(tries=1, patience=2),
        budget=ao.Budget(rollouts=60),
        options=ao.TuneOptions(screen_size=4),
        models={"agent": MODEL, "optimizer": MODEL},
        store=":memory:",
    )
    assert result.claim is not None
    assert result.claim.status in ("improved", "not_improved", "worse", "kept_baseline")
    assert 6 < result.cost["rollouts"] <= 60
