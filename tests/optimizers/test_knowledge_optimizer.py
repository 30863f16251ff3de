"""Forms of knowledge, chosen by measured score and cost: which form is kept when, what is refused, what is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import RunError, UserError
from agentopt.evaluation import Dataset, EvaluationRow, Example, Rollout
from agentopt.models import ModelsConfig, Reply, Request, use
from agentopt.optimizers import Auto, KnowledgeForms, KnowledgeOptions, ProposeContext, resolve_optimizer
from agentopt.optimizers._knowledge import facts_of
from agentopt.search._remote import context_from_dict, context_to_dict

pytestmark = pytest.mark.anyio

TOWNS = ("Arden", "Brill", "Corve", "Delph", "Elstow", "Frome", "Gorran", "Hythe")
FILLER = "This page is printed on good paper and is looked at again every year in the spring."
GUIDE = "\n\n".join(f"The depot of {town} has the number {10 + place}. {FILLER}" for place, town in enumerate(TOWNS))
ROWS = [
    {"id": f"{turn}-{town}", "town": f"{town} {turn}", "expected": str(10 + place)}
    for turn in range(6)
    for place, town in enumerate(TOWNS)
]
OBJECTIVES = ao.TuneOptions(screen_size=8, objectives=("score", "tokens"), capture=False)


@pytest.fixture(autouse=True)
def own_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "meta.json").write_text("{}")
    with graph.parameter_scope():
        yield


class Reader(ao.FunctionLM):
    """Knows what stands in its prompt, and what an adapter holds when it can be trusted."""

    def __init__(self, adapters: bool = True, least: int = 0) -> None:
        super().__init__(self._read, name=f"reader {adapters} {least}")
        self._adapters = adapters
        self._least = least

    def _read(self, request: Request) -> str:
        place = next(at for at, town in enumerate(TOWNS) if town in request.messages[-1]["content"])
        text = "\n".join(turn["content"] for turn in request.messages)
        if request.adapter is not None:
            return str(10 + place) if self._adapters else "?"
        fact = f"The depot of {TOWNS[place]} has the number {10 + place}."
        return str(10 + place) if fact in text and len(text) >= self._least else "?"


def program(**declared: Any) -> tuple[Any, ao.Knowledge]:
    guide = ao.knowledge("depots.guide", GUIDE, **declared)

    @ao.agent
    async def depot(town: str) -> str:
        reply = await ao.lm().complete(system="Give the number.", user=f"Depot of {town}?", knowledge=guide)
        return reply.text

    return depot, guide


def folding(accepted: bool = True, **card: Any) -> Any:
    """Stands for a `Folder`: writes a card as the real one does."""
    calls: list[tuple[Path, tuple[str, ...]]] = []

    def fold(meta: Path, facts: Sequence[str], out: Path) -> Mapping[str, Any]:
        calls.append((meta, tuple(facts)))
        out.mkdir(parents=True, exist_ok=True)
        content = {"accepted": accepted, "reason": "recall 0.12 < 0.50", "recall": 0.97, "base_hash": "b0", **card}
        (out / "fold.json").write_text(json.dumps(content))
        return content

    fold.calls = calls  # pyright: ignore[reportFunctionMemberAccess]
    return fold


async def tuned(model: Any, optimizer: Any, options: ao.TuneOptions = OBJECTIVES, **declared: Any) -> Any:
    depot, _ = program(**declared)
    return await ao.atune(
        depot, train=ROWS, metric="exact_match", optimizer=optimizer, driver="greedy", budget=ao.Budget(rollouts=400),
        options=options, models={"agent": model}, store="runs/store.db",
    )  # fmt: skip


# ---- which form is kept


async def test_a_capsule_wins_by_tokens() -> None:
    result = await tuned(Reader(), "knowledge")
    value = result.best["depots.guide"]
    assert value["form"] == "capsule"
    assert len(value["text"]) < 0.8 * len(GUIDE)
    assert all(f"The depot of {town} has" in value["text"] for town in TOWNS)


async def test_folded_wins_where_the_adapter_knows_it_all() -> None:
    fold = folding()
    result = await tuned(Reader(), KnowledgeForms(fold=fold), folder="meta")
    value = result.best["depots.guide"]
    assert (value["form"], value["recall"], value["base_hash"]) == ("folded", 0.97, "b0")
    assert Path(value["adapter"], "fold.json").is_file()
    assert Path(value["adapter"]).parent == Path("runs/adapters")
    tokens = [row["prompt_tokens"] for row in result.trade_offs if row["score"] == 1.0]
    assert min(tokens) < 15 < 150 < max(tokens)
    assert fold.calls[0][1][0] == "The depot of Arden has the number 10."
    saved = ao.load(Path("runs/runs") / result.run_id / "best.json")
    assert saved == result.best


async def test_in_context_stays_when_the_others_lose_score() -> None:
    model = Reader(adapters=False, least=len(GUIDE))
    result = await tuned(model, KnowledgeForms(fold=folding()), folder="meta")
    assert result.best["depots.guide"] == {"form": "in-context"}


async def test_with_the_score_alone_an_equal_form_is_not_kept() -> None:
    options = ao.TuneOptions(screen_size=8, capture=False)
    result = await tuned(Reader(), KnowledgeForms(fold=folding()), options, folder="meta")
    assert result.best["depots.guide"] == {"form": "in-context"}


async def test_auto_has_the_forms_of_knowledge() -> None:
    result = await tuned(Reader(), "auto")
    assert result.best["depots.guide"]["form"] == "capsule"


# ---- proposals


def context(handle: ao.Knowledge, **changes: Any) -> ProposeContext:
    parent = ao.Candidate({handle.name: handle.spec.default})
    train = Dataset("train", [Example("", {"town": "Arden"}, "10")])
    return ProposeContext("depots", parent, {handle.name: handle.spec}, train, count=9, **changes)


def forms(updates: Sequence[Any]) -> list[str]:
    return [update.edits[0].value["form"] for update in updates]


async def test_the_menu_is_made_of_the_documents_whatever_the_form() -> None:
    _, guide = program(folder="meta")
    given = context(guide)
    made = KnowledgeForms(fold=folding())
    first = await made.propose(given)
    assert forms(first) == ["folded", *["capsule"] * (len(first) - 1)]
    assert len({str(update.edits[0].to_dict()) for update in first}) == len(first) >= 3
    assert await made.propose(given) == first
    child = graph.apply_edits(given.parent, first[1].edits, given.specs)
    again = await made.propose(replace(given, parent=child))
    assert sorted(forms(again)) == sorted([*forms(first[:1]), *forms(first[2:]), "in-context"])
    assert first[0].rationale.startswith("depots.guide: in-context (about ")
    assert ") -> folded (adapter .agentopt/adapters/depots.guide-" in first[0].rationale


async def test_auto_asks_for_forms_only_where_there_is_knowledge() -> None:
    _, guide = program()
    assert [arm.optimizer.name for arm in Auto().arms(context(guide))] == ["knowledge"]
    assert resolve_optimizer("knowledge").name == "knowledge"
    text = ao.prompt("Say it.", name="other")
    other = ProposeContext("p", ao.Candidate({"other": "Say it."}), {"other": text.spec}, context(guide).train)
    assert "knowledge" not in {arm.optimizer.name for arm in Auto().arms(other)}
    assert await KnowledgeForms().propose(other) == []


async def test_a_refused_fold_is_dropped_with_the_reason() -> None:
    _, guide = program(folder="meta")
    given = context(guide)
    assert set(forms(await KnowledgeForms(fold=folding(accepted=False)).propose(given))) == {"capsule"}
    (dropped,) = given.dropped
    assert (dropped.source, "gate refuses the adapter: recall 0.12 < 0.50" in dropped.problem) == (
        "knowledge.folded",
        True,
    )


async def test_failures_of_folding_leave_the_other_forms() -> None:
    def broken(meta: Path, facts: Sequence[str], out: Path) -> Mapping[str, Any]:
        raise RunError("the loss is no number")

    _, guide = program(folder="nowhere")
    given = context(guide)
    assert set(forms(await KnowledgeForms().propose(given))) == {"capsule"}
    assert "'nowhere' has no meta.json" in given.dropped[0].problem
    _, other = program_of("other", "meta")
    given = context(other)
    assert set(forms(await KnowledgeForms(fold=broken).propose(given))) == {"capsule"}
    assert "the loss is no number" in given.dropped[0].problem


def program_of(name: str, folder: str) -> tuple[None, ao.Knowledge]:
    return None, ao.knowledge(name, GUIDE, folder=folder)


async def test_contradictions_are_told() -> None:
    _, guide = program(folder="meta")
    said = [{"first": 0, "second": 1, "sentence": '"A." contradicts "Not A."'}]
    updates = await KnowledgeForms(fold=folding(contradictions=said)).propose(context(guide))
    assert updates[0].rationale.endswith('; the documents contradict themselves: "A." contradicts "Not A."')


async def test_nothing_is_folded_for_calls_that_do_not_name_it_or_models_without_adapters() -> None:
    class Plain:
        name, deterministic, cacheable = "own/model", True, False

        async def send(self, request: Request) -> Reply:
            return Reply("x")

        async def stream(self, request: Request) -> AsyncIterator[str]:
            yield "x"

        async def aclose(self) -> None:
            pass

    _, guide = program(folder="meta")

    async def rollout(named: bool) -> Rollout:
        with ao.record() as recording:
            knowledge = guide if named else None
            await ao.lm().complete(f"{guide}\n\nDepot of Arden?", knowledge=knowledge)
        row = EvaluationRow("c", "train", "e", 0, 0, 1.0, None, {}, "x", None)
        return Rollout(Example("", {"town": "Arden"}, "10"), row, recording.trace)

    fold = folding()
    for model, named, problem in (
        (Reader(), False, "no language-model call of the program names it"),
        (Plain(), True, "the model own/model takes no adapters"),
        (Reader(), True, ""),
    ):
        with use(ModelsConfig({"agent": model})):
            given = context(guide, rollouts=[await rollout(named)])
            updates = await KnowledgeForms(fold=fold).propose(given)
        assert [problem in drop.problem for drop in given.dropped] == [True] * bool(problem)
        assert ("folded" in forms(updates)) is not bool(problem)
    assert len(fold.calls) == 1


@pytest.mark.parametrize(
    ("documents", "facts"),
    [
        (["One. Two."], ["One. Two."]),
        (["One. Two.\nThree is\nwrapped."], ["One.", "Two.", "Three is wrapped."]),
        (["# Desk\n\n- a\n2. b\n\nEnd.", "Last."], ["Desk", "a", "b", "End.", "Last."]),
        (["Same.", "Same."], ["Same."]),
    ],
)
def test_documents_as_facts(documents: list[str], facts: list[str]) -> None:
    assert facts_of(documents) == facts


async def test_a_worker_gets_objectives_and_the_place_for_adapters(tmp_path: Path) -> None:
    _, guide = program(folder="meta")
    given = context(guide, objectives=("score", "tokens"), files=str(tmp_path / "runs"))
    crossed = context_from_dict(json.loads(json.dumps(context_to_dict(given))))
    assert (crossed.objectives, crossed.files) == (given.objectives, given.files)
    fold = folding()
    assert await KnowledgeForms(fold=fold).propose(crossed) == await KnowledgeForms(fold=fold).propose(given)


def test_bad_options() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        KnowledgeOptions(ratios=(1.5,))


async def test_a_run_is_not_resumed_with_other_documents() -> None:
    result = await tuned(Reader(), "knowledge")
    with graph.parameter_scope():
        guide = ao.knowledge("depots.guide", GUIDE + "\n\nThe depot of Ivel has the number 30.")

        @ao.agent
        async def depot(town: str) -> str:
            return (await ao.lm().complete(user=town, knowledge=guide)).text

        with pytest.raises(UserError, match="cannot resume"):
            await ao.atune(
                depot, train=ROWS, metric="exact_match", optimizer="knowledge", driver="greedy", resume=result.run_id,
                budget=ao.Budget(rollouts=400), options=OBJECTIVES, models={"agent": Reader()}, store="runs/store.db",
            )  # fmt: skip
