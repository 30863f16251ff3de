"""`agentopt runs forget`: what it deletes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentopt.cli._app import app
from agentopt.store import Store


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = str(tmp_path / "s.db")
    with Store.open(path) as opened:
        opened.create_run("run", {"kind": "serve"})
        for place in range(3):
            name = f"req_{place}"
            opened.put_trace("run", name, {"text": name})
            opened.put_exchange("run", name, name, {"session": f"s{place}", "key": "k"})
    return path


def forget(store: str, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["runs", "forget", *arguments, "--store", store])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def left(store: str) -> list[str]:
    with Store.open(store) as opened:
        return [row["id"] for row in opened.exchanges()]


def test_one_request_one_session_and_the_rest_by_age(store: str) -> None:
    assert forget(store, "--request", "req_0", "--dry-run") == (
        "would delete exchanges: 1, traces: 1, pieces of feedback: 0\n"
    )
    assert len(left(store)) == 3
    assert forget(store, "--request", "req_0").startswith("deleted exchanges: 1, traces: 1,")
    assert left(store) == ["req_1", "req_2"]
    said = json.loads(forget(store, "--session", "s1", "--key", "k", "--json", "--vacuum"))
    assert said == {"deleted": True, "exchanges": 1, "traces": 1, "feedback": 0, "runs": 0}
    assert "exchanges: 0" in forget(store, "--older-than", "1h")
    assert "exchanges: 0" in forget(store, "--older-than", "1h", "--run", "last")
    assert "exchanges: 1" in forget(store, "--run", "ru", "--dry-run")
    assert "exchanges: 1" in forget(store, "--older-than", "0h")
    assert left(store) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --older-than AGE, --session NAME, --key ID, --request ID or --run RUN"),
        (["--older-than", "soon"], "--older-than 'soon': expected a number and h, d or w"),
        (["--session", "s", "--dry-run", "--vacuum"], "--vacuum does nothing with --dry-run"),
    ],
)
def test_a_mistake_is_one_sentence_and_deletes_nothing(arguments: list[str], said: str, store: str) -> None:
    with pytest.raises(Exception, match=said):
        forget(store, *arguments)
    assert len(left(store)) == 3
