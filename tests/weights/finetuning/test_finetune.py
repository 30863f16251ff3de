"""A run from rows to a checked model, in this process, on a model of two layers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agentopt.errors import AgentoptError, RunError, UserError
from agentopt.weights.finetuning import (
    Event,
    FinetuneResult,
    Stop,
    finetune,
    load_finetuned,
    make_options,
    methods,
    options_of,
)
from agentopt.weights.finetuning._material import Material
from tests.weights.moods import LABELS, PROMPT, moods, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moods(tmp_path_factory.mktemp("moods") / "project", 64)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moods(tmp_path_factory.mktemp("larger") / "project", 160)


def values(project: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": str(project / "model"),
        "data": str(project / "rows.jsonl"),
        "prompt": PROMPT,
        "labels": LABELS,
        "method": "zo-sgd-sign",
        "lr": 3e-3,
        "steps": 8,
        "batch": 8,
        "eval_every": 4,
        "patience": 0,
    }
    return {**given, **changes}


def run(project: Path, out: Path | str, stop: Stop | None = None, **changes: Any) -> FinetuneResult:
    return finetune(make_options(values(project, **changes)), out=out, stop=stop)


def notes(project: Path, **changes: Any) -> list[str]:
    return Material.load(make_options(values(project, **changes))).notes


def weights(folder: Path) -> dict[str, Any]:
    return load_file(next(folder.glob("*model.safetensors")))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StopAt:
    """Sets `wanted` when a step is done, as a signal handler would."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def __call__(self, event: Event) -> None:
        if event.kind == "stepped" and event.to_dict()["step"] == self.step:
            self.stop.wanted = True


# --- methods and what they write -------------------------------------------------------------------------------------


def test_gradients_learn_the_task_and_the_claim_says_so(larger: Path) -> None:
    result = run(larger, "out", method="lora", lr=2e-2, steps=30, eval_every=10)
    assert result.claim.status == "improved"
    assert result.claim.text.startswith("Improved: accuracy 0.")
    assert result.test["tuned"] > 0.9 > result.test["majority"]
    assert set(result.claim.against) > {"zero-shot"}
    assert result.log_bytes == 0
    assert not Path("out", "checkpoint.safetensors").exists()
    model, tokenizer = load_finetuned("out")
    ids = tokenizer("the film was kind and the room very sweet It was", return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0, -1]
    great, terrible = tokenizer.convert_tokens_to_ids(["great", "terrible"])
    assert logits[great] > logits[terrible]


def test_zeroth_order_goes_back_to_its_best_step_by_the_log(larger: Path) -> None:
    result = run(larger, "out", method="fzoo", lr=6e-2, eval_every=4)
    best = max(result.curve, key=lambda point: (point["score"], -point["loss"]))
    assert 0 < result.best_step == best["step"] < result.steps_done
    assert result.validation["tuned"] == best["score"]
    shorter = run(larger, "shorter", method="fzoo", lr=6e-2, steps=result.best_step, eval_every=4)
    assert shorter.best_step == result.best_step
    assert equal(weights(Path("out")), weights(Path("shorter")))
    assert FinetuneResult.from_dict(json.loads(Path("out", "result.json").read_text("utf-8"))) == result


