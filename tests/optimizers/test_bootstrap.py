"""Bootstrapped demonstration sets: the seed policy, successes by score, labelled fill, training rows only."""

from __future__ import annotations

from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.evaluation import Dataset
from agentopt.graph import ParameterSpec, SetDemos, apply_edits
from agentopt.optimizers import Bootstrap, BootstrapOptions, ProposeContext
from tests.optimizers import arena

pytestmark = pytest.mark.anyio


async def half_solved(rows: int = 16, **changes: Any) -> tuple[arena.RulesTask, ProposeContext, ParameterSpec]:
    """Every other row is solved by the instruction as it is."""
    task = arena.RulesTask(k=2, rows=rows, demos=True, base=arena.improved(arena.BASE, {1}))
    context = await arena.context(task, None, batch=12, **changes)
    return task, context, context.specs["rules.examples"]


async def test_the_seed_policy_of_the_reference() -> None:
    task, context, spec = await half_solved()
    bootstrap = Bootstrap(BootstrapOptions(bootstrapped=3, labelled=4))
    solved = [row.id for number, row in enumerate(task.train) if number % 2 == 0][:6]  # within the minibatch
    assert bootstrap.demo_set(context, spec, -3) == []
    labelled = bootstrap.demo_set(context, spec, -2)
    assert len(labelled) == 4
    assert not any(demo.bootstrapped for demo in labelled)
    plain = bootstrap.demo_set(context, spec, -1)
    assert [demo.source for demo in plain if demo.bootstrapped] == solved[:3]
    assert len(plain) == 4
    sizes: set[int] = set()
    orders: set[tuple[str, ...]] = set()
    for seed in range(20):
        drawn = bootstrap.demo_set(context, spec, seed)
        successes = [demo for demo in drawn if demo.bootstrapped]
        assert [demo.bootstrapped for demo in drawn] == sorted((d.bootstrapped for d in drawn), reverse=True)
        assert {demo.source for demo in successes} <= set(solved)
        assert len({demo.source for demo in drawn}) == len(drawn) == 4
        sizes.add(len(successes))
        orders.add(tuple(demo.source for demo in successes))
    assert sizes == {1, 2, 3}
    assert len(orders) > 8


async def test_every_demonstration_is_a_training_row_with_its_right_answer() -> None:
    task, context, spec = await half_solved()
    answers = {row.id: (row.inputs["question"], row.expected) for row in task.train}
    for demo in Bootstrap().stock(context, spec):
        assert answers[demo.source] == (demo.input, demo.output)


async def test_a_failed_rollout_is_no_success_and_the_threshold_decides() -> None:
    _, context, spec = await half_solved()
    strict = Bootstrap(BootstrapOptions(threshold=1.0)).stock(context, spec)
    assert sum(demo.bootstrapped for demo in strict) == 6
    loose = Bootstrap(BootstrapOptions(threshold=0.0)).stock(context, spec)
    assert sum(demo.bootstrapped for demo in loose) == 12


async def test_sets_begin_with_the_empty_one_and_differ() -> None:
    _, context, spec = await half_solved()
    sets = Bootstrap().sets(context, spec, 6)
    assert sets[0] == []
    assert len(sets) == 6
    assert all(items not in sets[:place] for place, items in enumerate(sets))
    assert all(len(items) <= 4 for items in sets)


async def test_a_set_never_exceeds_what_the_parameter_holds() -> None:
    _, context, spec = await half_solved()
    bootstrap = Bootstrap(BootstrapOptions(bootstrapped=20, labelled=20))
    for seed in range(-2, 6):
        items = [demo.item() for demo in bootstrap.demo_set(context, spec, seed)]
        assert 0 < len(items) <= 8
        apply_edits(context.parent, [SetDemos(spec.name, items)], context.specs)


async def test_proposals_follow_the_seeds_in_the_first_round_and_draws_in_later_ones() -> None:
    _, context, _ = await half_solved(count=4)
    first = Bootstrap().propose(context)
    assert [update.rationale.split(":")[0] for update in first] == [
        "labelled demonstrations",
        "successes in training order",
        "a draw of successes (seed 0)",
        "a draw of successes (seed 1)",
    ]
    _, later, _ = await half_solved(count=4, iteration=2)
    assert all("seed 2" in update.rationale for update in Bootstrap().propose(later))


async def test_without_demos_or_anything_to_show_nothing_is_proposed() -> None:
    task, context, _ = await half_solved()
    prompts = {"rules.instruction": context.specs["rules.instruction"]}
    assert Bootstrap().propose(await arena.context(task, None, specs=prompts)) == []
    assert Bootstrap().propose(await arena.context(task, None, rollouts=(), train=Dataset("none", []))) == []


async def test_bootstrapping_solves_the_task_that_demonstrations_can_solve() -> None:
    task = arena.RulesTask(k=2, rows=16, demos=True, base=arena.improved(arena.BASE, {1}))
    result = await arena.run(
        task, "bootstrap", arena.garbage_lm(), rollouts=400, options=ao.TuneOptions(screen_size=12)
    )
    assert await task.score(result.best) == 1.0
    assert result.best.get("rules.instruction") == task.base


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="leave no demonstration"):
        BootstrapOptions(bootstrapped=0, labelled=0)
