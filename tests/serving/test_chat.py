"""The ready program: what it asks the model is, turn for turn, what the gateway sends for the same candidate."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.evaluation import load_program
from agentopt.graph import ParameterSpec
from agentopt.models import Reply, Request, ToolCall
from agentopt.serving import chat
from agentopt.serving._types import CHAT
from agentopt.serving.variants import load_candidates

pytestmark = pytest.mark.anyio

DEMOS = [{"input": "1 + 1", "output": "2", "source": "x"}, {"input": "2 + 2", "output": "4", "source": "y"}]
HISTORIES: list[list[dict[str, Any]]] = [
    [],
    [{"role": "system", "content": "Be kind."}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
]


@pytest.fixture
def asked() -> list[Request]:
    """Every request that the model got."""
    found: list[Request] = []

    def answer(request: Request) -> Reply:
        found.append(request)
        call = ToolCall("c1", "look", {"b": 1, "a": [2]})
        return Reply("said", tool_calls=(call,) if request.tools else ())

    importlib.reload(chat)  # its parameters were declared outside this test
    ao.configure(models={"agent": ao.FunctionLM(answer, name="agent")})
    return found


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("system", ["", "Answer in one word."])
@pytest.mark.parametrize("cue", ["", "Answer:"])
@pytest.mark.parametrize("demos", [[], DEMOS])
async def test_what_is_measured_is_what_is_served(
    asked: list[Request],
    tmp_path: Path,
    history: list[dict[str, Any]],
    system: str,
    cue: str,
    demos: list[dict[str, str]],
) -> None:
    candidate = ao.Candidate({"served.system": system, "served.demos": demos, "served.cue": cue})
    candidate.save(tmp_path / "best.json")
    with candidate.active():
        assert await chat.reply(history=history, message="3 + 3") == "said"
    (model,) = load_candidates([f"v={tmp_path / 'best.json'}"], warn=lambda _: None)
    rewrite = model.variants[0].rewrite
    assert rewrite is not None
    sent = rewrite(CHAT, {"model": "v", "messages": [*history, {"role": "user", "content": "3 + 3"}]})
    assert list(asked[0].messages) == sent["messages"]


async def test_tool_calls_come_as_a_text_that_is_equal_for_equal_calls(asked: list[Request]) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    history = [{"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "c", "content": "r"}]
    said = await chat.reply(history=history, tools=tools)
    assert json.loads(said) == [{"name": "look", "arguments": {"a": [2], "b": 1}}]
    assert [turn["role"] for turn in asked[0].messages] == ["user", "tool"]


def test_the_program_declares_what_virtual_models_serve(asked: list[Request]) -> None:
    program = load_program("agentopt.serving.chat:reply")
    kinds: dict[str, ParameterSpec] = dict(program.parameters)
    assert {name: spec.kind for name, spec in kinds.items()} == {
        "served.system": "prompt",
        "served.demos": "demos",
        "served.cue": "prompt",
    }