@pytest.mark.parametrize("method", ["sparse-mezo", "zo-adam", "grzo", "lozo", "adamw"])
def test_an_interrupted_run_goes_on_bit_for_bit(project: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": method, "lr": 1e-3, "steps": 6, "eval_every": 3, "schedule": "linear"}
    options = make_options(values(project, **changes))
    whole = finetune(options, out="whole")
    at = StopAt(4)
    with pytest.raises(KeyboardInterrupt):
        finetune(options, out="parts", on_event=at, stop=at.stop)
    assert not Path("parts", "result.json").exists()
    seen: list[Event] = []
    parts = finetune(options, out="parts", resume=True, on_event=seen.append)
    assert "resumed" in [event.kind for event in seen]
    assert parts.curve == whole.curve
    assert parts.claim == whole.claim
    assert parts.test == whole.test
    if whole.best_step:
        assert equal(weights(Path("whole")), weights(Path("parts")))


@pytest.mark.parametrize(
    "changes",
    [
        {"tune": "lora", "merge": True},
        {"tune": "lora", "quantize_base": "int8", "method": "adamw"},
        {"dtype": "bfloat16", "method": "mezo", "lr": 1e-2},
        {"schedule": "cosine", "warmup": 2, "micro_batch": 3, "weight_decay": 0.1},
        {"objective": "accuracy", "eps": 0.05, "lr": 1e-3},
        {"objective": "reward.py:score", "eps": 0.1, "new_tokens": 1},
        {
            "kind": "generation",
            "prompt": None,
            "labels": None,
            "data": "texts.jsonl",
            "method": "adamw",
            "new_tokens": 2,
        },
        {"kind": "choice", "prompt": None, "labels": None, "data": "choices.jsonl", "method": "adamw"},
    ],
    ids=str,
)
def test_what_is_trained_loads_back(project: Path, changes: dict[str, Any]) -> None:
    texts = [json.loads(line) for line in (project / "rows.jsonl").read_text("utf-8").splitlines()][:80]
    words = ["terrible", "great"]
    made = {
        "texts.jsonl": [{"prompt": f"{row['text']} It was", "completion": words[row["label"]]} for row in texts],
        "choices.jsonl": [
            {"question": f"{row['text']} It was", "choices": words, "answer": row["label"]} for row in texts
        ],
    }
    Path("reward.py").write_text("def score(output, expected, example):\n    return len(output) / 10\n", "utf-8")
    for name, rows in made.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run(project, "out", **changes)
    assert result.steps_done == 8
    assert all(0 <= point["score"] <= 1 for point in result.curve)
    if result.best_step:
        assert result.checked.startswith("loaded back with")
        assert Path("out", "merged", "model.safetensors").exists() == ("merge" in changes)
    else:
        assert not list(Path("out").glob("*.safetensors"))


def test_a_prefix_is_written_as_peft_reads_it(project: Path) -> None:
    from agentopt.weights.finetuning import _saving as saving
    from agentopt.weights.finetuning._subject import prepare

    options = make_options(values(project, tune="prefix", prefix_tokens=3))
    subject, material = prepare(options), Material.load(options)
    material.encode(subject.tokenizer)
    with torch.no_grad():
        for weight in subject.trained().values():
            weight.mul_(1.5)
    expected = material.sample(subject.model)
    Path("out").mkdir()
    saving.save(subject, Path("out"))
    assert saving.check(Path("out"), options, expected, None, material.sample).startswith("loaded back with peft")
    with pytest.raises(RunError, match="loads back with other answers"):
        saving.check(Path("out"), options, [value - 1 for value in expected], None, material.sample)


def test_a_rate_is_measured(project: Path) -> None:
    seen: list[Event] = []
    options = make_options(values(project, lr="auto", method="mezo", steps=2, eval_every=2))
    result = finetune(options, out="out", on_event=seen.append)
    found = next(event for event in seen if event.kind == "rate_found").to_dict()
    assert result.lr == found["lr"] > 0
    assert len(found["tried"]) > 2


def test_two_workers_give_the_weights_of_one(project: Path) -> None:
    changes: dict[str, Any] = {"steps": 4, "eval_every": 2, "lr": 1e-2, "micro_batch": 4}
    seen: list[Event] = []
    finetune(make_options(values(project, **changes, workers=2)), out="two", on_event=seen.append)
    finetune(make_options(values(project, **changes)), out="one")
    assert Path("one", "steps.zo").read_bytes() == Path("two", "steps.zo").read_bytes()
    assert [event.kind for event in seen].count("stepped") == 4


# --- resuming what has changed ---------------------------------------------------------------------------------------


def test_a_finished_run_gives_its_result_and_refuses_other_options(project: Path) -> None:
    first = run(project, "out", steps=4)
    assert run(project, "out", steps=4) == first
    assert options_of("out") == make_options(values(project, steps=4))
    with pytest.raises(UserError, match=r"found a run with batch 8, now 4"):
        run(project, "out", steps=4, batch=4)


def test_a_run_does_not_go_on_with_another_base_or_other_rows(project: Path) -> None:
    shutil.copytree(project / "model", "model")
    rows = write_rows(Path("rows.jsonl"), 80)
    own: dict[str, Any] = {"model": "model", "data": "rows.jsonl", "steps": 4}
    run(project, "out", **own)
    Path("out", "result.json").unlink()
    write_rows(rows, 80, seed=1)
    with pytest.raises(UserError, match="the data changed since this run began"):
        run(project, "out", **own)
    write_rows(rows, 80)
    tensors = load_file("model/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the base model changed since this run began"):
        run(project, "out", **own)


def test_a_folder_is_written_by_one_run_at_a_time(project: Path) -> None:
    def intrude(event: Event) -> None:
        if event.kind == "stepped":
            run(project, "out")

    with pytest.raises(UserError, match="another run is writing here"):
        finetune(make_options(values(project)), out="out", on_event=intrude)


def test_a_torn_line_of_events_is_left_out(project: Path) -> None:
    at = StopAt(2)
    options = make_options(values(project))
    with pytest.raises(KeyboardInterrupt):
        finetune(options, out="out", on_event=at, stop=at.stop)
    with Path("out", "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "stepped", "st')
    finetune(options, out="out")
    lines = Path("out", "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines if '"stepped"' in line] == list(range(1, 9))


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e30, "method": "fzoo"}, "is too large, give a tenth"),
        ({"eps": 1e-30}, "every measured loss is the same number; give a larger --eps"),
        ({"lr": 1e-30, "method": "mezo"}, "too small to change any float32 weight; give a larger --lr"),
        ({"eps": 1e-9, "objective": "accuracy"}, "no answer changed at eps 1e-09"),
    ],
)
def test_a_loss_that_never_moves_has_a_cause(
    project: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentopt.weights.finetuning._watch.FLAT_SCORE", 6)
    with pytest.raises(RunError, match="has not moved") as caught:
        run(project, "out", **changes)
    assert said in str(caught.value)
    assert Path("out", "steps.zo").exists()


def test_a_loss_that_is_no_number_names_the_step(project: Path) -> None:
    original = Material.objective

    def broken(self: Material, step: int, rank: int, world: int) -> Any:
        return original(self, step, rank, world) if step < 3 else lambda _model: float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Material, "objective", broken)
        with pytest.raises(RunError, match=r"step 4: the loss is nan.*--lr 0\.0003"):
            run(project, "out")
    assert run(project, "out").steps_done == 8
    run(project, "whole")
    assert Path("out", "steps.zo").read_bytes() == Path("whole", "steps.zo").read_bytes()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("Tried to allocate 2.00 GiB")])
