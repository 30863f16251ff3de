"""From an exchange to the record of one language model call, redacted: what a trace holds of it.

The unit is a `Call`. It is made once, from what the client asked and was sent; after that the exchange is let go of.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.graph import ErrorRecord, OpRecord, Usage
from agentopt.serving._types import Exchange
from agentopt.serving.capture._redact import Redaction
from agentopt.serving.capture._replies import Answer, Spoken, read_reply
from agentopt.serving.capture._turns import read_request, text_of

JSONDict = dict[str, Any]

TOO_LONG = "longer than what is kept"
BROKEN_OFF = "broken off"


@dataclass(slots=True)
class Call:
    """One captured exchange, ready to be placed in a trace."""

    id: str
    inputs: JSONDict
    output: Any
    error: ErrorRecord | None
    usage: Usage | None
    started: float
    duration: float
    meta: JSONDict
    index: JSONDict
    """What the store keeps beside the trace: ids and names, no text."""
    size: int
    """About how many bytes it takes."""
    parents: list[Call] = field(default_factory=list["Call"])
    """Earlier calls whose reply was given to this one."""
    after: Call | None = None

    @property
    def ended(self) -> float:
        """Seconds since the epoch."""
        return self.started + self.duration

    @property
    def said(self) -> str:
        """The text of the reply."""
        if isinstance(self.output, dict):
            return str(cast("JSONDict", self.output).get("text", ""))
        return self.output if isinstance(self.output, str) else ""

    def op(self, place: int, places: dict[str, int], inside: int | None) -> OpRecord:
        """The record, with this id, in a trace where the calls have these places."""
        parents = [(places[call.id], "text") for call in self.parents if places.get(call.id, place) < place]
        if not parents and self.after is not None and places.get(self.after.id, place) < place:
            parents = [(places[self.after.id], "after")]
        return OpRecord(
            place,
            "lm",
            "lm",
            inputs=self.inputs,
            output=self.output,
            parents=cast("Any", tuple(parents)),
            parent_op=inside,
            error=self.error,
            usage=self.usage,
            started=self.started,
            duration=self.duration,
            meta=self.meta,
        )


def make_call(exchange: Exchange, reply: bytes | None, redaction: Redaction) -> Call:
    """The record of `exchange`; `reply` is what the client was sent, None where that was too long to be kept."""
    answer = Answer() if reply is None else read_reply(exchange.route, reply)
    whole = _whole(exchange, reply, answer)
    asked = read_request(exchange.route, exchange.body)
    given: JSONDict = {"prompt": asked.prompt} if asked.messages is None else {"messages": asked.messages}
    if asked.tools:
        given["tools"] = asked.tools
    choices = [_said(spoken, redaction) for spoken in answer.choices]
    first = answer.choices[0] if answer.choices else Spoken()
    facts: JSONDict = {
        "role": "agent",
        "model": exchange.model,
        "asked": exchange.asked or exchange.model,
        "route": exchange.route,
        "variant": exchange.variant,
        "adapter": exchange.adapter,
        "key": None if exchange.key is None else exchange.key.id,
        "status": exchange.status,
        "stream": exchange.stream or None,
        "finish_reason": first.finish,
        "first_ms": None if exchange.first is None else round(1000 * (exchange.first - exchange.began), 1),
        "sampling": asked.sampling or None,
        "variables": asked.variables,
        "reasoning": "".join(first.reasoning) or None,
        "partial_input": asked.partial or None,
        "reply": whole,
    }
    meta = {"request_id": exchange.id, **redaction.value({k: v for k, v in facts.items() if v is not None})}
    if len(choices) > 1:
        meta["other_choices"] = choices[1:]
    index = {name: meta.get(name) for name in ("asked", "model", "variant", "adapter", "key", "route", "status")}
    ended = exchange.ended if exchange.ended is not None else exchange.began
    return Call(
        id=exchange.id,
        inputs=redaction.value(given),
        output=choices[0] if choices else None,
        error=_error(exchange, answer, redaction),
        usage=_usage(exchange),
        started=exchange.started,
        duration=max(0.0, ended - exchange.began),
        meta=meta,
        index=index,
        size=exchange.bytes_in + len(reply or b"") + 1000,
    )


def link(call: Call, earlier: list[Call]) -> None:
    """Find whose replies stand in what `call` was given; where none does, what ended before it began."""
    done = [other for other in earlier if other.ended <= call.started]
    texts = _given_texts(call)
    call.parents = [
        other for other in done if len(said := other.said.strip()) >= 8 and any(said in text for text in texts)
    ]
    if not call.parents and done:
        call.after = max(done, key=lambda other: other.ended)


def _given_texts(call: Call) -> list[str]:
    messages: Any = call.inputs.get("messages")
    if isinstance(messages, list):
        return [text for turn in cast("list[JSONDict]", messages) if (text := text_of(turn.get("content")))]
    prompt: Any = call.inputs.get("prompt")
    return [prompt] if isinstance(prompt, str) else []


def _whole(exchange: Exchange, reply: bytes | None, answer: Answer) -> str | None:
    """None for a reply that is all there; otherwise what became of it."""
    if reply is None:
        return TOO_LONG
    return None if answer.complete and exchange.error is None else BROKEN_OFF


def _said(spoken: Spoken, redaction: Redaction) -> Any:
    """What an `ao.lm` call records as its output: a text, or text and tool calls."""
    if not spoken.calls:
        return redaction.text(spoken.text)
    calls = [_tool_call(call, redaction) for call in spoken.calls.values()]
    return {"text": redaction.text(spoken.text), "tool_calls": calls}


def _tool_call(call: JSONDict, redaction: Redaction) -> JSONDict:
    """Arguments are read before they are redacted, so that a number in them is seen as one and the rest stays JSON."""
    raw: str = call["arguments"]
    try:
        arguments: Any = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return {**redaction.value({"id": call["id"], "name": call["name"], "arguments": arguments}), "raw": None}
    return redaction.value({"id": call["id"], "name": call["name"], "arguments": {}, "raw": raw})


def _usage(exchange: Exchange) -> Usage | None:
    use = exchange.use
    if use is None:
        return Usage(calls=1, tries=1)
    return Usage(input_tokens=use.prompt, output_tokens=use.completion, cached_tokens=use.cached, calls=1, tries=1)


def _error(exchange: Exchange, answer: Answer, redaction: Redaction) -> ErrorRecord | None:
    if exchange.error is None and answer.error is None and exchange.status < 400:
        return None
    kind = exchange.error or (f"HTTP {exchange.status}" if exchange.status >= 400 else "engine_error")
    return ErrorRecord(type=kind, message=redaction.text(answer.error or ""), op="lm")
