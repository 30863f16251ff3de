"""Tasks: where the prompt goes, which rows count, what is an agreement, and clear sentences for what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules.gating._task import Task, TaskOptions
from agentopt.errors import UserError
from agentopt.evaluation import Dataset, Example, load_program

ROWS: list[dict[str, Any]] = [{"question": f"q{i}", "label": "yes"} for i in range(6)]


def answer(question: str, prompt: str) -> str:
    return f"{prompt}/{question}"


async def run(task: Task, text: str, original: str = "old") -> Any:
    opened = task.open(original)
    candidate, rows = opened.with_prompt(text, opened.dataset)
    with candidate.active():
        return await opened.program.run(rows[0])


@pytest.mark.anyio
async def test_the_text_goes_into_the_argument() -> None:
    assert await run(Task(ROWS, answer, "exact_match"), "new") == "new/q0"

    def renamed(question: str, *, system: str) -> str:
        return f"{system}!{question}"

    assert await run(Task(ROWS, renamed, "exact_match", prompt="system"), "new") == "new!q0"


@pytest.mark.anyio
async def test_the_text_goes_into_the_only_prompt_parameter_or_the_one_with_the_same_text() -> None:
    first = ao.prompt("old", name="first")

    def program(question: str) -> str:
        return f"{first} {question}"

    task = Task(ROWS, program, "exact_match")
    assert await run(task, "new", "something else") == "new q0"
    assert not task.open("old").with_prompt("old", task.open("old").dataset)[0].values  # the declared default
    ao.prompt("other", name="second")
    assert await run(task, "new", "old") == "new q0"
    with pytest.raises(UserError, match=r"cannot tell where the prompt goes; it has prompt parameters first, second"):
        task.open("neither")
    assert await run(Task(ROWS, program, "exact_match", prompt="first"), "new", "neither") == "new q0"


def test_a_prompt_that_is_nowhere_is_told() -> None:
    def program(question: str) -> str:
        return question

    with pytest.raises(UserError, match="no prompt parameter and arguments question"):
        Task(ROWS, program, "exact_match").open("old")
    with pytest.raises(UserError, match="no argument 'system'"):
        Task(ROWS, answer, "exact_match", prompt="system").open("old")


def test_rows_with_equal_ids_stay_pairs_and_the_prompt_is_no_column() -> None:
    rows = Dataset("mine", [Example(inputs={"question": "q"}, expected="a"), Example(inputs={"question": "q"})])
    opened = Task(rows, answer, "exact_match").open("old")
    given = [opened.with_prompt(text, opened.dataset)[1] for text in ("old", "new")]
    assert given[0].ids == given[1].ids == rows.ids
    assert opened.unit(rows[0]) == opened.unit(rows[1])


def test_accuracy_needs_labels_and_a_metric() -> None:
    unlabelled = [{"question": "q"}]
    kinds = {
        "labels": Task(ROWS, answer, "exact_match").open("old").kind,
        "no labels": Task(unlabelled, answer, "exact_match").open("old").kind,
        "no metric": Task(ROWS, answer).open("old").kind,
        "own metric": Task(unlabelled, answer, lambda output, expected, example: 1.0).open("old").kind,
    }
    assert kinds == {
        "labels": "accuracy",
        "no labels": "agreement",
        "no metric": "agreement",
        "own metric": "accuracy",
    }


def files(folder: Path) -> dict[str, str]:
    (folder / "agent.py").write_text("def answer(q, prompt):\n    return 'yes'\n", encoding="utf-8")
    for name, count in (("train", 3), ("val", 2), ("test", 1)):
        lines = [json.dumps({"question": f"{name}{i}", "truth": "yes", "doc": i // 2}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "val", "test")}


def test_the_settings_of_a_configuration_file_make_a_task(tmp_path: Path) -> None:
    paths = files(tmp_path)
    settings = {
        "target": f"{tmp_path / 'agent.py'}:answer",
        **paths,
        "metric": "exact_match",
        "inputs": ["q=question"],
        "label": "truth",
        "cluster": "doc",
        "timeout": 5,
        "concurrency": 2,
        "models": {},
        "repeats": None,
        "optimizer": "auto",
    }
    task = Task.from_config(settings)
    opened = task.open("old")
    assert len(opened.dataset) == 5 and opened.dataset.name == "train+val" and opened.argument == "prompt"
    assert opened.evaluation(3).timeout == 5 and opened.evaluation(3).seed == 3 and opened.evaluation(3).repeats == 1
    assert opened.unit(opened.dataset[0]) == opened.unit(opened.dataset[1]) == 0
    only = Task.from_config({**settings, "train": None, "val": None}).open("old")
    assert [example.inputs["q"] for example in only.dataset] == ["test0"]
    with pytest.raises(UserError, match="no target"):
        Task.from_config({**settings, "target": None})
    with pytest.raises(UserError, match="no data"):
        Task.from_config({"target": "a.py:b"})


def test_a_program_may_be_a_path_or_loaded(tmp_path: Path) -> None:
    files(tmp_path)
    path = f"{tmp_path / 'agent.py'}:answer"
    options = TaskOptions(inputs=("question",), label="truth")
    for program in (path, load_program(path)):
        assert len(Task(tmp_path / "train.jsonl", program, "exact_match", options=options).open("old").dataset) == 3
    with pytest.raises(UserError, match="no such file"):
        Task(ROWS, "absent.py:answer", "exact_match").open("old")


def test_empty_data_is_told() -> None:
    with pytest.raises(UserError, match="no rows"):
        Task(Dataset("none", []), answer, "exact_match").open("old")


@pytest.mark.parametrize(
    "bad",
    [
        {"score_range": (1, 0)},
        {"select_share": 0},
        {"gated": 0},
        {"block": 0},
        {"repeats": 0},
        {"concurrency": 0},
        {"sequential": True, "gated": 2},
    ],
)
def test_options_outside_their_range_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        TaskOptions(**bad)


def test_clusters_are_columns_or_functions() -> None:
    rows = [{"question": f"q{i}", "expected": "a", "doc": ["a", i // 2]} for i in range(4)]
    by_column = Task(rows, answer, "exact_match", options=TaskOptions(cluster="doc")).open("old")
    assert by_column.unit(by_column.dataset[0]) == by_column.unit(by_column.dataset[1])
    assert by_column.unit(by_column.dataset[0]) != by_column.unit(by_column.dataset[2])
    options = TaskOptions(cluster=lambda example: example.inputs["question"] < "q2")
    by_function = Task(rows, answer, "exact_match", options=options).open("old")
    assert [by_function.unit(example) for example in by_function.dataset] == [True, True, False, False]
