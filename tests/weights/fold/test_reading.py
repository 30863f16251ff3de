"""Files of tasks: what is written is read back, two forms of ProofWriter, and mistakes with their place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights.fold import FoldTask, Question, worlds
from agentopt.weights.fold._reading import load_tasks, save_tasks, split_tasks

OWN = {"facts": ["Ada is red.", "Red people are big."], "question": "Is Ada big?", "answer": "yes"}
LOGIC_LM = {
    "id": "X-OWA-1",
    "context": "The cat is red. If something is red then it sees the dog. Big things are old.",
    "question": "Based on this, is the following statement true, false, or unknown? The cat sees the dog.",
    "options": ["A) True", "B) False", "C) Unknown"],
    "answer": "A",
}
PUBLISHED = {
    "id": "AttNeg-OWA-D1-1",
    "theory": "The cat is red. Red things are big.",
    "triples": {"triple1": {"text": "The cat is red.", "representation": ""}},
    "rules": {"rule1": {"text": "Red things are big.", "representation": ""}},
    "questions": {
        "Q1": {
            "question": "The cat is big.",
            "answer": True,
            "QDep": 1,
            "strategy": "proof",
            "proofsWithIntermediates": [{"representation": "((triple1) -> (rule1 % int1))"}],
        },
        "Q2": {
            "question": "The cat is not red.",
            "answer": False,
            "QDep": 0,
            "strategy": "inv-proof",
            "proofs": "[(triple1)]",
        },
        "Q3": {
            "question": "The dog is big.",
            "answer": "Unknown",
            "QDep": 1,
            "strategy": "rconc",
            "proofs": "[(rule1 <- FAIL)]",
        },
    },
}


def test_generated_tasks_come_back_as_they_were(tmp_path: Path) -> None:
    tasks = worlds.rules(4, seed=1, kind="mixed") + worlds.kinship(4, seed=1, questions=2) + worlds.chains(3, seed=1)
    save_tasks(tasks, tmp_path / "tasks.jsonl")
    assert load_tasks(tmp_path / "tasks.jsonl") == tasks
    assert load_tasks(tmp_path / "tasks.jsonl", limit=3) == tasks[:3]
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.jsonl"]


texts = st.text(min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3), texts, texts), min_size=1, max_size=3))
def test_any_text_comes_back(tmp_path_factory: Any, rows: list[tuple[str, list[str], str, str]]) -> None:
    tasks = [
        FoldTask(name, tuple(facts), (Question(asked, answer, (0,), 2, (answer, answer + "!")),), {"n": [1, None]})
        for name, facts, asked, answer in rows
    ]
    path = tmp_path_factory.mktemp("any") / "tasks.jsonl"
    save_tasks(tasks, path)
    assert load_tasks(path) == tasks


def test_lines_with_the_same_facts_are_one_task() -> None:
    tasks = load_tasks(
        [
            OWN | {"id": 7, "relevant": [0, 1], "depth": 1, "choices": ["yes", "no"], "topic": "colour"},
            OWN | {"question": "Is Ada red?"},
            OWN | {"facts": ["Ada is red."]},
            OWN,
            OWN,
        ]
    )
    assert [len(task.questions) for task in tasks] == [3, 1]
    assert tasks[0].id == "7" and tasks[0].meta == {"topic": "colour"}
    assert tasks[0].questions[0] == Question("Is Ada big?", "yes", (0, 1), 1, ("yes", "no"))
    with pytest.raises(UserError, match="answered 'no', and 'yes' in an earlier row"):
        load_tasks([OWN, OWN | {"answer": "no"}])


def test_proofwriter_as_logic_lm_has_it(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    second = LOGIC_LM | {"question": "Is this so? The cat is old.", "answer": "C", "id": "X-OWA-2"}
    path.write_text(json.dumps([LOGIC_LM, second]), encoding="utf-8")
    (task,) = load_tasks(path)
    assert task.facts == ("The cat is red.", "If something is red then it sees the dog.", "Big things are old.")
    choices = ("true", "false", "unknown")
    assert task.questions == (
        Question("The cat sees the dog.", "true", (0, 1), 1, choices),
        Question("The cat is old.", "unknown", (), None, choices),
    )
    (other,) = load_tasks([LOGIC_LM | {"answer": "B"}])
    assert other.questions[0].relevant == ()  # our chainer does not agree, so it proves nothing here
    (free,) = load_tasks([LOGIC_LM | {"context": "It rained all day. Nobody went out."}])
    assert len(free.facts) == 2 and free.questions[0].depth is None


def test_proofwriter_as_it_was_published() -> None:
    (task,) = load_tasks([PUBLISHED])
    assert task.id == "AttNeg-OWA-D1-1" and task.facts == ("The cat is red.", "Red things are big.")
    assert [(one.answer, one.relevant, one.depth) for one in task.questions] == [
        ("true", (0, 1), 1),
        ("false", (0,), 0),
        ("unknown", (), None),
    ]
    (solved,) = load_tasks([{**PUBLISHED, "triples": {}, "rules": {}}])
    assert solved.questions[0].relevant == (0, 1) and solved.questions[0].choices == ("true", "false", "unknown")
    odd = {"Q1": {"question": "The cat is big.", "answer": False}, "Q2": {"question": "It rains.", "answer": "Unknown"}}
    (other,) = load_tasks([{**PUBLISHED, "triples": {}, "rules": {}, "questions": odd}])
    assert [(one.answer, one.relevant, one.depth) for one in other.questions] == [
        ("false", (), None),  # the chainer proves the opposite of the label
        ("unknown", (), None),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": []}, "row 1: facts: found an empty list"),
        ({"facts": "Ada is red."}, "facts: found text, expected a list"),
        ({"facts": ["Ada is red.", " "]}, "facts[1]: found blank text"),
        ({"answer": None}, "answer: found null, expected text"),
        ({"answer": ...}, "answer: found nothing"),
        ({"question": ""}, "question: found blank text"),
        ({"choices": ["no", "maybe"]}, "answer is 'yes', which is none of the choices (no, maybe)"),
        ({"choices": ["yes"]}, "two or more different texts"),
        ({"relevant": [2]}, "relevant: found 2, and there are 2 facts, numbered from 0 to 1"),
        ({"relevant": ["0"]}, "relevant: found text, expected numbers"),
        ({"relevant": [0, 0]}, "expected every place once"),
        ({"depth": -1}, "depth: found -1"),
        ({"relevent": [0]}, "unknown field 'relevent'; did you mean 'relevant'?"),
        ({"questions": [{"question": "a", "answers": "b"}]}, "questions[0]: unknown field 'answers'"),
        ({"questions": []}, "questions: found an empty list"),
        ({"meta": 3}, "meta: found a number"),
    ],
)
def test_mistakes_in_a_row_are_named(change: dict[str, Any], said: str) -> None:
    row = {name: value for name, value in (OWN | change).items() if value is not ...}
    with pytest.raises(UserError, match=re.escape(said)):
        load_tasks([row])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (LOGIC_LM | {"options": ["True"]}, "options: found 'True'"),
        (LOGIC_LM | {"answer": "D"}, "expected one of A, B, C"),
        (PUBLISHED | {"questions": {"Q1": {"question": "The cat is big."}}}, "questions.Q1.answer: found None"),
        (PUBLISHED | {"triples": {"triple1": "x"}}, "triples.triple1: found str, expected an object"),
    ],
)
def test_mistakes_in_proofwriter_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_tasks([row])


def test_files_that_are_none(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    good = json.dumps(OWN).encode()
    for path, said in (
        (tmp_path, "folder"),
        (tmp_path / "no.jsonl", "no such file"),
        (write("a.jsonl", good + b"\n{oops\n"), "line 2: invalid JSON"),
        (write("b.jsonl", good + b"\n\xff\xfe\x00\n"), "line 2: found bytes that are not UTF-8"),
        (write("c.jsonl", b"[1]\n"), "line 1: found"),
        (write("d.jsonl", b"\n"), "no tasks"),
        (write("e.bin", b"\x00\x01"), "cannot tell the format"),
        (write("f.jsonl", good + b"\n" + json.dumps(OWN | {"facts": []}).encode()), "line 2: facts"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            load_tasks(path)
        assert path.name in str(caught.value)
    for rows in ([], {"facts": []}, [3]):
        with pytest.raises(UserError):
            load_tasks(rows)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="limit is 0"):
        load_tasks([OWN], limit=0)
    with pytest.raises(UserError, match="cannot be written"):
        save_tasks([], tmp_path / "none" / "tasks.jsonl")
    with pytest.raises(UserError, match="meta cannot be written"):
        save_tasks([FoldTask("a", ("b",), (), {"c": object()})], tmp_path / "tasks.jsonl")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_knowledge_base_is_on_one_side_only(count: int, seed: int, shuffled: Any) -> None:
    tasks = [FoldTask(str(number), (f"fact {number // 2}", "b"), ()) for number in range(count)]
    tasks += [FoldTask("again", task.facts[::-1], ()) for task in tasks[:5]]
    parts = split_tasks(tasks, seed)
    keys = [{frozenset(task.facts) for task in part} for part in parts]
    assert sum(map(len, keys)) == len(keys[0] | keys[1] | keys[2]) == (count + 1) // 2
    assert sum(map(len, parts)) == len(tasks)
    if (count + 1) // 2 >= 3:
        assert all(parts)
    mixed = list(tasks)
    shuffled.shuffle(mixed)
    assert [{frozenset(task.facts) for task in part} for part in split_tasks(mixed, seed)] == keys


def test_shares_of_a_split() -> None:
    tasks = [FoldTask(str(number), (f"fact {number}",), ()) for number in range(100)]
    assert [len(part) for part in split_tasks(tasks)] == [80, 10, 10]
    assert [len(part) for part in split_tasks(tasks, shares=(0.5, 0.5, 0))] == [50, 50, 0]
    assert split_tasks(tasks, 1) != split_tasks(tasks, 2)
    with pytest.raises(UserError, match="add up to 1"):
        split_tasks(tasks, shares=(0.5, 0.6, 0.1))
