"""Rule theories and chains: solved a second time, balanced, the same for the same seed, and as large as asked."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.fold import FoldTask, worlds

WAYS: list[dict[str, Any]] = [
    {"kind": "mixed", "depth": 2},
    {"kind": "mixed", "world": "closed", "depth": 3},
    {"kind": "mixed", "depth": 5, "style": "plain", "nonsense": True, "questions": 6},
    {"world": "closed", "kind": "mixed", "distractors": (0, 12)},
    {"distractors": 3, "templates": "head-first", "proof": "goal-first"},
    {"negation": False, "negated": False, "body": (1, 1), "names": 6, "attributes": 8, "style": "plain"},
]


def questions(tasks: Sequence[FoldTask]) -> list[Any]:
    return [question for task in tasks for question in task.questions]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_second_solver_finds_the_same_answers_depths_and_proofs(way: dict[str, Any]) -> None:
    checked = worlds.check(worlds.rules(24, seed=5, **way))
    assert checked.disagreements == ()
    assert checked.tasks == 24 and checked.proofs > 8


def test_the_check_sees_a_wrong_answer_and_a_proof_with_a_gap() -> None:
    task = worlds.rules(1, seed=1, depth=2, distractors=2, depths=(2,), unknown=False)[0]
    (question,) = task.questions
    other = {"yes": "no", "no": "yes"}[question.answer]
    wrong = type(question)(question.text, other, question.relevant, question.depth, question.choices)
    gap = type(question)(question.text, question.answer, question.relevant[1:], question.depth, question.choices)
    for bad in (wrong, gap):
        found = worlds.check([FoldTask(task.id, task.facts, (bad,), task.meta)]).disagreements
        assert len(found) == 1 and task.id in found[0]
    chain = worlds.chains(1, seed=1, depth=2)[0]
    longer = FoldTask(chain.id, (*chain.facts, f"{chain.questions[0].answer} is nowhere"), chain.questions, chain.meta)
    assert "is not the only end" in worlds.check([longer]).disagreements[0]


def test_a_task_depends_on_its_seed_and_place_alone() -> None:
    few, more = worlds.rules(3, seed=9, kind="mixed"), worlds.rules(6, seed=9, kind="mixed")
    assert more[:3] == few
    assert len({task.facts for task in more + worlds.rules(6, seed=10, kind="mixed")}) == 12
    assert worlds.chains(2, seed=4) == worlds.chains(5, seed=4)[:2]


@pytest.mark.parametrize("number", [0, 2, 9])
def test_exactly_so_many_distractors(number: int) -> None:
    for task in worlds.rules(12, seed=3, distractors=number, depths=(1, 2, 3), unknown=False):
        (question,) = task.questions
        assert len(task.facts) == len(question.relevant) + number
    for task in worlds.chains(12, seed=3, depth=3, distractors=number):
        assert len(task.facts) == 4 + number


def test_depths_and_answers_are_spread() -> None:
    asked = questions(worlds.rules(60, seed=2, depth=3))
    depths = Counter(question.depth for question in asked)
    assert set(depths) == {None, 0, 1, 2, 3}
    assert min(depths[depth] for depth in range(4)) > 0.08 * len(asked)
    assert max(Counter(question.answer for question in asked).values()) < 0.5 * len(asked)
    assert all((question.relevant == ()) == (question.depth is None) for question in asked)
    exact = questions(worlds.rules(10, seed=2, depth=4, depths=(4,), distractors=1))
    assert {question.depth for question in exact} <= {4, None}


@pytest.mark.parametrize("way", [{}, {"world": "closed"}, {"negation": False}, {"kind": "relations"}], ids=str)
def test_the_words_of_a_question_do_not_tell_its_answer(way: dict[str, Any]) -> None:
    tasks = worlds.rules(240, seed=11, style="plain", **way)
    seen, asked = questions(tasks[:120]), questions(tasks[120:])
    labels = Counter(question.answer for question in seen)
    words: dict[str, Counter[str]] = {label: Counter() for label in labels}
    for question in seen:
        words[question.answer].update(set(question.text.split()))

    def guess(text: str) -> str:
        def score(label: str) -> float:
            known = words[label]
            return math.log(labels[label]) + sum(
                math.log((known[word] + 1) / (labels[label] + 2)) for word in set(text.split())
            )

        return max(labels, key=score)

    right = sum(guess(question.text) == question.answer for question in asked) / len(asked)
    most = max(Counter(question.answer for question in asked).values()) / len(asked)
    assert right < most + 0.06


def test_the_sign_of_a_question_does_not_tell_its_answer() -> None:
    asked = questions(worlds.rules(200, seed=4, world="closed", style="plain"))
    table = Counter((" not " in f" {question.text} ", question.answer) for question in asked)
    assert all(abs(number / len(asked) - 0.25) < 0.03 for number in table.values()) and len(table) == 4


def test_forms_of_a_test_set_are_not_those_of_a_training_set() -> None:
    def shapes(templates: str) -> set[str]:
        tasks = worlds.rules(40, seed=6, kind="mixed", templates=templates)
        texts = [text for task in tasks for text in (*task.facts, *(one.text for one in task.questions))]
        opening = (re.match(r"\w+( is known| it true| it follow| who| that)?", text) for text in texts)
        kinds = {found[0] for found in opening if found}
        return {kind for kind in kinds if kind in {"If", "All", "Is it true", "It is known", "Someone", "Something"}}

    train, test = shapes("train"), shapes("test")
    assert train >= {"If", "All", "Is it true"}
    assert not train & test


def test_chains_end_where_the_solver_says() -> None:
    tasks = worlds.chains(60, seed=8, depth=(0, 3), questions=2, distractors=(4, 30))
    assert worlds.check(tasks).disagreements == ()
    tasks = worlds.chains(60, seed=8, depth=(0, 3), ask="statement", distractors=(0, 30))
    assert worlds.check(tasks).disagreements == ()
    answers = Counter(question.answer for question in questions(tasks))
    assert set(answers) == {"yes", "no"} and min(answers.values()) > 15
    ends = worlds.chains(40, seed=8, distractors=20)
    for task in ends:
        (question,) = task.questions
        after = {record["body"][0][2] for record in task.meta["logic"] if record["body"]}
        assert question.answer not in after and question.answer in question.choices


def test_nonsense_words_replace_every_name_and_adjective() -> None:
    usual = {
        word.lower() for task in worlds.rules(20, seed=1) for fact in task.facts for word in re.findall(r"\w+", fact)
    }
    other = worlds.rules(20, seed=1, nonsense=True)
    new = {word.lower() for task in other for fact in task.facts for word in re.findall(r"\w+", fact)}
    glue = "if someone then they are is and not all people everyone who it known that"
    assert usual & new <= set(re.findall(r"\w+", glue))
    assert worlds.rules(20, seed=1, nonsense=True, nonsense_seed=1)[0].facts != other[0].facts


def test_rules_conclude_different_things_when_asked_to() -> None:
    for task in worlds.rules(20, seed=1, unique_heads=True, rules=(4, 8)):
        heads = [tuple(record["head"][1:3]) for record in task.meta["logic"] if record["body"]]
        assert len(heads) == len(set(heads))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"deph": 3}, "unknown option 'deph'"),
        ({"depth": 9}, "a depth of 9 needs as many rules"),
        ({"depth": 2, "depths": (3,)}, "expected numbers from 0 to 2"),
        ({"names": 500}, "names is 500; the list has"),
        ({"names": 0}, "names is 0, expected 1 or more"),
        ({"words": ("yes", "yes", "no")}, "expected answers that differ"),
        ({"names": ("Ada", "They", "Otto", "Ina")}, "'They' has a meaning of its own"),
        ({"names": ("Ada", "ada")}, "'ada' is given twice"),
        ({"names": ("Ada", "brave")}, "'brave' is both a name and an attribute"),
        ({"kind": "relations", "verbs": ("chase", "cache")}, "'cache' cannot be told from its third person"),
        ({"unknown": False, "negation": False}, "every statement asked would be true"),
        ({"facts": (4, 2)}, "the smaller number first"),
        ({"depth": 6, "attributes": 2, "names": 1, "people": (1, 1)}, "found no theory of depth 6"),
    ],
)
def test_what_cannot_be_made_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        worlds.rules(1, seed=0, **options)


def test_chains_say_what_they_have_no_room_for() -> None:
    with pytest.raises(UserError, match="ask fewer questions"):
        worlds.chains(1, seed=0, depth=2, questions=3, distractors=5)
    with pytest.raises(UserError, match="need 5 attributes"):
        worlds.chains(1, seed=0, depth=4, attributes=3)
    with pytest.raises(UserError, match="give more words"):
        worlds.chains(1, seed=0, distractors=400)
    with pytest.raises(UserError, match="count is 0"):
        worlds.chains(0, seed=0)
