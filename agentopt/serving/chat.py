"""The program behind every virtual model, to be tuned: `agentopt.serving.chat:reply`.

It answers a chat as the gateway does with a candidate: a system prompt above the client's own, demonstrations before
the last turn, the beginning of the answer. What is tuned here on captured traffic is served with
`agentopt serve MODEL --candidate NAME=best.json`. The model is the one with the role "agent".
"""

from __future__ import annotations

import json
from typing import Any

from agentopt.graph import agent, demos, prompt
from agentopt.serving.variants import conversation

served_system = prompt("", name="served.system", description="System prompt; the client's own follows below it.")
served_demos = demos(name="served.demos", description="Shown as turns before the last user turn.")
served_cue = prompt("", name="served.cue", description="The beginning of the answer; may be empty.")


@agent
async def reply(
    history: list[dict[str, Any]] | None = None,
    tools: list[dict[str, Any]] | None = None,
    message: str = "",
) -> str:
    """Answer the last turn of a conversation.

    Args:
        history: the turns before the last one in OpenAI form, the client's system prompt among them.
        tools: OpenAI function-tool objects.
        message: the text of the last user turn; empty where the conversation ends otherwise (with a tool's result).

    Returns:
        The reply's text; where the model calls tools instead, their names and arguments as JSON.
    """
    from agentopt.models import resolve

    messages = [*(history or []), *([{"role": "user", "content": message}] if message else [])]
    turns, system = conversation(messages, system=served_system.value, cue=served_cue.value, tools=tools)
    answer = await resolve("agent").complete(turns, system=system, demos=served_demos, tools=tools or ())
    return calls_text([call.to_dict() for call in answer.tool_calls]) if answer.tool_calls else answer.text


def calls_text(calls: list[dict[str, Any]]) -> str:
    """Tool calls as a text that is equal for equal calls."""
    plain = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    return json.dumps(plain, sort_keys=True, ensure_ascii=False)
