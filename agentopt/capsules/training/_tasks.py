"""What one step of training works on: documents, each with a budget drawn for it, and a capsule to imitate."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from agentopt.capsules._errors import BudgetInfeasible
from agentopt.capsules.counting._tokens import Meter, Tokenizer
from agentopt.capsules.training._rewards import Sample
from agentopt.capsules.training._train_options import Budgets
from agentopt.evaluation import seeded

Task = tuple[Sample, Meter]


def draw_tasks(
    samples: Sequence[Sample], budgets: Budgets, tokenizers: Mapping[str, Tokenizer], size: int, seed: int
) -> list[Task]:
    """`size` documents with a budget each, and one tokenizer for all of them."""
    rng = seeded("tasks", seed)
    tokenizer = tokenizers[rng.choice(budgets.tokenizers)]
    chosen = rng.sample(samples, size) if size <= len(samples) else rng.choices(samples, k=size)
    return [(sample, draw_budget(sample, budgets, tokenizer, rng)) for sample in chosen]


def draw_budget(sample: Sample, budgets: Budgets, tokenizer: Tokenizer, rng: random.Random) -> Meter:
    """A share of the document's tokens, log-uniform, but never less than its keep spans need."""
    share = math.exp(rng.uniform(math.log(budgets.low), math.log(budgets.high)))
    least = tokenizer.count(" ".join(span.of(sample.document.text) for span in sample.document.keep))
    return Meter(max(1, least, round(share * tokenizer.count(sample.document.text))), tokenizer)


def with_target(task: Task, seed: int, place: int) -> tuple[Sample, Meter, str]:
    """A verified capsule with a budget it meets: one of the sample's, or what the extractive engine makes of it."""
    sample, meter = task
    rng = seeded("target", seed, place)
    if sample.targets:
        target = rng.choice(sample.targets)
        limit = math.ceil(meter.total([target]) * math.exp(rng.uniform(0.0, math.log(1.25))))
        return sample, Meter(max(1, limit), meter.tokenizer), target
    from agentopt.capsules.extraction._extract import extract

    try:
        return sample, meter, extract([sample.document], meter, seed=seed).texts[0]
    except BudgetInfeasible as error:
        wider = Meter(error.minimum, meter.tokenizer)
        return sample, wider, extract([sample.document], wider, seed=seed).texts[0]
