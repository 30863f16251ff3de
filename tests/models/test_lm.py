"""The LM contract: messages, demos, handles, tools, choices, structured output, recording, metering, sync use."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from agentopt import graph
from agentopt.errors import UserError
from agentopt.models import (
    LM,
    BudgetExhausted,
    FunctionLM,
    LMBadReply,
    LMOptions,
    LMSettings,
    Reply,
    Request,
    ScriptedLM,
    image,
    reply_watch,
    spend_guard,
)
from tests.models.conftest import MemoryCache, lm_for
from tests.models.fake_server import FakeServer

pytestmark = pytest.mark.anyio


class Ticket(BaseModel):
    queue: str
    urgent: bool


def echo() -> FunctionLM:
    return FunctionLM(lambda request: "|".join(f"{m['role']}:{m['content']}" for m in request.messages))


async def test_system_comes_first_and_demos_stand_before_the_last_user_turn() -> None:
    reply = await LM(echo()).complete(
        [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "yes"}],
        system="be brief",
        user="now",
        demos=[{"input": "a", "output": "b"}, {"input": {"x": 1}, "output": "c"}],
    )
    assert reply.text == (
        'system:be brief|user:earlier|assistant:yes|user:a|assistant:b|user:{"x": 1}|assistant:c|user:now'
    )


async def test_demonstrated_answers_begin_as_the_answer_that_is_asked_for() -> None:
    turns = [{"role": "user", "content": "now"}, {"role": "assistant", "content": "Label:"}]
    reply = await LM(echo()).complete(turns, demos=[{"input": "a", "output": "b"}])
    assert reply.text == "user:a|assistant:Label: b|user:now|assistant:Label:"


async def test_system_alone_is_sent_as_the_only_user_turn() -> None:
    reply = await LM(echo()).complete(system="Classify: it is late", demos=[{"input": "q", "output": "a"}])
    assert reply.text == "user:q|assistant:a|user:Classify: it is late"


async def test_messages_may_be_one_text() -> None:
    assert (await LM(echo()).complete("hello")).text == "user:hello"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs messages="),
        ({"messages": 3}, "expected a list of chat messages"),
        ({"messages": [{"content": "x"}]}, "messages\\[0\\]"),
        ({"user": 3}, "user: expected text"),
        ({"user": "x", "demos": [{"input": "a"}]}, "demos\\[0\\]"),
        ({"user": "x", "choices": []}, "choices="),
        ({"user": "x", "choices": ["a"], "output": Ticket}, "not both"),
        ({"user": "x", "output": 3}, "output="),
    ],
)
async def test_unusable_arguments_are_one_clear_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        await LM(echo()).complete(**given)


async def test_handles_are_resolved_everywhere_and_their_reads_belong_to_the_call() -> None:
    with graph.parameter_scope():
        instruction = graph.prompt("Say {word}", name="t.instruction")
        examples = graph.demos(name="t.examples")
        candidate = graph.Candidate(
            {"t.instruction": "Shout {word}", "t.examples": [{"input": "in", "output": "out", "source": ""}]}
        )
        with candidate.active(), graph.record() as recording:
            reply = await LM(echo()).complete(
                [{"role": "assistant", "content": [{"type": "text", "text": instruction}]}],
                system=instruction,
                user="go",
                demos=examples,
            )
    assert "system:Shout {word}" in reply.text
    assert "user:in|assistant:out|user:go" in reply.text
    assert "'text': 'Shout {word}'" in reply.text
    trace = recording.trace
    (call,) = [op for op in trace.ops if op.kind == "lm"]
    read = {trace.ops[parent].op for parent, kind in call.parents if kind == "parameter"}
    assert read == {"t.instruction", "t.examples"}


async def test_images_become_content_parts(server: FakeServer) -> None:
    await lm_for(server).complete(user=["what is this?", image(b"\x89PNG"), image("https://example.org/a.png")])
    content = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1]["image_url"]["url"] == "data:image/png;base64,iVBORw=="


def test_a_missing_image_file_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"no-such\.png"):
        image("no-such.png")


async def test_a_call_is_recorded_with_usage_cost_and_key(server: FakeServer) -> None:
    lm = lm_for(server)
    with graph.record() as recording, graph.metered() as meter:
        await lm.complete(system="s", user="two words", options=LMOptions(seed=7))
    (call,) = [op for op in recording.trace.ops if op.kind == "lm"]
    assert call.inputs == {"system": "s", "user": "two words"}
    assert call.output == "ok"
    assert call.usage == graph.Usage(input_tokens=3, output_tokens=1, calls=1, tries=1)
    assert call.meta is not None
    assert call.meta["seed"] == 7
    assert len(call.meta["key"]) == 64
    assert call.meta["messages"][1]["content"] == "two words"
    assert meter.usage == call.usage
    assert call.cost is None
    assert meter.unpriced_calls == 1


async def test_a_failed_call_is_recorded_with_its_error(server: FakeServer) -> None:
    server.script([{"status": 400, "message": "bad"}])
    with graph.record() as recording, pytest.raises(Exception, match="bad"):
        await lm_for(server).complete("x")
    (call,) = [op for op in recording.trace.ops if op.kind == "lm"]
    assert call.error is not None
    assert call.usage == graph.Usage(tries=1)


async def test_tool_calls_are_decoded_and_bad_arguments_are_kept_as_text(server: FakeServer) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    server.script(
        [
            {
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"id": 3}'}},
                    {"id": "2", "type": "function", "function": {"name": "look", "arguments": "{oops"}},
                ],
                "finish_reason": "tool_calls",
            }
        ]
    )
    reply = await lm_for(server).complete("x", tools=[tool])
    assert server.requests[0]["tools"] == [tool]
    assert [(call.name, call.arguments, call.raw) for call in reply.tool_calls] == [
        ("look", {"id": 3}, None),
        ("look", {}, "{oops"),
    ]
    assert reply.finish_reason == "tool_calls"


# ---- structured output and choices


@pytest.mark.parametrize(
    "text",
    [
        '{"queue": "billing", "urgent": true}',
        '```json\n{"queue": "billing", "urgent": true}\n```',
        'Sure: {"queue": "billing", "urgent": true}. Done.',
    ],
)
async def test_output_is_parsed_from_text_however_it_is_wrapped(text: str) -> None:
    reply = await LM(ScriptedLM({"": text})).complete("x", output=Ticket)
    assert reply.parsed == Ticket(queue="billing", urgent=True)


async def test_a_bad_structured_reply_gets_one_repair_round_that_names_the_problem() -> None:
    double = ScriptedLM([{"queue": "billing"}, {"queue": "billing", "urgent": False}])
    with graph.metered() as meter:
        reply = await LM(double).complete("x", output=Ticket)
    assert reply.parsed == Ticket(queue="billing", urgent=False)
    repair = double.requests[1].messages
    assert [turn["role"] for turn in repair] == ["user", "assistant", "user"]
    assert "urgent: Field required" in repair[2]["content"]
    assert '"urgent"' in repair[2]["content"]
    assert reply.usage.calls == 2
    assert meter.usage == reply.usage


async def test_a_second_bad_reply_is_an_error_that_quotes_it() -> None:
    with pytest.raises(LMBadReply, match="still wrong"):
        await LM(ScriptedLM(["wrong", "still wrong"])).complete("x", output=Ticket)


async def test_output_may_be_a_json_schema_or_any_type() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert (await LM(ScriptedLM(['{"a": "x"}', '{"a": 1}'])).complete("x", output=schema)).parsed == {"a": 1}
    assert (await LM(ScriptedLM({"": "[1, 2]"})).complete("x", output=list[int])).parsed == [1, 2]


async def test_the_schema_is_sent_to_the_server(server: FakeServer) -> None:
    server.default = '{"queue": "a", "urgent": true}'
    await lm_for(server).complete("x", output=Ticket)
    sent = server.requests[0]["response_format"]
    assert sent["json_schema"]["schema"] == Ticket.model_json_schema()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("positive", "positive"),
        (" Positive.", "positive"),
        ('"positive"', "positive"),
        ('{"answer": "positive"}', "positive"),
        ("The answer is: very positive!", "very positive"),
        ("I would say positive", "positive"),
    ],
)
async def test_choices_are_matched_from_free_text(said: str, meant: str) -> None:
    reply = await LM(ScriptedLM([said])).complete("x", choices=["negative", "positive", "very positive"])
    assert reply.text == meant


async def test_an_ambiguous_choice_is_repaired_and_a_second_one_fails() -> None:
    double = ScriptedLM(["positive or negative", "negative"])
    assert (await LM(double).complete("x", choices=["positive", "negative"])).text == "negative"
    assert "- positive\n- negative" in double.requests[1].messages[-1]["content"]
    with pytest.raises(LMBadReply, match="none of the choices"):
        await LM(ScriptedLM(["eh", "meh"])).complete("x", choices=["positive", "negative"])


# ---- seeds, budgets, watching


async def test_a_seed_is_drawn_from_the_rollout_only_when_sampling() -> None:
    double = ScriptedLM({"": "ok"})
    lm = LM(double)
    warm = LMOptions(temperature=0.7)

    async def seeds(run_seed: int) -> list[int | None]:
        del double.requests[:]
        with graph.rollout(graph.RolloutScope(run_seed, "c", "e", 0)):
            for _ in range(2):
                await lm.complete("x", options=warm)
            await lm.complete("x")
        return [request.options.seed for request in double.requests]

    first, again, other = await seeds(1), await seeds(1), await seeds(2)
    assert first == again != other
    assert first[0] != first[1]
    assert first[2] is None


async def test_the_spend_guard_stops_paid_calls_and_lets_cached_ones_through(
    server: FakeServer, cache: MemoryCache
) -> None:
    lm = lm_for(server, cache=cache)
    await lm.complete("paid before")

    def refuse(_: Request) -> None:
        raise BudgetExhausted("no money left")

    token = spend_guard.set(refuse)
    try:
        assert (await lm.complete("paid before")).cached
        with pytest.raises(BudgetExhausted):
            await lm.complete("new")
    finally:
        spend_guard.reset(token)
    assert len(server.requests) == 1


async def test_the_reply_watch_sees_what_cached_replies_once_cost(server: FakeServer, cache: MemoryCache) -> None:
    seen: list[Reply] = []
    token = reply_watch.set(lambda _request, reply: seen.append(reply))
    try:
        lm = lm_for(server, cache=cache)
        await lm.complete("x")
        await lm.complete("x")
    finally:
        reply_watch.reset(token)
    assert [reply.cached for reply in seen] == [False, True]
    assert seen[1].saved_usage == seen[0].usage
    assert seen[1].cost == 0.0


# ---- streaming and sync


async def test_a_stream_yields_pieces_is_recorded_and_cached(server: FakeServer, cache: MemoryCache) -> None:
    server.default = "one two three"
    lm = lm_for(server, cache=cache)
    with graph.record() as recording:
        pieces = [piece async for piece in lm.stream("x")]
        outside = graph.current_recording()
    assert outside is recording
    assert len(pieces) > 1
    assert "".join(pieces) == "one two three"
    (call,) = [op for op in recording.trace.ops if op.kind == "lm"]
    assert call.output == "one two three"
    assert call.usage == graph.Usage(input_tokens=1, output_tokens=3, calls=1, tries=1)
    assert [piece async for piece in lm.stream("x")] == ["one two three"]
    assert (await lm.complete("x")).cached


async def test_a_stream_that_is_left_early_closes_its_connection(server: FakeServer) -> None:
    server.default = "word " * 200
    async for _ in lm_for(server).stream("x"):
        break
    with anyio.fail_after(60):
        while server.active:
            await anyio.sleep(0.01)
    assert not server.active


async def test_a_stream_retries_before_its_first_piece(server: FakeServer, clock: Any) -> None:
    server.script([{"status": 500}, {"text": "fine"}])
    assert "".join([piece async for piece in lm_for(server, clock).stream("x")]) == "fine"


async def test_complete_sync_works_inside_a_running_loop_and_keeps_the_context(server: FakeServer) -> None:
    lm = lm_for(server)
    with graph.record() as recording, graph.metered() as meter:
        reply = lm.complete_sync("x")
    assert reply.text == "ok"
    assert [op.kind for op in recording.trace.ops].count("lm") == 1
    assert meter.usage.calls == 1


def test_complete_sync_works_without_a_loop_and_from_inside_a_sync_function_of_another_call() -> None:
    inner = ScriptedLM({"": "inner"})
    outer = FunctionLM(lambda request: inner.complete_sync("y").text + "!")
    assert outer.complete_sync("x").text == "inner!"


def test_one_lm_serves_several_loops_one_after_the_other(server: FakeServer) -> None:
    lm = lm_for(server)

    async def twice() -> None:
        await lm.complete("a")
        await lm.complete("b")

    for _ in range(3):
        asyncio.run(twice())
    lm.complete_sync("c")
    assert len(server.requests) == 7
    assert server.connections == 4  # one per loop, kept alive inside it


async def test_doubles_can_be_used_directly_and_lms_have_settings() -> None:
    double = ScriptedLM({"": "yes"})
    assert (await double.complete("x")).text == "yes"
    assert (await LM(double, settings=LMSettings(options=LMOptions(max_tokens=3))).complete("x")).text == "yes"
    assert double.requests[1].options.max_tokens == 3
