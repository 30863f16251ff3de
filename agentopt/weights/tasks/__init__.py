r"""Tasks for tuning: rows of text with answers, what they cost the model, and what has to be beaten.

    data = tasks.load_task("reviews.jsonl", prompt="{text}\nIt was {label}", labels={"0": "terrible", "1": "great"})
    train, val, test = data.split(seed=0)
    batches = tasks.Batches(train.encode(tokenizer), batch=16, seed=0)
    loss = tasks.CrossEntropy(batches.at(step))          # what ZerothOrder.step takes
    tasks.evaluate(model, test.encode(tokenizer)).accuracy

Importing this loads no torch.
"""

from __future__ import annotations

from agentopt.weights.tasks._baselines import baselines, majority
from agentopt.weights.tasks._batches import Batch, Batches
from agentopt.weights.tasks._encode import Encoded, EncodedExample
from agentopt.weights.tasks._objectives import (
    Accuracy,
    CrossEntropy,
    Generated,
    LanguageModelLoss,
    ObjectiveName,
    Reward,
    make_objective,
)
from agentopt.weights.tasks._predictions import Predictions, evaluate
from agentopt.weights.tasks._prompts import Template
from agentopt.weights.tasks._rows import Kind, TaskData, TaskRow, load_task
from agentopt.weights.tasks._scoring import log_likelihoods

__all__ = [
    "Accuracy",
    "Batch",
    "Batches",
    "CrossEntropy",
    "Encoded",
    "EncodedExample",
    "Generated",
    "Kind",
    "LanguageModelLoss",
    "ObjectiveName",
    "Predictions",
    "Reward",
    "TaskData",
    "TaskRow",
    "Template",
    "baselines",
    "evaluate",
    "load_task",
    "log_likelihoods",
    "majority",
    "make_objective",
]
