"""A toy classifier with a language model that obeys its instruction, and contexts made of real recordings of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from agentopt import graph
from agentopt.evaluation import Dataset, EvaluationRow, Example, Rollout
from agentopt.graph import Candidate
from agentopt.models import LM, Reply, Request
from agentopt.optimizers import PastProposal, ProposeContext

LABELS = ("billing", "shipping", "technical")
WORDS = {"billing": "invoice", "shipping": "parcel", "technical": "crash"}


class FakeClient:
    """Answers by a function of the request's messages; counts calls."""

    deterministic = True
    cacheable = False

    def __init__(self, answer: Callable[[Request], Any], name: str = "fake/strong-70b") -> None:
        self.name = name
        self.answer = answer
        self.requests: list[Request] = []

    async def send(self, request: Request) -> Reply:
        self.requests.append(request)
        text = self.answer(request)
        if isinstance(text, Exception):
            raise text
        return Reply(text)

    async def stream(self, request: Request) -> AsyncIterator[str]:
        yield str(self.answer(request))

    async def aclose(self) -> None:
        pass


@dataclass
class World:
    """One program, its data and what its parameters are."""

    program: Callable[..., Any]
    train: Dataset
    specs: dict[str, graph.ParameterSpec]
    lm: LM | None = None
    model: str = ""

    @property
    def baseline(self) -> Candidate:
        return Candidate({name: spec.default for name, spec in self.specs.items()})

    def rollouts(self, candidate: Candidate, examples: Sequence[Example]) -> list[Rollout]:
        found: list[Rollout] = []
        for example in examples:
            output: Any = None
            error: str | None = None
            with candidate.active(), graph.record() as recording:
                try:
                    output = self.program(**example.inputs)
                except Exception as raised:  # noqa: BLE001 - what the program raises is the rollout's outcome
                    error = f"{type(raised).__name__}: {raised}"
            score = float(error is None and output == example.expected)
            row = EvaluationRow(candidate.hash, self.train.id, example.id, 0, 0, score, None, {}, output, error)
            found.append(Rollout(example, row, recording.trace))
        return found

    def score(self, candidate: Candidate, examples: Sequence[Example] | None = None) -> float:
        rollouts = self.rollouts(candidate, list(self.train) if examples is None else examples)
        return sum(rollout.row.score for rollout in rollouts) / len(rollouts)

    def context(self, parent: Candidate | None = None, *, batch: int = 9, **changes: Any) -> ProposeContext:
        parent = parent or self.baseline
        fields: dict[str, Any] = {
            "program_name": "toy",
            "parent": parent,
            "specs": self.specs,
            "train": self.train,
            "rollouts": self.rollouts(parent, self.train.examples[:batch]),
            "lm": self.lm,
            "optimizer_model": self.model,
            "metric_name": "exact_match",
            **changes,
        }
        return ProposeContext(**fields)


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield


def rows(count: int, start: int = 0, name: str = "train") -> Dataset:
    examples: list[Example] = []
    for number in range(start, start + count):
        label = LABELS[number % 3]
        examples.append(Example("", {"ticket": f"ticket {number} about my {WORDS[label]} today"}, label))
    return Dataset(name, examples)


def obedient(request: Request) -> str:
    """A model that classifies well only when the label names stand in its instruction."""
    text = "\n".join(str(message["content"]) for message in request.messages)
    question = str(request.messages[-1]["content"])
    if all(label in text for label in LABELS):
        for label, word in WORDS.items():
            if word in question:
                return label
    return "billing"


@dataclass
class Maker:
    """What the `make` fixture gives: builds worlds and clients."""

    client: type[FakeClient] = FakeClient
    past: type[PastProposal] = PastProposal
    made: list[World] = field(default_factory=list[World])

    def classifier(
        self, *, demos: bool = False, variables: bool = False, size: int = 36, answer: Any = obedient
    ) -> World:
        """`instruction` (and `examples`), one call bound to the labels."""
        lm = LM(FakeClient(answer, "fake/agent"))
        text = "Sort the support ticket into its queue." + ("\n\nTicket: {ticket}" if variables else "")
        instruction = graph.prompt(text, name="toy.instruction")
        examples = graph.demos(name="toy.examples", max_items=6) if demos else None

        @graph.agent
        def classify(ticket: str) -> str:
            given: dict[str, Any] = {"demos": examples} if examples is not None else {}
            if variables:
                return lm.complete_sync(system=instruction.format(ticket=ticket), choices=LABELS, **given).text
            return lm.complete_sync(system=instruction, user=f"Ticket: {ticket}", choices=LABELS, **given).text

        names = ["toy.instruction", *(["toy.examples"] if demos else [])]
        specs = {name: graph.declared_parameters()[name] for name in names}
        return World(classify, rows(size), specs)


@pytest.fixture
def make() -> Maker:
    return Maker()
