"""Facts that say the opposite of each other, and those that only look so."""

from __future__ import annotations

import pytest

from agentopt.weights.fold import contradictions


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("The cat is big.", "The cat is not big."),
        ("The cat isn't big.", "The cat is big"),
        ("Ann likes Bob.", "Ann does not like Bob."),
        ("Cats chase mice.", "Cats don\u2019t chase mice."),
        ("Ann never sings.", "Ann sings."),
        ("Ann no longer lives in Rome.", "Ann lives in Rome."),
        ("He can't swim.", "He can swim."),
        ("She has a dog.", "She does not have a dog."),
        ("The fox tries hard.", "The  fox doesn't try hard!"),
    ],
)
def test_a_negation_of_a_fact_contradicts_it(one: str, two: str) -> None:
    found = contradictions(["Bob is kind.", one, "Bob is young.", two])
    assert [(pair.first, pair.second) for pair in found] == [(1, 3)]
    assert "contradicts" in found[0].sentence


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("If Ann is kind then Bob is nice.", "If Ann is not kind then Bob is nice."),
        ("Some birds are red.", "Some birds are not red."),
        ("Ann may come.", "Ann may not come."),
        ("Ann is kind or Bob is nice.", "Ann is kind or Bob is not nice."),
        ("Ann is not only kind.", "Ann is kind."),
        ("C is old.", "C++ is not old."),
        ("Ann is kind.", "Bob is not kind."),
        ("Ann is kind.", "Ann is kind."),
        ("Ann came. Bob left.", "Ann came. Bob not left."),
        ("It is not never cold.", "It is cold."),
    ],
)
def test_what_can_both_be_true_is_left_alone(one: str, two: str) -> None:
    assert contradictions([one, two]) == ()
