from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example
from agentopt.graph import Candidate, apply_edits
from agentopt.optimizers import Auto, PastProposal, ProposeContext, Tpe, Update, resolve_optimizer

TRAIN = Dataset("train", [Example("", {"x": 1}, "a")])


def space() -> dict[str, graph.ParameterSpec]:
    graph.number(0.0, 1.0, name="t.heat", default=0.1)
    graph.number(1, 50, name="t.depth", default=3)
    graph.choice(["a", "b", "c", "d"], name="t.mode")
    return dict(graph.declared_parameters())


def of(candidate: Candidate, name: str) -> Any:
    return candidate.get(name)


def quality(candidate: Candidate) -> float:
    """At most 1.0, at heat 0.7, depth 30, mode c."""
    heat, depth, mode = (of(candidate, name) for name in ("t.heat", "t.depth", "t.mode"))
    far = (heat - 0.7) ** 2 + ((depth - 30) / 49) ** 2 + (0.0 if mode == "c" else 0.3)
    return 1.0 - far


def context_of(specs: dict[str, graph.ParameterSpec], parent: Candidate | None = None, **more: Any) -> ProposeContext:
    start = parent or Candidate({name: spec.default for name, spec in specs.items()})
    return ProposeContext("toy", start, specs, TRAIN, **more)


def search(propose: Callable[[ProposeContext], Sequence[Update]], specs: Any, seed: int, rounds: int = 8) -> float:
    """Greedy: the best so far is the parent; five proposals a round."""
    best = Candidate({name: spec.default for name, spec in specs.items()})
    history: list[PastProposal] = []
    for iteration in range(rounds):
        context = context_of(specs, best, history=tuple(history), seed=seed, iteration=iteration, count=5)
        for update in propose(context):
            child = apply_edits(context.parent, update.edits, specs)
            score, before = quality(child), quality(context.parent)
            history.append(PastProposal(child.hash, context.parent.hash, update, score, screen_parent=before))
            best = max(best, child, key=quality)
    return quality(best)


def at_random(context: ProposeContext) -> list[Update]:
    rng = random.Random(f"{context.seed}/{context.iteration}")
    found: list[Update] = []
    for _ in range(context.count):
        values = (rng.random(), rng.randint(1, 50), rng.choice("abcd"))
        found.append(
            Update(tuple(graph.set_value(spec, v) for spec, v in zip(context.specs.values(), values, strict=True)))
        )
    return found


def test_a_known_optimum_is_found_better_than_by_chance() -> None:
    specs = space()
    found = [search(Tpe().propose, specs, seed) for seed in range(20)]
    chance = [search(at_random, specs, seed) for seed in range(20)]
    lost, lost_by_chance = (sum(1.0 - score for score in scores) / 20 for scores in (found, chance))
    assert lost < 0.5 * lost_by_chance
    assert sum(score > 0.98 for score in found) >= 16


def measured_history(specs: dict[str, graph.ParameterSpec], count: int = 12) -> list[PastProposal]:
    context = context_of(specs)
    past: list[PastProposal] = []
    for update in at_random(context_of(specs, count=count)):
        child = apply_edits(context.parent, update.edits, specs)
        past.append(PastProposal(child.hash, context.parent.hash, update, quality(child), screen_parent=0.2))
    return past


def test_equal_contexts_give_equal_updates_and_another_seed_gives_others(capfd: pytest.CaptureFixture[str]) -> None:
    specs = space()
    history = measured_history(specs)
    one, two, other = (Tpe().propose(context_of(specs, history=history, count=6, seed=s)) for s in (1, 1, 2))
    assert one == two
    assert len(one) == 6
    assert one != other
    assert "TPE over 13 measured settings" in one[0].rationale
    assert capfd.readouterr() == ("", "")


def test_with_little_history_the_settings_are_spread_evenly() -> None:
    specs = space()
    updates = Tpe().propose(context_of(specs, count=12))
    children = [apply_edits(context_of(specs).parent, update.edits, specs) for update in updates]
    assert len({child.hash for child in children}) == 12
    assert {of(child, "t.mode") for child in children} == {"a", "b", "c", "d"}
    heats = sorted(of(child, "t.heat") for child in children)
    assert max(later - earlier for earlier, later in itertools.pairwise(heats)) < 0.25
    assert "even spread" in updates[0].rationale


