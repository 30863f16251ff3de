"""Objectives, predictions and baselines on small models, and the embedded weights out of the box."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentopt.errors import UserError
from agentopt.weights import load
from agentopt.weights.tasks import (
    Accuracy,
    Batch,
    CrossEntropy,
    Generated,
    LanguageModelLoss,
    Reward,
    baselines,
    evaluate,
    load_task,
    majority,
    make_objective,
)
from agentopt.weights.zeroth._types import Objective
from tests.weights.tiny import tiny

WORDS = ["sky", "grass", "is", "Label:", "Answer:", "red", "blue", "green", "one", "two", "three", "N/A"]
ROWS = [
    {
        "text": f"{['sky', 'grass', 'one', 'two', 'three'][n % 5]} is " * (1 + n % 3),
        "label": ["red", "blue"][n % 4 == 0],
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def little() -> tuple[Any, Any]:
    return tiny(WORDS)


def test_objectives_follow_the_protocol(little: tuple[Any, Any]) -> None:
    rows = load_task(ROWS).encode(little[1])
    batch = Batch.of(rows)
    for name, kind in (("auto", CrossEntropy), ("accuracy", Accuracy), ("language-model", LanguageModelLoss)):
        objective = make_objective(name, batch)  # pyright: ignore[reportArgumentType]
        assert isinstance(objective, kind) and isinstance(objective, Objective) and len(objective) == 24
    assert not isinstance(Reward(lambda model: 1.0), Objective)
    with pytest.raises(UserError, match="objective: found 'hinge'"):
        make_objective("hinge", batch)  # pyright: ignore[reportArgumentType]


def test_a_reward_is_a_loss_with_its_sign_turned(little: tuple[Any, Any]) -> None:
    model = little[0]
    assert Reward(lambda found: 3.0 if found is model else 0.0)(model) == -3.0
    assert Reward(lambda _: [1, 0.5])(model).tolist() == [-1.0, -0.5]
    assert Reward(lambda _: np.array([1.0, 2.0]))(model).tolist() == [-1.0, -2.0]
    for wrong in (None, "good", float("nan"), [1.0, float("inf")]):
        with pytest.raises(UserError, match="expected a finite number"):
            Reward(lambda _, wrong=wrong: wrong)(model)


def test_evaluation_does_not_depend_on_the_batch_and_pairs_rows(little: tuple[Any, Any]) -> None:
    model, tokenizer = little
    rows = load_task(ROWS).encode(tokenizer)
    model.train()
    whole, small = evaluate(model, rows), evaluate(model, rows, batch=5, name="small")
    assert model.training
    model.eval()
    assert whole.predicted == small.predicted and whole.ids == tuple(row.id for row in rows)
    assert whole.log_probabilities is not None and small.log_probabilities is not None
    np.testing.assert_allclose(whole.log_probabilities, small.log_probabilities, atol=1e-5)
    np.testing.assert_allclose(np.exp(whole.log_probabilities).sum(1), 1.0)
    loss = CrossEntropy(Batch.of(rows))(model).mean().item()
    assert whole.loss == pytest.approx(loss, abs=1e-5)
    assert whole.accuracy == pytest.approx(1 - float(Accuracy(Batch.of(rows))(model).mean()))
    assert whole.correct == tuple(float(a == b) for a, b in zip(whole.predicted, whole.expected, strict=True))
    found = whole.compare(majority(rows, rows))
    assert found.n == 24 and found.mean_b == 0.75 and found.test == "exact McNemar"
    low, high = whole.interval()
    assert low <= whole.accuracy <= high
    with pytest.raises(UserError, match="different rows"):
        whole.compare(evaluate(model, rows[:3]))
    with pytest.raises(UserError, match="no rows to evaluate"):
        evaluate(model, rows[:0])


def test_baselines_of_a_classification(little: tuple[Any, Any]) -> None:
    model, tokenizer = little
    train = load_task(ROWS).encode(tokenizer)
    found = baselines(model, train, train[:10])
    assert list(found) == ["zero_shot", "majority", "calibrated", "prior"]
    assert found["zero_shot"] == evaluate(model, train[:10], name="zero_shot")
    assert set(found["majority"].predicted) == {"red"} and found["majority"].accuracy == 0.7
    # A bias towards one word shows after content-free inputs as well, and is taken out.
    scores = found["calibrated"].log_probabilities
    before = found["zero_shot"].log_probabilities
    assert scores is not None and before is not None
    shift = (scores[:, 0] - scores[:, 1]) - (before[:, 0] - before[:, 1])
    assert np.ptp(shift) < 1e-9 and abs(shift[0]) > 1e-6
    # The labels' mean share on the training rows becomes the true one.
    full = baselines(model, train, train)["prior"].log_probabilities
    assert full is not None
    np.testing.assert_allclose(np.exp(full).mean(0), [6.5 / 25, 18.5 / 25], atol=1e-4)


def test_baselines_of_a_choice(little: tuple[Any, Any]) -> None:
    model, tokenizer = little
    rows = [
        {"question": "sky is", "choices": ["red two", "blue", "green one three"], "answer": "blue"},
        {"question": "grass is", "choices": ["red", "green one"], "answer": 1},
        {"question": "grass", "choices": ["red", "two two"], "answer": 0},
    ]
    data = load_task(rows).encode(tokenizer)
    found = baselines(model, data, data)
    assert list(found) == ["zero_shot", "majority", "calibrated"]
    assert found["majority"].predicted == ("blue", "green one", "two two")
    scores = found["calibrated"].log_probabilities
    assert scores is not None and scores.shape == (3, 3) and np.isneginf(scores[1:, 2]).all()
    assert np.isfinite(scores[0]).all()


def test_generation_is_trained_on_likelihood_and_judged_by_a_metric(little: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = tiny(WORDS, seed=3)
    rows = [{"prompt": "sky is", "completion": " blue"}, {"prompt": "one two grass is", "completion": " green"}] * 2
    data = load_task(rows).encode(tokenizer)
    batch = Batch.of(data, data.examples[:2])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        make_objective("auto", batch)(model).mean().backward()
        optimizer.step()
    found = evaluate(model, data, tokenizer=tokenizer)
    assert found.predicted == ("blue", "green") * 2 and found.accuracy == 1.0
    assert found.loss is not None and found.loss < 0.1
    generated = make_objective("generated", batch, tokenizer=tokenizer, metric="f1", max_tokens=4)
    assert isinstance(generated, Generated)
    assert generated.losses(model, 2).tolist() == [[-1.0, -1.0]] * 2

    def length(output: str, expected: str, example: Any) -> float:
        return float(len(output))

    assert Generated(batch, tokenizer, length)(model).tolist() == [-4.0, -5.0]
    assert majority(data, data).accuracy == 0.5
    with pytest.raises(UserError, match="need tokenizer="):
        evaluate(model, data)
    with pytest.raises(UserError, match="one candidate"):
        Accuracy(batch)(model)


@pytest.mark.embedded
@pytest.mark.slow
def test_the_embedded_model_reads_sentiment_out_of_the_box(embedded_folder: Path) -> None:
    draw = random.Random(0)
    good, bad = ["wonderful", "brilliant", "a delight", "superb"], ["awful", "boring", "a waste of time", "dreadful"]
    things = ["The film", "This book", "The concert", "Her new album", "The second act"]
    rows = [
        {"text": f"{draw.choice(things)} was {draw.choice(good if n % 2 else bad)}.", "label": n % 2} for n in range(20)
    ]
    model, tokenizer = load.model(embedded_folder, device="cpu")
    data = load_task(rows, prompt="Review: {text}\nSentiment: {label}", labels={0: "negative", 1: "positive"})
    encoded = data.encode(tokenizer)
    assert all(len(one) == 1 for row in encoded for one in row.candidates)
    found = evaluate(model, encoded)
    assert found.accuracy >= 0.7
    chat = evaluate(model, data.encode(tokenizer, chat=True)[:2])
    assert chat.loss is not None and np.isfinite(chat.loss)
