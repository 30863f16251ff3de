"""The policy over units: it learns what a reader needs, within the budget, without torch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agentopt as ao
from agentopt.capsules import BudgetInfeasible, CapsuleOptions, Document, Meter, Span, TokenBudget, Unit, parse
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.train import (
    Budgets,
    Question,
    Reward,
    Sample,
    UnitPolicy,
    UnitSettings,
    leave_one_out_changes,
    load,
)
from agentopt.capsules.training._features import features, names
from agentopt.errors import UserError
from tests.capsules.facts import LookUp, document, sample

WORDS = resolve_tokenizer("words")
METER = Meter(6, WORDS)


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Six facts; only those about keys that begin with `gold` are asked about."""
    rng = random.Random(seed)
    made: list[Sample] = []
    for _ in range(count):
        keys = [f"gold{n}" for n in range(3)] + [f"dust{n}" for n in range(3)]
        rng.shuffle(keys)
        text = "\n".join(f"{key} {rng.choice('abcdef')}" for key in keys)
        gold = dict(line.split() for line in text.split("\n") if line.startswith("gold"))
        made.append(sample(text, gold))
    return made


def accuracy(policy: UnitPolicy, tests: list[Sample]) -> float:
    reader, right = LookUp(), 0.0
    for one in tests:
        text = policy.compress(one.document, METER)
        assert METER.fits([text])
        answers = reader.answers(text, [question.text for question in one.questions])
        right += sum(a == q.answer for a, q in zip(answers, one.questions, strict=True)) / len(one.questions)
    return right / len(tests)


def test_reinforce_finds_what_is_asked() -> None:
    settings = UnitSettings(steps=40, documents=4, group=4, budgets=Budgets(0.4, 0.6, ("words",)), rate=0.2)
    steps: list[int] = []
    train, tests = samples(20), samples(20, seed=1)
    policy = UnitPolicy.reinforce(
        train, Reward([LookUp()]), settings, progress=lambda step, _: steps.append(step.reader_calls)
    )
    blind = UnitPolicy.fresh([one.document for one in train], METER)
    assert accuracy(policy, tests) > 0.95 > 0.7 > accuracy(blind, tests)
    assert len(steps) == 40 and steps == sorted(steps)
    again = UnitPolicy.reinforce(train, Reward([LookUp()]), settings)
    assert np.array_equal(again.weights, policy.weights)


def test_imitating_leave_one_out_changes_finds_it_too() -> None:
    train, tests = samples(20), samples(20, seed=1)

    def utility(one: Sample, text: str) -> float:
        answers = LookUp().answers(text, [question.text for question in one.questions])
        return sum(a == q.answer for a, q in zip(answers, one.questions, strict=True)) / len(one.questions)

    changes = [leave_one_out_changes(one.document, lambda text, one=one: utility(one, text)) for one in train]
    assert sorted(changes[0]) == pytest.approx([0.0] * 3 + [1 / 3] * 3)
    policy = UnitPolicy.imitate([one.document for one in train], changes, METER)
    assert accuracy(policy, tests) > 0.95
    with pytest.raises(UserError, match="one per unit"):
        UnitPolicy.imitate([train[0].document], [[1.0]], METER)
    with pytest.raises(UserError, match="not finite"):
        UnitPolicy.imitate([train[0].document], [[float("nan")] * 6], METER)


def test_the_gradient_is_that_of_the_log_probability() -> None:
    """Finite differences of the exact probability of a drawn sequence, summed over all orders of a tiny document."""
    doc = document("a b\nc d\ne f")
    policy = UnitPolicy.fresh([doc, document("g\nh i j k")], METER, 4)
    rng = np.random.default_rng(0)
    policy.weights = rng.normal(size=policy.weights.size)
    rows = (features(doc, METER, None, 4) - policy.mean) / policy.deviation
    slopes = [policy._draw(doc, Meter(4, WORDS), rows, np.random.default_rng(seed))[1] for seed in range(3000)]
    # The expectation of the score function is zero.
    spread = np.std(slopes, axis=0) / np.sqrt(len(slopes))
    assert (np.abs(np.mean(slopes, axis=0)) < 5 * spread + 1e-9).all()


def test_keep_spans_stay_and_impossible_budgets_are_named() -> None:
    text = "one two\nKEEP me\nthree four"
    lines = document(text).units
    units = tuple(Unit(u.start, u.end, "item", 0, keep=u.start == 8) for u in lines)
    doc = Document(text, units, (Span(8, 12, "keep", "pattern"),))
    policy = UnitPolicy.fresh([doc], METER)
    policy.weights = np.linspace(-1, 1, policy.weights.size)
    assert "KEEP" in policy.compress(doc, Meter(4, WORDS))
    with pytest.raises(BudgetInfeasible):
        policy.compress(
            Document("{a} {b} {c}", (Unit(0, 11, "item", 0, keep=True),), (Span(0, 11, "keep", "pattern"),)),
            Meter(1, WORDS),
        )