def test_out_of_memory_says_what_needs_less(project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:

    def full(*_arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(Material, "objective", full)
    with pytest.raises(RunError, match="out of memory while training") as caught:
        run(project, "out")
    said = str(caught.value)
    assert "--micro-batch 4" in said
    assert "--tune lora --quantize-base int8" in said
    assert ("2.00 GiB" in said) == isinstance(error, torch.OutOfMemoryError)


def test_what_cannot_fit_is_refused_before_training(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.weights.finetuning._memory.available", lambda _device: 1000)
    with pytest.raises(RunError, match=r"--method adamw needs 2\d\d kB for gradients and moments .* 1\.0 kB are free"):
        run(project, "out", method="adamw")
    assert run(project, "out2", steps=2).steps_done == 2


def test_rows_that_are_in_train_and_test_are_told(project: Path) -> None:
    data = str(project / "rows.jsonl")
    with pytest.raises(UserError, match=r"--test .*: all of its rows are in --data or --val too"):
        run(project, "out", val=data, test=data)
    assert not Path("out").exists()
    both = write_rows(Path("both.jsonl"), 90)  # the first 64 are the project's
    material = Material.load(make_options(values(project, val=data, test="both.jsonl")))
    assert material.rows == {"train": 64, "validation": 64, "test": 26}
    said = " ".join(material.notes)
    assert "64 test rows are left out" in said
    assert "64 rows are in both train and validation" in said
    rows = [line for line in both.read_text("utf-8").splitlines() if '"label": 1' in line]
    Path("one.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert any("no training row has the label '0'" in note for note in notes(project, data="one.jsonl"))


def test_few_test_rows_make_no_claim(project: Path) -> None:
    write_rows(Path("few.jsonl"), 40)
    result = run(project, "out", data="few.jsonl", method="adamw", lr=1e-2, steps=12)
    assert result.claim.status == "no_claim"
    assert "10 test rows are too few" in result.claim.text


@pytest.mark.parametrize("name", ["save_pretrained", "report.md", "result.json"])
def test_a_full_disk_at_the_end_loses_nothing(larger: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_arguments: Any, **_options: Any) -> Any:
        raise SafetensorError("No space left on device (os error 28)")

    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    changes: dict[str, Any] = {"method": "lora", "lr": 1e-2, "steps": 4}
    with monkeypatch.context() as patch:
        if name == "save_pretrained":
            patch.setattr("agentopt.weights.adapters.Adapters.save", full)
        else:
            patch.setattr(os, "replace", replace)
        with pytest.raises(RunError, match=r"out.*cannot be written \(No space left on device.*run the same command"):
            run(larger, "out", **changes)
    assert run(larger, "out", **changes).best_step


def test_a_mask_on_an_adapter_is_warned_of(project: Path) -> None:
    result = run(project, "out", method="sparse-mezo", tune="lora", steps=1)
    assert any("take --method mezo or fzoo" in warning for warning in result.warnings)


def test_every_method_is_described() -> None:
    found = methods()
    assert len({method.name for method in found}) == len(found) > 10
    for method in found:
        assert method.description and method.source
        assert make_options({"model": "m", "data": "d", "method": method.name}).first_order == (method.forwards is None)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none"},
        {"density": 0.5},
        {"mask_update": "stored"},
        {"workers": 3},
        {"micro_batch": 99},
        {"warmup": 8},
        {"merge": True},
        {"quantize_base": "int8"},
        {"method": "lora", "tune": "full"},
        {"method": "adamw", "population": 2},
        {"method": "adamw", "lr": "auto"},
        {"method": "forward-gradient", "objective": "accuracy"},
        {"test": "rows.jsonl"},
        {"rank": 4},
        {"method": "hizoo", "population": 2},
        {"method": "zo-conservative", "weight_decay": 0.1},
        {"tune": "lora", "prefix_tokens": 3},
        {"new_tokens": 4},
        {"colour": "red"},
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(project: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(AgentoptError) as caught:
        run(project, "out", **changes)
    assert caught.value.exit_code == 2
    assert not Path("out").exists()
