"""What a client asked, in one form whatever the route: chat messages as OpenAI writes them, or a prompt.

Only what says something of the task is taken from the body: the turns, the tools and how to sample. Who the user is
(`user`, `metadata`), log probabilities and whatever else a body may hold are left where they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.serving._types import COMPLETIONS, MESSAGES, RESPONSES

JSONDict = dict[str, Any]

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "stop",
    "stop_sequences",
    "seed",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "response_format",
    "text",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "reasoning",
    "suffix",
)
_TURN = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal")


@dataclass(slots=True)
class Asked:
    """One request."""

    messages: list[JSONDict] | None = None
    prompt: Any = None
    """Of /v1/completions: a text or a list of texts."""
    tools: list[JSONDict] = field(default_factory=list[JSONDict])
    """OpenAI function-tool objects."""
    sampling: JSONDict = field(default_factory=JSONDict)
    variables: Any = None
    """What the client gave for the variables of a virtual model's template."""
    partial: bool = False
    """Turns before these are at the engine and not in the request."""


def read_request(route: str, body: Mapping[str, Any]) -> Asked:
    """What `body`, sent to `route`, asks; parts that have another form than expected are left out."""
    asked = Asked(sampling={name: body[name] for name in _SAMPLING if body.get(name) is not None})
    asked.variables = _dict(body.get("agentopt")).get("variables")
    if route == COMPLETIONS:
        asked.prompt = _prompt(body.get("prompt"))
    elif route == RESPONSES:
        asked.messages = _responses(body)
        asked.tools = [_flat_tool(tool) for tool in _dicts(body.get("tools")) if tool.get("type") == "function"]
        asked.partial = body.get("previous_response_id") is not None or body.get("conversation") is not None
    elif route == MESSAGES:
        asked.messages = _anthropic(body)
        asked.tools = [_anthropic_tool(tool) for tool in _dicts(body.get("tools"))]
    else:
        asked.messages = [
            {**{name: turn[name] for name in _TURN if name in turn}, "content": _content(turn.get("content"))}
            for turn in _dicts(body.get("messages"))
        ]
        asked.tools = _dicts(body.get("tools"))
    return asked


def text_of(content: Any) -> str | None:
    """The text of a turn; None where it is not text alone."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = cast("list[Any]", content)
    texts = [part.get("text") for part in _dicts(parts) if part.get("type") in ("text", "input_text", "output_text")]
    return "\n".join(map(str, texts)) if len(texts) == len(parts) else None


def _prompt(given: Any) -> Any:
    """Texts as they are; token ids, in which nothing can be redacted, as their number."""
    if isinstance(given, str):
        return given
    items = cast("list[Any]", given) if isinstance(given, list) else []
    if items and all(isinstance(item, str) for item in items):
        return items[0] if len(items) == 1 else items
    ids = sum(len(cast("list[Any]", item)) if isinstance(item, list) else 1 for item in items)
    return f"[{ids} token ids]"


def _content(content: Any) -> Any:
    """Text where a turn is text alone; otherwise its parts."""
    text = text_of(content)
    return content if text is None else text


# ---- responses


def _responses(body: Mapping[str, Any]) -> list[JSONDict]:
    turns: list[JSONDict] = []
    if isinstance(body.get("instructions"), str):
        turns.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        return [*turns, {"role": "user", "content": given}]
    for item in _dicts(given):
        kind = item.get("type", "message")
        if kind == "message":
            turns.append({"role": str(item.get("role", "user")), "content": _content(item.get("content"))})
        elif kind == "function_call":
            call = {"name": item.get("name", ""), "arguments": item.get("arguments", "")}
            _add_call(turns, {"id": item.get("call_id", ""), "type": "function", "function": call})
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            turns.append({"role": "tool", "tool_call_id": item.get("call_id", ""), "content": output})
    return turns


def _add_call(turns: list[JSONDict], call: JSONDict) -> None:
    """Calls that were made together are one assistant turn."""
    if turns and turns[-1]["role"] == "assistant":
        turns[-1].setdefault("tool_calls", []).append(call)
    else:
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _flat_tool(tool: JSONDict) -> JSONDict:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


# ---- messages


def _anthropic(body: Mapping[str, Any]) -> list[JSONDict]:
    turns: list[JSONDict] = []
    if body.get("system"):
        turns.append({"role": "system", "content": _content(body["system"])})
    for turn in _dicts(body.get("messages")):
        role, content = str(turn.get("role", "user")), turn.get("content")
        blocks = _dicts(content)
        calls = [_tool_use(block) for block in blocks if block.get("type") == "tool_use"]
        results = [block for block in blocks if block.get("type") == "tool_result"]
        aside = ("tool_use", "tool_result", "thinking", "redacted_thinking")
        said = content if isinstance(content, str) else [block for block in blocks if block.get("type") not in aside]
        turns += (
            {"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": _content(block.get("content"))}
            for block in results
        )
        if calls:
            turns.append({"role": role, "content": _content(said) or None, "tool_calls": calls})
        elif said or not results:
            turns.append({"role": role, "content": _content(said)})
    return turns


def _tool_use(block: JSONDict) -> JSONDict:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    function = {"name": block.get("name", ""), "arguments": arguments}
    return {"id": block.get("id", ""), "type": "function", "function": function}


def _anthropic_tool(tool: JSONDict) -> JSONDict:
    function = {name: tool[name] for name in ("name", "description") if name in tool}
    if "input_schema" in tool:
        function["parameters"] = tool["input_schema"]
    return {"type": "function", "function": function}


def _dict(value: Any) -> JSONDict:
    return cast("JSONDict", value) if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[JSONDict]:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("JSONDict", item) for item in items if isinstance(item, dict)]