def test_files(tmp_path: Path) -> None:
    policy = UnitPolicy.fresh([document("a b\nc")], METER, 4)
    policy.weights = np.arange(len(names(4)), dtype=float)
    path = policy.save(tmp_path / "deep" / "units.json")
    again = load(path)
    assert isinstance(again, UnitPolicy) and np.array_equal(again.weights, policy.weights) and again.buckets == 4
    data = json.loads(path.read_text())
    for change in ({"kind": "x"}, {"weights": [1.0]}, {"features": []}, {"mean": None}, {"deviation": [None]}):
        path.write_text(json.dumps(data | change))
        with pytest.raises(UserError, match=r"units\.json"):
            load(path)
    with pytest.raises(UserError, match="no such file"):
        UnitPolicy.load(tmp_path / "none.json")


def test_a_query_is_seen() -> None:
    doc = document("the cat sleeps\nthe dog barks\nrivers are deep")
    plain, asked = (features(doc, METER, query, 0) for query in (None, "Which dog barks?"))
    column = names(0).index("query")
    assert plain[:, column].tolist() == [0, 0, 0]
    assert asked[1, column] > asked[0, column] == asked[2, column] == 0
    assert asked[0, column + 1] > asked[2, column + 1]


def test_mistakes_are_named() -> None:
    mistakes: list[dict[str, Any]] = [{"steps": 0}, {"group": 1}, {"rate": 0.0}, {"decay": -1.0}, {"buckets": -1}]
    for wrong in mistakes:
        with pytest.raises(UserError):
            UnitSettings(**wrong)
    with pytest.raises(UserError, match="no samples"):
        UnitPolicy.reinforce([], Reward([LookUp()]))
    with pytest.raises(UserError, match="no unit"):
        UnitPolicy.fresh([Document("", ())], METER)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from agentopt.capsules import train\n"
        "print(train.UnitPolicy.__name__, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UnitPolicy", "False"]


def test_questions_without_gold_serve_agreement() -> None:
    from agentopt.capsules.train import RewardSettings

    bare = [Sample(one.document, tuple(Question(q.text) for q in one.questions)) for one in samples(4)]
    reward = Reward([LookUp()], RewardSettings(task=0.0, agree=1.0))
    settings = UnitSettings(steps=2, documents=2, group=2, budgets=Budgets(0.4, 0.6, ("words",)))
    assert len(UnitPolicy.reinforce(bare, reward, settings).history) == 2


def test_a_capsule_made_with_a_policy_holds_the_promises(tmp_path: Path) -> None:
    one = samples(1)[0]
    text = one.document.text.replace("\n", "\n\n") + "\n\nAnswer as {label}."
    documents = [s.document for s in samples(8)]
    changes = [[1.0 if s.startswith("gold") else 0.0 for s in d.text.split("\n")] for d in documents]
    path = UnitPolicy.imitate(documents, changes, METER).save(tmp_path / "units.json")
    made = ao.capsule(text, budget=TokenBudget(9, "words"), mode="trained", options=CapsuleOptions(trained=path))
    assert made.made == "trained" and made.tokens <= 9 and "{label}" in made.text
    assert made.text.count("gold") == 3 and "dust" not in made.text


def test_a_stored_capsule_is_not_that_of_another_policy_in_memory(tmp_path: Path) -> None:
    text = "gold stays here\n\ndust stays here\n\nrust stays here"
    documents = [parse(text)]
    made: list[str] = []
    for worth in ([1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]):
        policy = UnitPolicy.imitate(documents, [worth], METER)
        options = CapsuleOptions(trained=policy, store=tmp_path / "a.db")
        made.append(ao.capsule(text, budget=TokenBudget(3, "words"), mode="trained", options=options).text)
    assert made == ["gold stays here", "dust stays here"]
    assert UnitPolicy.imitate(documents, [[1.0, -1.0, -1.0]], METER).digest() != policy.digest()


def test_features_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "from agentopt.capsules import TokenBudget, parse\n"
        "from agentopt.capsules.training._features import features\n"
        "text = '\\n\\n'.join(f'alpha {n} beta {n * 7} gamma delta {n % 3} epsilon zeta' for n in range(9))\n"
        "rows = features(parse(text), TokenBudget(9, 'words').meter(), 'alpha beta gamma delta epsilon 14 2', 4)\n"
        "print(rows.tobytes().hex())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1
