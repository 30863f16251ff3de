"""Meta-training: it can be killed and gone on with, it refuses what does not fit, and its switches do what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentopt.errors import RunError, UserError
from agentopt.weights.finetuning import Stop
from agentopt.weights.fold import Folder, FoldTask, MetaResult, Question
from agentopt.weights.fold._events import Event, Stepped, Validated, Warned, Working
from agentopt.weights.fold._guard import Guard
from tests.weights.fold import tiny

torch: Any = pytest.importorskip("torch")

TASKS, VAL = tiny.tasks(12), tiny.tasks(4, seed=1)
SHORT: dict[str, Any] = {"steps": 6, "lr": 1e-2, "documents": 2, "questions": 1, "eval_every": 2, "eval_tasks": 2}


def folder(**fields: Any) -> Folder:
    model, tokenizer = tiny.tiny_model(width=16, layers=1, spread=tiny.SPREAD)
    return Folder(model, tokenizer, options=tiny.options(**fields))


def trained(made: Folder, **fields: Any) -> tuple[MetaResult, list[Event]]:
    seen: list[Event] = []
    result = made.meta_train(TASKS, val=VAL, on_event=seen.append, **{**SHORT, **fields})
    return result, seen


def tensors(made: Folder) -> dict[str, Any]:
    return made.meta.state_dict()


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Killed(Exception):
    pass


def killing(step: int) -> Callable[[Event], None]:
    def see(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return see


def history(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] != "resumed"]


def test_a_killed_run_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = folder(inner_steps=2, trains="all")
    expected, _ = trained(whole, out=tmp_path / "whole", accumulate=2)
    again = folder(inner_steps=2, trains="all")
    with pytest.raises(Killed):
        again.meta_train(TASKS, val=VAL, out=tmp_path / "cut", on_event=killing(5), **SHORT, accumulate=2)
    fresh = folder(inner_steps=2, trains="all")
    found, seen = trained(fresh, out=tmp_path / "cut", resume=True, accumulate=2)
    assert [event.kind for event in seen if event.kind in ("resumed", "planned")] == ["resumed"]
    assert same(tensors(fresh), tensors(whole))
    assert found.curve == expected.curve and found.best_step == expected.best_step
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir() if path.name != ".lock") == [
        "base",
        "chat_template.jinja",
        "events.jsonl",
        "init.safetensors",
        "meta.json",
        "run.json",
        "tokenizer",
    ]


def test_a_stopped_run_keeps_its_last_step_and_a_finished_one_gives_its_result(tmp_path: Path) -> None:
    stop, out = Stop(), tmp_path / "meta"

    def see(event: Event) -> None:
        stop.wanted = isinstance(event, Stepped) and event.step == 3

    with pytest.raises(KeyboardInterrupt):
        folder().meta_train(TASKS, val=VAL, out=out, on_event=see, stop=stop, **SHORT)
    made = folder()
    result, seen = trained(made, out=out)
    assert [event.step for event in seen if isinstance(event, Stepped)] == [4, 5, 6]
    straight = folder()
    trained(straight)
    assert same(tensors(made), tensors(straight))
    later = folder()
    again, seen = trained(later, out=out)
    assert again == result and not seen
    assert same(tensors(later), tensors(made)) and later.gate == made.gate


def test_a_run_that_ends_while_it_validates_validates_first_when_it_goes_on(tmp_path: Path) -> None:
    def see(event: Event) -> None:
        if isinstance(event, Working) and event.what == "validating after step 4":
            raise KeyboardInterrupt

    made, straight = folder(), folder()
    with pytest.raises(KeyboardInterrupt):
        made.meta_train(TASKS, val=VAL, out=tmp_path, on_event=see, **SHORT)
    again = folder()
    _, seen = trained(again, out=tmp_path)
    assert [event.step for event in seen if isinstance(event, (Stepped, Validated))] == [4, 5, 6, 6]
    trained(straight)
    assert same(tensors(again), tensors(straight))


def test_a_folder_takes_only_its_own_run(tmp_path: Path) -> None:
    out = tmp_path / "meta"
    with pytest.raises(Killed):
        folder().meta_train(TASKS, val=VAL, out=out, on_event=killing(1), **SHORT)
    with pytest.raises(UserError, match=r"found a run with lr 0.01, now 0.02"):
        trained(folder(), out=out, lr=0.02)
    with pytest.raises(UserError, match="found a run with tasks"):
        folder().meta_train(TASKS[:-1], val=VAL, out=out, **SHORT)
    with pytest.raises(UserError, match="nothing to resume"):
        trained(folder(), out=tmp_path / "none", resume=True)
    with pytest.raises(UserError, match="its meta-training is not done"):
        Folder.load(out)
    with pytest.raises(UserError, match="more than the 9 steps of warmup"):
        trained(folder(), out=tmp_path / "new", warmup=9)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(UserError, match=r"found notes.txt and no run"):
        trained(folder(), out=tmp_path / "mine")

    def second(event: Event) -> None:
        if isinstance(event, Stepped):
            with pytest.raises(UserError, match="another run is writing here"):
                trained(folder(), out=out)

    folder().meta_train(TASKS, val=VAL, out=out, on_event=second, **SHORT)


def test_the_single_task_form_recalls_nothing_and_static_rates_stay() -> None:
    made = folder(multi_task=False, learn_lr=False, unroll=0)
    before = {name: tensor.clone() for name, tensor in made.meta.rates.items()}
    result, seen = trained(made)
    assert result.validation["recall_exact"] is None
    assert all(event.recall is None for event in seen if isinstance(event, Stepped))
    assert same(before, made.meta.rates)
    learning = folder(multi_task=False, unroll=0)
    trained(learning)
    assert not same(before, learning.meta.rates)


def test_the_best_validation_is_kept_and_patience_ends_a_run() -> None:
    made = folder()
    result, seen = trained(made, steps=40, patience=1, lr=1e-30)
    points = [event for event in seen if isinstance(event, Validated)]
    assert result.stop_reason == "1 validations without a better one"
    assert not points[-1].best and points[-2].best and result.best_step == points[-2].step
    assert result.steps == points[-1].step < 40


def test_all_weights_can_be_folded(tmp_path: Path) -> None:
    made = folder(adapts="all", rule="sgd", lr=0.1)
    own = {name: tensor.clone() for name, tensor in made.model.named_parameters()}
    trained(made, out=tmp_path / "meta", steps=2)
    assert all(torch.equal(tensor, own[name]) for name, tensor in made.model.named_parameters())
    adapter = made.fold(["ann owns drum", "bob owns kite"])
    asked = made.ask_many(adapter, ["ann owns?", "bob owns?"], choices=tiny.THINGS, gate=False)
    adapter.save(tmp_path / "adapter")
    with Folder.load(tmp_path / "meta") as other:
        assert same(tensors(other), tensors(made))
        again = other.load_adapter(tmp_path / "adapter")
        assert same(again.state, adapter.state)
        assert other.ask_many(again, ["ann owns?", "bob owns?"], choices=tiny.THINGS, gate=False) == asked


def test_the_guard_keeps_unrelated_prompts_as_they_were() -> None:
    prompts = ["what does a lot", "a lot so:"]

    def divergence(weight: float) -> float:
        _, seen = trained(folder(guard_weight=weight), guard=prompts, steps=8, eval_every=8)
        found = [event.guard for event in seen if isinstance(event, Stepped)]
        assert all(one is not None and one >= 0 for one in found)
        return float(found[-1] or 0)

    assert divergence(100.0) < divergence(1e-9) / 5
    made = folder()
    same_as_base = {name: torch.zeros_like(tensor)[None] for name, tensor in made.meta.init.items()}
    assert float(Guard(made.kit, prompts, 0).divergence(same_as_base, 1)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="guard_weight above 0"):
        trained(folder(), guard=prompts)


def test_token_weights_are_learned() -> None:
    made = folder(token_weights=True)
    before = {name: tensor.clone() for name, tensor in made.meta.token_weights.items()}
    trained(made)
    assert not same(before, made.meta.token_weights)


@pytest.mark.parametrize(
    ("tasks", "match"),
    [
        ([], "found no tasks"),
        ([FoldTask("a", (), (Question("ann owns?", "drum"),))], "'a' has no facts"),
        ([FoldTask("a", ("ann owns drum",), (Question("ann owns?", "drum", (1,)),))], "relevant names fact 1"),
        ([FoldTask("a", ("ann owns drum",), (Question(" ", "drum"),))], "empty question"),
        ([FoldTask("a", ("ann owns drum",), (Question("ann owns?", "drum"),))], "expected at least 2"),
        ([FoldTask("a", (" ",), (Question("ann owns?", "drum"),))] * 2, "expected at least 2"),
    ],
)
def test_tasks_that_cannot_be_learned_from_are_refused(tasks: list[FoldTask], match: str) -> None:
    with pytest.raises(UserError, match=match):
        folder().meta_train(tasks)


def test_losses_that_are_no_numbers_end_the_run_with_advice() -> None:
    seen: list[Event] = []
    longer: dict[str, Any] = {**SHORT, "steps": 20, "eval_every": 20}
    made = folder(rule="sgd", lr=3e38)
    with pytest.raises(RunError, match=r"10 steps in a row \(to step 10\) failed; use a lower inner lr \(--inner-lr\)"):
        made.meta_train(TASKS, val=VAL, on_event=seen.append, **longer)
    (told,) = (event.message for event in seen if isinstance(event, Warned))
    assert told.startswith("step 1 is left out. ") and ("'0-" in told or "no number" in told)
    with pytest.raises(RunError, match="validation loss after step 2 is no number"):
        trained(folder(rule="sgd", lr=1e30))


def test_warnings_are_told_once() -> None:
    seen: list[Event] = []
    long = [
        FoldTask(
            str(n),
            ("ann owns drum . " * 8 + f"{tiny.NAMES[n]} owns", "bob owns kite"),
            (Question("bob owns?", "kite"),),
        )
        for n in range(4)
    ]
    result = folder(row_tokens=8).meta_train(long, on_event=seen.append, **SHORT)
    told = [event.message for event in seen if isinstance(event, Warned)]
    assert told == result.warnings and len(told) == 2
    assert told[0].startswith("4 of 4 tasks have facts longer than a row")
    assert "no question says which facts are relevant" in told[1]
