"""Views of a task with a chosen number of distractors."""

from __future__ import annotations

from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.weights.fold import FoldTask, Question, worlds

MAKE: list[tuple[Any, dict[str, Any]]] = [
    (worlds.rules, {"kind": "mixed"}),
    (worlds.rules, {"world": "closed", "style": "plain"}),
    (worlds.kinship, {"hops": 3}),
    (worlds.chains, {"distractors": 2}),
]


@pytest.mark.parametrize(("make", "options"), MAKE, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("n", [0, 2, 14])
def test_exactly_n_others_and_the_same_answer(make: Any, options: dict[str, Any], n: int) -> None:
    tasks = make(10, seed=3, **options)
    views = [worlds.with_distractors(task, 0, n, seed=1, pool=tasks) for task in tasks]
    assert worlds.check(views).disagreements == ()
    for task, view in zip(tasks, views, strict=True):
        (question,), (before,) = view.questions, task.questions[:1]
        assert (question.text, question.answer, question.depth) == (before.text, before.answer, before.depth)
        assert [view.facts[place] for place in question.relevant] == [task.facts[place] for place in before.relevant]
        if question.relevant:
            assert len(view.facts) == len(question.relevant) + n
    assert views[0] == worlds.with_distractors(tasks[0], 0, n, seed=1, pool=tasks)


def test_all_of_its_own() -> None:
    task = worlds.rules(1, seed=1)[0]
    view = worlds.with_distractors(task, 1, "all", seed=5)
    assert sorted(view.facts) == sorted(task.facts) and view.facts != task.facts


def test_a_chain_keeps_its_end() -> None:
    tasks = worlds.chains(12, seed=1, attributes=6, names=4)
    for task in tasks:
        view = worlds.with_distractors(task, 0, 3, seed=2, pool=tasks)
        after = {record["body"][0][2] for record in view.meta["logic"] if record["body"]}
        assert view.questions[0].answer not in after


def test_free_text_takes_only_strangers_that_do_not_touch_the_question() -> None:
    task = FoldTask(
        "a", ("The bridge at Orn was closed in May.",), (Question("When was the bridge closed?", "May", (0,)),)
    )
    other = FoldTask("b", ("A bridge was painted.", "Rain fell in June."), (Question("What fell?", "rain", (1,)),))
    view = worlds.with_distractors(task, 0, 1, seed=0, pool=[task, other])
    assert set(view.facts) == {task.facts[0], "Rain fell in June."}
    with pytest.raises(UserError, match="give more tasks in pool"):
        worlds.with_distractors(task, 0, 2, seed=0, pool=[other])


def test_bad_requests() -> None:
    task = worlds.rules(1, seed=1)[0]
    with pytest.raises(UserError, match="question 99 of"):
        worlds.with_distractors(task, 99, 0, seed=0)
    with pytest.raises(UserError, match="n is -1"):
        worlds.with_distractors(task, 0, -1, seed=0)
    with pytest.raises(UserError, match="not made by"):
        worlds.check([FoldTask("x", ("a",), ())])
