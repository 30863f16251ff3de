"""The climb driver's own promises, and what `--driver auto` takes for which run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentopt.errors import UserError
from agentopt.evaluation import Dataset, EvaluationResult, EvaluationRow, Example
from agentopt.graph import Candidate, ParameterSpec, SetText
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import Budget, CandidateAccepted, CandidateRejected, Climb, Event, TuneOptions, resolve_driver
from agentopt.search._auto_driver import Facts
from agentopt.search._loop import Outcome, Search, Setup

NAME = "climb.rules"


class Needs:
    """A row is right when the text holds every letter of its input: truth without noise, and a count of rollouts."""

    def __init__(self, score: Callable[[str, str], float]) -> None:
        self.score = score
        self.asked: list[tuple[str, str, str]] = []
        self.kept: dict[str, list[Any]] = {}
        """Text → whether traces were asked for, in order, on training rows."""

    async def evaluate(self, candidate: Candidate, examples: Dataset, **given: Any) -> EvaluationResult:
        ids = given.get("ids") or examples.ids
        text = str(candidate.get(NAME))
        rows: list[EvaluationRow] = []
        if examples.name == "train":
            self.kept.setdefault(text, []).append(given.get("keep_traces"))
        for row_id in ids:
            need = str(examples.get(row_id).inputs["text"]).split()[0]
            self.asked.append((text, examples.name, row_id))
            rows.append(EvaluationRow(candidate.hash, examples.id, row_id, 0, 0, self.score(text, need)))
        return EvaluationResult(candidate, examples, tuple(rows))


def holds(text: str, need: str) -> float:
    return float(all(letter in text for letter in need))


class Script:
    """Gives the next text of a list, made from the parent's."""

    name = "script"

    def __init__(self, *parts: str) -> None:
        self.parts = list(parts)
        self.contexts: list[ProposeContext] = []

    def propose(self, context: ProposeContext) -> list[Update]:
        self.contexts.append(context)
        if not self.parts:
            return []
        return [Update((SetText(NAME, str(context.parent.get(NAME)) + self.parts.pop(0)),), source=self.name)]


def dataset(name: str, needs: str, count: int) -> Dataset:
    letters = needs.split()
    rows = (Example(inputs={"text": f"{letters[i % len(letters)]} {name} {i}"}, expected="x") for i in range(count))
    return Dataset(name, rows)


def climb(
    optimizer: Any,
    needs: str,
    *,
    driver: Climb | None = None,
    score: Callable[[str, str], float] = holds,
    validation: str | None = None,
    rollouts: int = 800,
) -> tuple[Outcome, list[Event], Needs]:
    events: list[Event] = []
    source = Needs(score)
    setup = Setup(
        run_id="r",
        program_name="letters",
        specs={NAME: ParameterSpec(name=NAME, kind="prompt", default="-")},
        source=source,  # pyright: ignore[reportArgumentType]
        optimizer=optimizer,
        driver=driver or Climb(),
        splits={"train": dataset("train", needs, 24), "validation": dataset("validation", validation or needs, 24)},
        budget=Budget(rollouts=rollouts),
        emit=events.append,
        options=TuneOptions(block_size=8),
    )
    return asyncio.run(Search(setup).run()), events, source


def accepted(events: list[Event]) -> list[CandidateAccepted]:
    return [event for event in events if isinstance(event, CandidateAccepted)]


def validated(source: Needs) -> list[str]:
    return list(dict.fromkeys(text for text, name, _ in source.asked if name == "validation"))


def test_links_are_built_upon_and_only_the_end_of_a_chain_is_validated() -> None:
    outcome, events, source = climb(Script("a", "b", "c", "d", "e", "f"), "a b c d e f", driver=Climb(minibatch=24))
    assert outcome.best.get(NAME) == "-abcdef"
    # Two links, then four: the ends alone saw validation rows.
    assert validated(source) == ["-", "-ab", "-abcdef"]
    reasons = [event.reason for event in events if isinstance(event, CandidateRejected)]
    assert reasons == ["built upon: its successor was validated instead"] * 4