def test_what_a_text_gained_is_not_credited_to_the_numbers() -> None:
    specs = space()
    text = graph.prompt("Do it.", name="t.text")
    specs = {**specs, "t.text": graph.declared_parameters()["t.text"]}
    assert str(text) == "Do it."
    root = context_of(specs).parent
    history: list[PastProposal] = []
    better = apply_edits(root, [graph.SetText("t.text", "Do it well.")], specs)
    for number in range(12):  # heat near 0 is good, near 1 bad; but all bad ones were tried with the better text
        high = number % 2 == 0
        parent, before = (better, 0.9) if high else (root, 0.1)
        update = Update((graph.SetNumber("t.heat", 0.9 + number / 200 if high else number / 200),))
        child = apply_edits(parent, update.edits, specs)
        score = before - 0.2 if high else before + 0.2
        history.append(PastProposal(child.hash, parent.hash, update, score, screen_parent=before))
    step = Update((graph.SetText("t.text", "Do it well."),))
    history.insert(0, PastProposal(better.hash, root.hash, step, 0.9, screen_parent=0.1, accepted=True))
    updates = Tpe().propose(context_of(specs, better, history=history, count=6))
    heats = [of(apply_edits(better, update.edits, specs), "t.heat") for update in updates]
    assert sum(heat < 0.5 for heat in heats) >= 4


def test_a_small_space_is_used_up_without_repeats() -> None:
    graph.choice(["a", "b", "c"], name="t.mode")
    graph.choice([True, False], name="t.flag")
    graph.choice(["only"], name="t.only")
    graph.number(2, 2, name="t.fixed")
    specs = dict(graph.declared_parameters())
    updates = Tpe().propose(context_of(specs, count=20))
    assert len(updates) == 5
    assert {edit.name for update in updates for edit in update.edits} == {"t.mode", "t.flag"}


def test_without_a_number_or_choice_nothing_is_proposed() -> None:
    graph.prompt("Do it.", name="t.text")
    assert Tpe().propose(context_of(dict(graph.declared_parameters()))) == []


@settings(deadline=None, max_examples=30)
@given(
    scores=st.lists(
        st.tuples(st.floats(-1e3, 1e3) | st.none(), st.floats(0, 1) | st.none(), st.floats(0, 1) | st.none()),
        max_size=14,
    ),
    seed=st.integers(0, 99),
)
def test_any_measured_history_gives_legal_new_settings(scores: list[Any], seed: int) -> None:
    with graph.parameter_scope():
        specs = space()
        history = measured_history(specs, max(1, len(scores)))
        history = [
            PastProposal(past.candidate_hash, past.parent_hash, past.update, screen, validation, screen_parent=parent)
            for past, (screen, validation, parent) in zip(history, scores, strict=False)
        ]
        context = context_of(specs, history=history, count=4, seed=seed)
        updates = Tpe().propose(context)
        hashes = {apply_edits(context.parent, update.edits, specs).hash for update in updates}
        assert len(hashes) == 4
        assert not hashes & {past.candidate_hash for past in history}
        assert context.dropped == []


def test_ranges_over_many_magnitudes_are_searched_by_magnitude() -> None:
    graph.number(1e-5, 1.0, name="t.rate", default=0.01)
    specs = dict(graph.declared_parameters())
    updates = Tpe().propose(context_of(specs, count=10))
    rates = [update.edits[0].to_dict()["value"] for update in updates]
    assert sum(isinstance(rate, float) and rate < 1e-2 for rate in rates) >= 4


@pytest.mark.anyio
async def test_a_tuned_program_comes_near_its_optimum() -> None:
    heat = ao.number(0.0, 1.0, name="t.heat", default=0.1)
    depth = ao.number(1, 50, name="t.depth", default=3)
    mode = ao.choice(["a", "b", "c", "d"], name="t.mode")

    @ao.agent
    def program(x: int) -> list[Any]:
        return [heat.value, depth.value, mode.value]

    def metric(output: Any, expected: Any, example: Example) -> float:
        return quality(Candidate({"t.heat": output[0], "t.depth": output[1], "t.mode": output[2]}))

    data = [Dataset(name, [Example("", {"x": n}, "") for n in range(a, a + 4)]) for name, a in (("t", 0), ("v", 10))]

    async def run() -> ao.TuneResult:
        return await ao.atune(
            program,
            train=data[0],
            val=data[1],
            metric=metric,
            optimizer="tpe",
            budget=ao.Budget(rollouts=500),
            options=ao.TuneOptions(screen_size=4, patience=30),
            store=":memory:",
        )

    one, two = await run(), await run()
    assert one.best == two.best
    assert quality(one.best) > 0.97
    assert of(one.best, "t.mode") == "c"


def test_a_missing_optuna_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(UserError, match=r"pip install 'agentopt\[optuna\]'"):
        resolve_optimizer("tpe")
    specs = space()
    context = context_of(specs, history=measured_history(specs))
    assert [arm.optimizer.name for arm in Auto().arms(context)] == ["values"]
