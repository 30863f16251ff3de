from __future__ import annotations

from typing import Any

import pytest

from agentopt import graph
from agentopt.evaluation import Dataset, Example
from agentopt.graph import apply_edits
from agentopt.models import LM, connect
from agentopt.optimizers import Auto, Instructions, OptoPrime, OptoPrimeOptions

GOOD = ("a joy from start to end", "warm, funny and moving", "the best film of the year", "simply wonderful")
BAD = ("a dull mess", "i wanted my money back", "boring and far too long", "an awful script")


@pytest.mark.embedded
@pytest.mark.anyio
async def test_the_embedded_model_gets_legal_proposals_and_as_optimizer_never_breaks_a_run(make: Any) -> None:
    lm = LM(connect("embedded/smollm2-135m-instruct"))
    instruction = graph.prompt("Is the movie review positive or negative?", name="sst.instruction")

    @graph.agent
    def classify(review: str) -> str:
        return lm.complete_sync(system=instruction, user=review, choices=("positive", "negative")).text

    world = make.classifier()
    rows = [Example("", {"review": text}, "positive") for text in GOOD]
    rows += [Example("", {"review": text}, "negative") for text in BAD]
    world.program = classify
    world.train = Dataset("train", rows)
    world.specs = {"sst.instruction": graph.declared_parameters()["sst.instruction"]}
    world.lm, world.model = lm, "embedded/smollm2-135m-instruct"
    context = world.context(batch=8, count=3)
    updates = await Auto().propose(context)
    assert [update.source for update in updates] == ["instructions-free"] * 3
    children = [apply_edits(context.parent, update.edits, context.specs) for update in updates]
    assert max(world.score(child) for child in children) > 0.5

    one = world.context(batch=2, count=1)
    small = OptoPrimeOptions(problem_tokens=400, reply_tokens=64, repairs=1)
    for optimizer in (OptoPrime(small), Instructions()):
        for update in await optimizer.propose(one):
            apply_edits(one.parent, update.edits, one.specs)
