from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import SetChoice, SetNumber, SetText, apply_edits
from agentopt.models import LM, LMRateLimit, Request
from agentopt.optimizers import (
    OPTIMIZER_NAMES,
    Auto,
    Optimizer,
    OptoPrime,
    PastProposal,
    ProposeContext,
    Update,
    Values,
    load_templates,
    resolve_optimizer,
)
from agentopt.optimizers._auto import is_weak

GOOD = "Sort the support ticket into billing, shipping or technical."


def written(request: Request) -> str:
    if "Write ONE better instruction" in str(request.messages):
        return json.dumps({"instruction": GOOD + " Be exact."})
    return json.dumps({"reasoning": "", "suggestion": [{"name": "toy.instruction", "value": GOOD}]})


def sources(updates: list[Update]) -> set[str]:
    return {update.source for update in updates}


@pytest.mark.parametrize(
    ("name", "weak"),
    [
        ("embedded/smollm2-135m-instruct", True),
        ("hf:org/Qwen2.5-1.5B-Instruct-GGUF/x.gguf", True),
        ("embedded/other", True),
        ("model.gguf", False),
        ("ollama/llama3:8b", False),
        ("gpt-4o-mini", False),
        ("o3-mini", False),
        ("", False),
    ],
)
def test_a_models_strength_is_judged_by_its_name(name: str, weak: bool) -> None:
    assert is_weak(name) is weak


@pytest.mark.anyio
async def test_a_weak_model_is_not_asked_and_frames_and_demos_come_first(make: Any) -> None:
    world = make.classifier(demos=True)
    client = make.client(written)
    world.lm, world.model = LM(client), "embedded/smollm2-135m-instruct"
    context = world.context(count=20)
    updates = await Auto().propose(context)
    assert len(updates) == 20
    assert client.requests == []
    assert sources(updates) == {"instructions-free", "demonstrations", "joint"}
    assert max(world.score(apply_edits(context.parent, u.edits, context.specs)) for u in updates) == 1.0


@pytest.mark.anyio
async def test_a_strong_model_is_asked_a_bounded_number_of_times(make: Any) -> None:
    world = make.classifier()
    client = make.client(written)
    world.lm = LM(client)
    updates = await Auto().propose(world.context(count=24))
    assert "optoprime" in sources(updates)
    assert len(updates) == 24
    assert len(client.requests) <= 8


@pytest.mark.anyio
async def test_F6_a_model_at_429_costs_its_share_only(make: Any) -> None:
    world = make.classifier()
    world.lm = LM(make.client(lambda _: LMRateLimit("slow down")))
    context = world.context(count=8)
    updates = await Auto().propose(context)
    assert len(updates) == 8
    assert any("slow down" in item.problem for item in context.dropped)


@pytest.mark.anyio
async def test_when_only_a_failing_model_could_help_its_error_is_raised(make: Any) -> None:
    world = make.classifier()
    world.specs = {"toy.text": graph.ParameterSpec("toy.text", "tool_text", "Looks up an order.")}
    world.lm = LM(make.client(lambda _: LMRateLimit("slow down")))
    with pytest.raises(LMRateLimit):
        await Auto().propose(world.context())


@pytest.mark.anyio
async def test_arms_that_were_accepted_get_more(make: Any) -> None:
    world = make.classifier(demos=True)
    world.model = "embedded/smollm2-135m-instruct"
    world.lm = LM(make.client(written))

    def shares(good: str) -> dict[str, int]:
        history = [
            PastProposal(f"{source}{n}", "p", Update((), "", source), 0.5, None, source == good)
            for source in ("instructions-free", "demonstrations", "joint")
            for n in range(20)
        ]
        return {arm.name: count for arm, count in Auto().shares(world.context(count=30, history=history))}

    assert shares("demonstrations")["demonstrations"] > 20
    assert shares("joint")["joint"] > 20


def test_results_of_a_part_of_an_optimizer_count_for_its_arm(make: Any) -> None:
    world = make.classifier()
    graph.toolbox([], name="toy.tools")
    world.specs = {"toy.tools": graph.declared_parameters()["toy.tools"], **world.specs}
    world.lm = LM(make.client(written))

    def share(*, accepted: bool) -> int:
        history = [PastProposal(f"{n}", "p", Update((), "", "symbolic.tool"), 0.5, None, accepted) for n in range(40)]
        shares = Auto(max_written=1000).shares(world.context(count=60, history=history))
        return next(count for arm, count in shares if arm.name == "symbolic")

    assert share(accepted=True) > 30
    assert share(accepted=False) < 5


