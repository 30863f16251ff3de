"""What a capsule is worth: the gate, its slope, the weights, and that a group is compared on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from agentopt.capsules import Document, Meter, Span, Unit
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.train import Question, Reward, RewardSettings, Sample
from agentopt.capsules.training._rewards import distance_from_valid, invented, missing_keep, probe_recall
from agentopt.capsules.training._updates import RunningMean, group_normalised, leave_one_out, tells_nothing
from agentopt.errors import RunError, UserError
from tests.capsules.facts import LookUp, document, sample

WORDS = resolve_tokenizer("words")


def meter(limit: int) -> Meter:
    return Meter(limit, WORDS)


def test_gold_and_agreement_differ_where_the_original_is_wrong() -> None:
    one = sample("a red ; b blue ; a green", {"a": "red", "b": "blue"})
    reader = LookUp()
    gold = Reward([reader]).scores(one, ["a red ; b blue", "a green ; b blue"], meter(5), seed=1)
    assert [score.total for score in gold] == [1.0, 0.5]
    agree = Reward([reader], RewardSettings(task=0.0, agree=1.0))
    assert [s.total for s in agree.scores(one, ["a red ; b blue", "a green ; b blue"], meter(5), seed=1)] == [0.5, 1.0]


def test_beyond_the_budget_nothing_is_read_and_less_beyond_is_better() -> None:
    one = sample("a red ; b blue ; c green", {"a": "red"})
    reward = Reward([LookUp()])
    texts = ["a red", "a red ; b", "a red ; b blue", ""]
    scores = reward.scores(one, texts, meter(2), seed=0)
    assert [score.valid for score in scores] == [True, False, False, False]
    assert scores[0].total > scores[1].total > scores[2].total > scores[3].total
    assert reward.calls == 1  # one question for the one valid text


def test_a_lost_keep_span_shuts_the_gate_unless_it_is_switched_off() -> None:
    text = "a red ; KEEP ; b blue"
    doc = Document(text, (Unit(0, len(text), "sentence", 0, keep=True),), (Span(8, 12, "keep", "pattern"),))
    one = Sample(doc, (Question("a", "red"),))
    assert missing_keep(doc, "a red") == 1.0
    assert not Reward([LookUp()]).scores(one, ["a red"], meter(9), seed=0)[0].valid
    open_ = Reward([LookUp()], RewardSettings(gate="length"))
    assert open_.scores(one, ["a red"], meter(9), seed=0)[0].total == 1.0


def test_keep_spans_count_in_order_and_as_often_as_they_are() -> None:
    doc = Document("{x} then {x}", (), (Span(0, 3, "keep", "placeholder"), Span(9, 12, "keep", "placeholder")))
    assert missing_keep(doc, "{x}") == 0.5
    assert missing_keep(doc, "{x}{x}") == 0.0


def test_invented_numbers_and_names_cost() -> None:
    source = "In 1999 the Danube rose by 3.5 m. People fled."
    assert invented(source, "Danube rose 3.5 m in 1999. people fled. The rise") == pytest.approx(0.0)
    assert invented(source, "Danube rose 4 m") == pytest.approx(0.5)
    assert probe_recall(document(source), "Danube 1999") == pytest.approx(2 / 5)
    one = Sample(document(source), (Question("a", "b"),))
    reward = Reward([LookUp()], RewardSettings(invented=0.2))
    assert reward.scores(one, ["Danube 7"], meter(9), seed=0)[0].total == pytest.approx(-0.1)


def test_longer_answers_cost() -> None:
    class Talks(LookUp):
        def answers(self, text: str, questions: Sequence[str]) -> list[str]:
            return ["x" if len(text) > 10 else "x y z" for _ in questions]

    one = sample("a red ; b blue ; c", {"a": "x y z"})
    score = Reward([Talks()], RewardSettings(longer=0.1)).scores(one, ["a"], meter(9), seed=0)[0]
    assert score.longer == 2.0 and score.total == pytest.approx(1.0 - 0.2)


def test_the_soft_form_uses_probabilities() -> None:
    class Soft(LookUp):
        def likelihoods(self, text: str, questions: Sequence[str], answers: Sequence[str]) -> list[float]:
            return [math.log(0.5) for _ in answers]

    one = sample("a red ; b blue", {"a": "red", "b": "blue"})
    score = Reward([Soft()], RewardSettings(soft=True)).scores(one, ["a red"], meter(9), seed=0)[0]
    assert score.task == pytest.approx(0.5)
    with pytest.raises(UserError, match="likelihoods"):
        Reward([LookUp()], RewardSettings(soft=True))
    mistakes: list[dict[str, Any]] = [{"gate": "lenght"}, {"task": -1}, {"longer": math.inf}]
    for wrong in mistakes:
        with pytest.raises(UserError, match=rf"reward\.{next(iter(wrong))}"):
            RewardSettings(**wrong)


def test_a_group_gets_the_same_questions_and_reader() -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    class Notes(LookUp):
        def answers(self, text: str, questions: Sequence[str]) -> list[str]:
            asked.append((self.name, tuple(questions)))
            return super().answers(text, questions)

    one = sample("a red ; b blue ; c green", {"a": "red", "b": "blue", "c": "green"})
    reward = Reward([Notes("one"), Notes("two")], RewardSettings(questions=1))
    for seed in range(20):
        asked.clear()
        reward.scores(one, ["a red", "b blue", "c green"], meter(9), seed=seed)
        assert len(set(asked)) == 1
    kinds = {(reader.name, q.text) for seed in range(30) for reader, (q,) in [reward.drawn(one, seed)] if reader}
    assert len(kinds) == 6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_named(bad: float) -> None:
    one = sample("a red", {"a": "red"})
    with pytest.raises(RunError, match="not finite"):
        Reward([LookUp()], metric=lambda a, b: bad).scores(one, ["a red"], meter(9), seed=0)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UserError, match="no reader"):
        Reward([])
    with pytest.raises(UserError, match="questions with an answer"):
        Reward([LookUp()]).scores(Sample(document("x"), (Question("a"),)), ["x"], meter(1), seed=0)
    mistakes: list[dict[str, Any]] = [{"task": -1.0}, {"sem": math.nan}, {"questions": 0}]
    for wrong in mistakes:
        with pytest.raises(UserError):
            RewardSettings(**wrong)


def test_without_quality_only_validity_counts() -> None:
    one = sample("a red ; b blue", {"a": "red"})
    reward = Reward([LookUp()])
    scores = reward.scores(one, ["b blue", "a red ; b blue"], meter(2), seed=0, quality=False)
    assert scores[0].total == 1.0 and scores[1].total < 0 and reward.calls == 0


def test_meaning_by_recall_needs_no_reader() -> None:
    reward = Reward([], RewardSettings(task=0.0, sem=1.0))
    scores = reward.scores(Sample(document("In 1999 and 2001")), ["1999", "1999 2001"], meter(5), seed=0)
    assert scores[0].total < scores[1].total


def test_baselines() -> None:
    assert leave_one_out([1.0, 0.0, 0.0]) == pytest.approx([1.0, -0.5, -0.5])
    assert group_normalised([1.0, 0.0]) == pytest.approx([1.0, -1.0])
    assert group_normalised([0.5, 0.5 + 1e-6]) == pytest.approx([-5e-7, 5e-7])  # a tie is not blown up
    assert tells_nothing([0.3, 0.3]) and not tells_nothing([0.3, 0.4])
    mean = RunningMean()
    assert mean.centred([1.0, 0.0]) == pytest.approx([0.5, -0.5])
    assert mean.value is not None and 0 < mean.value < 1


def test_distance_has_a_slope_and_is_zero_only_when_valid() -> None:
    doc = document("one two three")
    assert distance_from_valid(doc, "one", meter(1)) == 0.0
    assert 0 < distance_from_valid(doc, "one two", meter(1)) <= 1
    assert distance_from_valid(doc, "one two three", meter(2)) < distance_from_valid(doc, "one two three", meter(1))
    assert distance_from_valid(doc, "  ", meter(9)) == 2.0


def test_the_installed_encoder_judges_meaning() -> None:
    from agentopt.capsules.train import MiniLm

    try:
        judge: Any = MiniLm()
    except UserError:
        pytest.skip("the sentence encoder is not installed")
    doc = document("The cat sleeps. The river is deep.")
    assert judge(doc, doc.text) > 0.99
    assert judge(doc, "The cat sleeps.") < judge(doc, doc.text)
    assert judge(doc, "") == 0.0
