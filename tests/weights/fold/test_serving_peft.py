"""What a folder says of an answer, peft says too, from the adapter folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentopt.weights.fold import Adapter, Folder
from tests.weights.fold import tiny
from tests.weights.fold.forced import Case, Said, compare, said

torch = pytest.importorskip("torch")

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TASKS = tiny.tasks(2, seed=7, facts=4, questions=4)


def cases(folder: Folder) -> list[Case]:
    """All questions of both knowledge bases with their answers."""
    codec = folder.codec
    return [
        Case(task.id, [*codec.lead, *codec.question(asked.text)], list(codec.response(asked, task.facts).ids))
        for task in TASKS
        for asked in task.questions
    ]


def by_folder(folder: Folder, adapters: dict[str, Adapter]) -> list[Said]:
    found: list[Said] = []
    for case in cases(folder):
        with folder.engine.using(adapters[str(case.adapter)].state):
            found.append(said(folder.model, case))
    return found


def by_peft(folder: Folder, base: Path, paths: dict[str, Path], dtype: Any) -> list[Said]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (first, path), *rest = paths.items()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(model, str(path), adapter_name=first)
    for name, other in rest:
        model.load_adapter(str(other), adapter_name=name)
    model.eval()
    found: list[Said] = []
    for case in cases(folder):
        model.set_adapter(str(case.adapter))
        found.append(said(model, case))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_peft_says_what_the_folder_says(tiny_meta: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    with Folder.load(tiny_meta, device="cpu") as trained:
        learned = trained.meta.state_dict()
        base = tmp_path / "base"
        model, tokenizer = tiny.tiny_model(spread=tiny.SPREAD)
        model.to(getattr(torch, dtype)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    with Folder(base, options=tiny.OPTIONS, dtype=dtype, device="cpu") as folder:
        folder.meta.load_state_dict(learned)
        adapters = {task.id: one for task, one in zip(TASKS, folder.fold_many([t.facts for t in TASKS]), strict=True)}
        paths = {name: adapter.save(tmp_path / name) for name, adapter in adapters.items()}
        ours, theirs = by_folder(folder, adapters), by_peft(folder, base, paths, getattr(torch, dtype))
    found = compare(ours, theirs)
    assert found.difference <= tolerance
    assert all(margin <= tolerance for margin in found.flips)
    assert min(sum(one.logprobs) for one in ours) > -2, "the folds hold their facts"


def test_a_trained_base_is_what_the_adapter_names(tiny_base: Path, tmp_path: Path) -> None:
    """With `trains="all"` peft finds the base that goes with the adapter in the adapter's own configuration."""
    options = tiny.OPTIONS.model_copy(update={"trains": "all"})
    short = tiny.TRAINING.model_copy(update={"steps": 2, "eval_every": 2, "eval_tasks": 2})
    with Folder(tiny_base, options=options, device="cpu") as folder:
        folder.meta_train(tiny.tasks(40), options=short, out=tmp_path / "meta")
        adapters = {task.id: folder.fold(task.facts) for task in TASKS}
        paths = {name: adapter.save(tmp_path / name) for name, adapter in adapters.items()}
        config = json.loads((paths[TASKS[0].id] / "adapter_config.json").read_text(encoding="utf-8"))
        theirs = by_peft(folder, Path(config["base_model_name_or_path"]), paths, torch.float32)
        assert compare(by_folder(folder, adapters), theirs).difference <= 1e-3
        plain = by_peft(folder, tiny_base, paths, torch.float32)
        assert compare(by_folder(folder, adapters), plain).difference > 1e-2


def test_what_is_asked_is_what_peft_writes(tiny_folder: Folder, tiny_base: Path, tmp_path: Path) -> None:
    """Greedy text of peft, parsed by the format, is the answer of `Folder.ask`."""
    adapters = {task.id: tiny_folder.fold(task.facts) for task in TASKS}
    paths = {name: adapter.save(tmp_path / name) for name, adapter in adapters.items()}
    theirs = by_peft(tiny_folder, tiny_base, paths, torch.float32)
    asked = [(task, question) for task in TASKS for question in task.questions]
    for (task, question), one in zip(asked, theirs, strict=True):
        text = tiny_folder.tokenizer.decode(one.written, skip_special_tokens=True)
        answer = tiny_folder.ask(adapters[task.id], question.text)
        assert tiny_folder.codec.parse(text)[1].strip() == answer.text