@pytest.mark.anyio
async def test_no_declared_parameter_is_left_untouched(make: Any) -> None:
    world = make.classifier(demos=True)
    graph.number(0.0, 1.0, name="toy.threshold", default=0.5)
    graph.choice(["a", "b", "c"], name="toy.mode")
    world.specs.update(graph.declared_parameters())
    touched: set[str] = set()
    history: list[PastProposal] = []
    for iteration in range(12):
        context = world.context(history=history, iteration=iteration, count=2)
        for update in await Auto().propose(context):
            child = apply_edits(context.parent, update.edits, context.specs)
            history.append(PastProposal(child.hash, context.parent.hash, update, 0.3))
            touched |= {edit.name for edit in update.edits}
    assert touched == set(world.specs)


@pytest.mark.anyio
async def test_proposals_are_new_and_the_same_for_the_same_context(make: Any) -> None:
    world = make.classifier(demos=True)
    one, two = [await Auto().propose(world.context(count=10)) for _ in range(2)]
    assert one == two
    context = world.context(count=10)
    hashes = [apply_edits(context.parent, update.edits, context.specs).hash for update in one]
    assert len(set(hashes)) == 10
    history = [PastProposal(h, context.parent.hash, update) for h, update in zip(hashes, one, strict=True)]
    later = await Auto().propose(world.context(count=10, history=history))
    assert not {apply_edits(context.parent, u.edits, context.specs).hash for u in later} & set(hashes)


@pytest.mark.anyio
async def test_an_instruction_demonstrations_and_a_switch_are_changed_together(make: Any) -> None:
    world = make.classifier(demos=True)
    graph.choice(["none", "content_free"], name="toy.calibrate")
    world.specs.update(graph.declared_parameters())
    world.model = "embedded/smollm2-135m-instruct"
    world.lm = LM(make.client(written))
    updates = [u for u in await Auto().propose(world.context(count=60)) if u.source == "joint"]
    with_switch = [u for u in updates if any(edit.name == "toy.calibrate" for edit in u.edits)]
    assert {"toy.instruction", "toy.examples", "toy.calibrate"} in [{edit.name for edit in u.edits} for u in updates]
    assert 0.05 < len(with_switch) / len(updates) < 0.6


@pytest.mark.anyio
async def test_an_instruction_and_a_switch_alone_are_changed_together_too(make: Any) -> None:
    world = make.classifier()
    graph.choice(["none", "content_free"], name="toy.calibrate")
    world.specs.update(graph.declared_parameters())
    names = [
        {edit.name for edit in u.edits} for u in await Auto().propose(world.context(count=20)) if u.source == "joint"
    ]
    assert names
    assert all(found == {"toy.instruction", "toy.calibrate"} for found in names)


@pytest.mark.anyio
async def test_tpe_takes_over_once_eight_settings_were_measured(make: Any) -> None:
    graph.number(0.0, 1.0, name="v.threshold", default=0.5)
    graph.choice(["a", "b", "c"], name="v.mode")
    world = make.classifier()
    world.specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("v.")}
    context = world.context(rollouts=(), count=8)
    first = await Auto().propose(context)
    assert sources(first) == {"values"}
    history = [
        PastProposal(
            apply_edits(context.parent, u.edits, context.specs).hash, context.parent.hash, u, n / 10, accepted=n == 3
        )
        for n, u in enumerate(first)
    ]
    assert sources(await Auto().propose(world.context(rollouts=(), history=history[:7], count=3))) == {"values"}
    later = [await Auto().propose(world.context(rollouts=(), history=history, count=3)) for _ in range(2)]
    assert later[0] == later[1]
    assert sources(later[0]) == {"tpe"}
    assert "TPE over 8 measured settings" in later[0][0].rationale