def test_the_middle_of_a_long_chain_is_kept_when_its_end_does_not_hold() -> None:
    def score(text: str, need: str) -> float:
        return float(need in text and (need == "d" or "d" not in text))  # the last link spoils everything else

    outcome, events, source = climb(
        Script("a", "b", "c", "d"),
        "a b c d d d d d",
        validation="a b c",
        score=score,
        driver=Climb(links=4, minibatch=24),
    )
    assert outcome.best.get(NAME) == "-ab"
    assert [event.candidate for event in accepted(events)] == [outcome.best.hash]
    assert validated(source)[1] == "-abcd"


def test_a_step_that_shows_nothing_on_one_minibatch_may_come_again_on_another() -> None:
    """Rows that need two letters hide the first of them; refusing it for good would end the search."""

    class Repeating:
        name = "repeating"

        def propose(self, context: ProposeContext) -> list[Update]:
            text = str(context.parent.get(NAME))
            missing = next((letter for letter in "ab" if letter not in text), "!")
            return [Update((SetText(NAME, text + missing),), source=self.name)]

    outcome, events, _ = climb(Repeating(), "ab ab a ab", driver=Climb(minibatch=1, links=1))
    assert outcome.best.get(NAME) == "-ab"
    assert any(isinstance(event, CandidateRejected) and event.stage == "screen" for event in events)


def test_what_the_chain_has_is_validated_before_the_search_ends() -> None:
    outcome, _, _ = climb(Script("a"), "a b", driver=Climb(links=8, tries=100, minibatch=24))
    assert outcome.stop_reason.startswith("the optimizer has nothing new to propose")
    assert outcome.best.get(NAME) == "-a"


def test_the_next_step_learns_from_the_rollouts_that_the_last_one_paid_for() -> None:
    script = Script("a", "b")
    _, _, source = climb(script, "ab", score=lambda text, need: sum(letter in text for letter in need) / 2)
    first, second = script.contexts[0], script.contexts[1]
    rows = [rollout.row.example_id for rollout in first.rollouts]
    assert [rollout.row.example_id for rollout in second.rollouts] == rows
    assert second.parent.get(NAME) == "-a"
    assert source.kept["-a"][0] == "all", "its first run kept the traces that the next step reads"


@pytest.mark.parametrize("wrong", ["minibatch", "links", "longest", "tries", "patience"])
def test_settings_below_one_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        Climb(**{wrong: 0})  # pyright: ignore[reportArgumentType]


def facts(*kinds: str, validation: int = 60, search: int | None = 1000, strong: bool = True, **more: Any) -> Facts:
    specs = {f"p{i}": ParameterSpec(name=f"p{i}", kind=kind, default="x") for i, kind in enumerate(kinds)}  # pyright: ignore[reportArgumentType]
    return Facts(specs=specs, train=60, validation=validation, search=search, strong=strong, **more)


@pytest.mark.parametrize(
    ("known", "name", "why"),
    [
        (facts("prompt"), "climb", "validation comes after"),
        (facts("prompt", "demos"), "climb", "each step"),
        (facts("prompt", strong=False), "greedy", "no model writes"),
        (facts("demos", "number"), "greedy", "only demonstrations"),
        (facts("prompt", validation=10), "pareto", "only 10 validation rows"),
        (facts(*["prompt"] * 4, search=4000), "pareto", "4 parameters"),
        (facts(*["prompt"] * 4, search=1000), "climb", "each step"),
        (facts(*["prompt"] * 4, search=None), "pareto", "4 parameters"),
        (facts("prompt", objectives=("score", "tokens")), "pareto", "2 objectives"),
    ],
)
def test_auto_picks_by_data_parameters_and_budget_and_says_why(known: Facts, name: str, why: str) -> None:
    driver, reason = resolve_driver("auto", known)
    assert driver.name == name
    assert reason.startswith("auto: ") and why in reason
