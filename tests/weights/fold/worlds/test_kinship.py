"""Kinship: the algebra against family trees, stories against a closure of their own sentences."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.evaluation._draws import seeded
from agentopt.weights.fold import worlds
from agentopt.weights.fold.worlds.__main__ import families
from agentopt.weights.fold.worlds._family import Family
from agentopt.weights.fold.worlds._kinship import side
from agentopt.weights.fold.worlds._relations import COMPOSE, INVERSE, NEUTRAL, WORDS, compose
from agentopt.weights.fold.worlds._second import role_by_steps

WAYS: list[dict[str, Any]] = [
    {"hops": (2, 10), "questions": 3},
    {"hops": (2, 6), "noise": "supporting", "distractors": (2, 7), "style": "plain"},
    {"hops": (2, 6), "noise": "irrelevant", "distractors": (1, 8), "templates": "test", "gendered": False},
    {"hops": (2, 6), "noise": "disconnected", "distractors": (1, 8), "templates": "source-first", "nonsense": True},
]


def test_every_composition_holds_in_every_family() -> None:
    used: Counter[tuple[str, str]] = Counter()
    for number in range(6):
        family = Family(seeded("test", number))
        people = range(len(family.people))
        roles = {(a, b): role for a in people for b in people if a != b and (role := role_by_steps(family, a, b))}
        assert {(a, b): role for a in people for b, role in family.kin(a).items()} == roles
        for (a, z), first in roles.items():
            assert roles[z, a] == INVERSE[first]
            for b in people:
                second = roles.get((z, b))
                if b != a and second is not None and (first, second) in COMPOSE:
                    used[first, second] += 1
                    assert roles[a, b] == COMPOSE[first, second]
    assert set(used) == set(COMPOSE)


def test_answers_of_stories_are_true_in_the_family() -> None:
    assert families(60, seed=3) == 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_story_entails_its_answer_and_no_other(way: dict[str, Any]) -> None:
    checked = worlds.check(worlds.kinship(30, seed=4, **way))
    assert checked.disagreements == () and checked.proofs == checked.questions >= 30


def test_the_algebra_knows_what_it_does_not_know() -> None:
    assert compose(("child", "sibling", "spouse")) == {"child-in-law"}
    assert compose(("child", "grandparent")) == frozenset()
    assert compose(("parent", "parent", "parent")) == frozenset()
    assert set(INVERSE) == set(WORDS)


@pytest.mark.parametrize("noise", ["supporting", "irrelevant", "disconnected"])
def test_noise_is_what_it_is_called(noise: str) -> None:
    for task in worlds.kinship(15, seed=2, hops=4, noise=noise, distractors=6):
        (question,) = task.questions
        assert len(task.facts) == 10 and question.depth == 4
        path = {
            name for place in question.relevant for name in (task.meta["logic"][place][0], task.meta["logic"][place][2])
        }
        others = [edge for place, edge in enumerate(task.meta["logic"]) if place not in question.relevant]
        touching = [len({edge[0], edge[2]} & path) for edge in others]
        if noise == "disconnected":
            assert touching == [0] * 6
        elif noise == "irrelevant":
            assert touching == [1] * 6
        else:
            names = Counter(name for edge in others for name in (edge[0], edge[2]) if name not in path)
            assert set(names.values()) == {2}  # every newcomer stands between two others


def test_sides_share_no_sequence_of_relations() -> None:
    train = {tuple(task.meta["pattern"]) for task in worlds.kinship(60, seed=1, hops=3, split="train")}
    test = {tuple(task.meta["pattern"]) for task in worlds.kinship(20, seed=1, hops=3, split="test")}
    assert not train & test
    patterns = [(first, second, third) for first in WORDS for second in WORDS for third in WORDS]
    assert 0.15 < sum(side(pattern) == "test" for pattern in patterns) / len(patterns) < 0.25


def test_words_of_a_test_set_are_not_those_of_a_training_set() -> None:
    train = worlds.kinship(30, seed=1, templates="train")
    test = worlds.kinship(30, seed=1, templates="test")
    assert not any("'s " in fact for task in train for fact in task.facts)
    assert all("'s " in fact for task in test for fact in task.facts)


def test_answers_are_spread_over_all_words() -> None:
    tasks = worlds.kinship(220, seed=1, hops=2)
    answers = Counter(task.questions[0].answer for task in tasks)
    assert len(answers) == 22 and max(answers.values()) < 0.12 * len(tasks)
    assert set(answers) <= set(tasks[0].questions[0].choices)
    neutral = worlds.kinship(20, seed=1, hops=2, gendered=False)
    assert {task.questions[0].answer for task in neutral} <= set(NEUTRAL.values())


def test_few_names_are_enough_for_short_stories() -> None:
    tasks = worlds.kinship(10, seed=1, hops=2, women=2, men=2, style="plain")
    assert len({name for task in tasks for a, _, b, _ in task.meta["logic"] for name in (a, b)}) <= 4


def test_a_task_depends_on_its_seed_and_place_alone() -> None:
    assert worlds.kinship(3, seed=9) == worlds.kinship(5, seed=9)[:3]
    assert worlds.kinship(3, seed=9) != worlds.kinship(3, seed=8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distractors": 2}, "need a kind of noise"),
        ({"noise": "supporting", "distractors": 1}, "two edges at least"),
        ({"hops": (4, 2)}, "the smaller number first"),
        ({"hops": 0}, "expected 1 or more"),
        ({"noise": "irrelevant", "distractors": 300}, "ask for fewer facts"),
        ({"women": ("Ada",), "men": ("Ada",)}, "both among women and men"),
        ({"women": 2, "men": 2, "hops": 8}, "for 2 women and 2 men; ask"),
    ],
)
def test_what_cannot_be_made_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        worlds.kinship(3, seed=0, **options)