@pytest.mark.anyio
@pytest.mark.parametrize("strong", [True, False])
async def test_principles_and_code_have_their_own_arms(make: Any, strong: bool) -> None:
    world = make.classifier()
    model = "fake/strong-70b" if strong else "embedded/smollm2-135m-instruct"
    world.lm, world.model = LM(make.client(written, model)), model
    graph.principles(["Be kind."], name="toy.rules")
    world.specs["toy.fn.code"] = graph.ParameterSpec("toy.fn.code", "code", "def fn():\n    return 1")
    world.specs.update(graph.declared_parameters())
    assert {arm.optimizer.name for arm in Auto().arms(world.context())} >= ({"playbook", "code"} if strong else set())
    del world.specs["toy.instruction"]
    names = {arm.optimizer.name for arm in Auto().arms(world.context())}
    assert names == {"playbook", "code", "optoprime"}
    world.lm = None
    assert Auto().arms(world.context()) == []


def test_values_tries_neighbours_and_other_options(make: Any) -> None:
    graph.number(0.0, 1.0, name="v.threshold", default=0.5)
    graph.choice(["a", "b", "c"], name="v.mode")
    world = make.classifier()
    world.specs = {name: spec for name, spec in graph.declared_parameters().items() if name.startswith("v.")}
    updates = Values().propose(world.context(rollouts=(), count=20))
    edits = [update.edits[0] for update in updates]
    assert sorted(str(edit.value) for edit in edits if isinstance(edit, SetChoice)) == ["b", "c"]
    numbers = [edit.value for edit in edits if isinstance(edit, SetNumber)]
    assert len(numbers) == len(set(numbers)) >= 4
    assert all(0.0 <= number <= 1.0 and number != 0.5 for number in numbers)


# --- resolving and templates -----------------------------------------------------------------------------------------


class Own:
    def propose(self, context: ProposeContext) -> list[Update]:
        return [Update((SetText("toy.instruction", GOOD),), "", "own")]


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_name_resolves(name: str) -> None:
    assert resolve_optimizer(name).name == name


@pytest.mark.anyio
async def test_several_optimizers_take_turns(make: Any) -> None:
    world = make.classifier(demos=True)
    both = resolve_optimizer("instructions-free + demonstrations")
    assert both.name == "instructions-free+demonstrations"
    updates = both.propose(world.context(count=6))
    assert not isinstance(updates, list)
    found = await updates
    assert [update.source for update in found].count("demonstrations") == 3


@pytest.mark.anyio
async def test_any_object_with_propose_is_an_optimizer(make: Any) -> None:
    optimizer = resolve_optimizer(Own())
    assert optimizer.name == "Own"
    assert isinstance(optimizer, Optimizer)
    assert optimizer.propose(make.classifier().context()) == Own().propose(make.classifier().context())
    ready = OptoPrime()
    assert resolve_optimizer(ready) is ready


@pytest.mark.parametrize("wrong", ["optoprim", "auto+", "", 3, object(), OptoPrime])
def test_what_is_no_optimizer_is_a_user_error(wrong: Any) -> None:
    with pytest.raises(UserError):
        resolve_optimizer(wrong)


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        ("", "has no fragment"),
        ("=== optoprime.nothing ===\nx", "t.txt:1: there is no fragment 'optoprime.nothing'"),
        ("=== optoprime.task ===\n{problem}", "must contain the placeholder {output_format}"),
        ("\n=== optoprime.task ===\n{problem} {output_format} {colour}", "t.txt:2: the fragment"),
        ("=== optoprime.system ===\na\n=== optoprime.system ===\nb", "stands twice"),
        ("===  ===\n", "is no fragment header"),
    ],
)
def test_a_bad_template_file_is_one_clear_sentence(text: str, clause: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        resolve_optimizer("optoprime", template=path)
    assert clause in str(error.value)


def test_a_missing_template_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        resolve_optimizer("auto", template=tmp_path / "none.txt")


@pytest.mark.anyio
async def test_a_template_file_overrides_fragments_and_adds_frames(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    text = (
        '=== optoprime.task ===\nMY TASK {"json": 1} {problem} {output_format}\n'
        "=== head.label.mine +0.50 ===\nHere you choose among {labels_comma}.\n"
    )
    path.write_text(text, encoding="utf-8")
    world = make.classifier()
    optimizer = OptoPrime(template=path)
    assert 'MY TASK {"json": 1}' in optimizer.messages(world.context())[1]["content"]
    free = resolve_optimizer("instructions-free", template=path).propose(world.context())
    assert not isinstance(free, list)
    [update] = await free
    assert "Here you choose among" in str(update.edits[0].to_dict()["text"])
    assert "MY TASK" not in load_templates()["optoprime.task"].text
