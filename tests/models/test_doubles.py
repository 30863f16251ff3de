"""The shipped doubles: fixed answers, functions, recorded files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentopt.errors import UserError
from agentopt.graph import Usage
from agentopt.models import LM, Client, FunctionLM, LMError, LMOptions, LMRefused, ReplayLM, Reply, Request, ScriptedLM
from tests.models.conftest import MemoryCache

pytestmark = pytest.mark.anyio


def test_doubles_are_clients() -> None:
    assert isinstance(ScriptedLM({}), Client)
    assert isinstance(FunctionLM(lambda _: ""), Client)


async def test_a_scripted_map_prefers_the_last_user_turn_over_the_rest() -> None:
    double = ScriptedLM({"refund": "billing", "crash": "technical", "": "other"})
    demos = [{"input": "refund please", "output": "billing"}]
    assert (await double.complete(user="it has a crash", demos=demos)).text == "technical"
    assert (await double.complete(user="nothing known", demos=demos)).text == "billing"
    assert (await double.complete(user="nothing known")).text == "other"


async def test_a_scripted_map_without_a_match_says_what_it_knows() -> None:
    with pytest.raises(LMRefused, match="the script knows 'a'"):
        await ScriptedLM({"a": "b"}).complete("zzz")


async def test_a_scripted_list_answers_in_order_raises_and_ends() -> None:
    double = ScriptedLM(["one", {"two": 2}, LMError("third fails"), Reply("four")])
    assert double.sequential
    assert not double.deterministic
    assert (await double.complete("x")).text == "one"
    assert (await double.complete("x")).text == '{"two": 2}'
    with pytest.raises(LMError, match="third fails"):
        await double.complete("x")
    assert (await double.complete("x")).text == "four"
    with pytest.raises(LMRefused, match="4 replies and this is call 5"):
        await double.complete("x")


def test_a_scripted_text_is_refused() -> None:
    with pytest.raises(UserError, match="write \\[text\\]"):
        ScriptedLM("just text")


async def test_doubles_cost_nothing_and_count_words() -> None:
    reply = await ScriptedLM({"": "three words here"}).complete(system="be kind", user="now")
    assert reply.usage == Usage(input_tokens=3, output_tokens=3, calls=1, tries=1)
    assert reply.cost == 0.0


async def test_a_function_may_be_async_and_return_data() -> None:
    async def answer(request: Request) -> dict[str, int]:
        return {"turns": len(request.messages)}

    assert json.loads((await FunctionLM(answer).complete(system="s", user="u")).text) == {"turns": 2}
    assert FunctionLM(answer, name="mine").name == "mine"


async def test_doubles_stream_word_by_word() -> None:
    lm = LM(ScriptedLM({"": "one two  three"}))
    assert [piece async for piece in lm.stream("x")] == ["one ", "two  ", "three"]


async def test_a_replay_records_once_and_then_answers_alone(cache: MemoryCache) -> None:
    path = Path("replies.jsonl")
    source = FunctionLM(lambda request: f"said {request.messages[-1]['content']} {request.options.sample}")
    recorder = LM(ReplayLM(path, record=source))
    for sample in (0, 1, 0):
        await recorder.complete("x", options=LMOptions(sample=sample))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2

    replay = ReplayLM(path)
    assert len(replay) == 2
    reply = await replay.complete("x", options=LMOptions(sample=1))
    assert reply.text == "said x 1"
    assert reply.cost == 0.0
    with pytest.raises(LMRefused, match="no recorded reply to 'unheard'"):
        await replay.complete("unheard")


def test_a_replay_without_a_file_says_how_to_make_it() -> None:
    with pytest.raises(UserError, match="record=client"):
        ReplayLM("nowhere.jsonl")


def test_a_broken_replay_line_is_named() -> None:
    Path("bad.jsonl").write_text('\n{"key": "k"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        ReplayLM("bad.jsonl")
