"""One candidate behind each of the routes, and what is refused there."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agentopt as ao
from agentopt.serving._types import CHAT, COMPLETIONS, COUNT, EMBEDDINGS, FORWARDED, MESSAGES, RESPONSES, Refusal
from agentopt.serving.variants import Rewriting, Wanted, parts_of

DEMOS = [{"input": "2+2", "output": "4", "source": ""}]
SHOWN = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


def made(values: dict[str, Any], **options: Any) -> Rewriting:
    wanted = options.pop("wanted", Wanted())
    return Rewriting(parts_of(ao.Candidate(values), wanted, "f")[0], **options)


TUNED = made({"a.system": "Be kind.", "a.demos": DEMOS})
USER = {"role": "user", "content": "hi"}


def test_chat_joins_the_clients_system_text_below_ours() -> None:
    body = {"model": "m", "messages": [{"role": "developer", "content": "Reply in French."}, USER], "top_p": 0.5}
    before = copy.deepcopy(body)
    sent = TUNED(CHAT, body)
    assert sent["messages"] == [{"role": "system", "content": "Be kind.\n\nReply in French."}, *SHOWN, USER]
    assert sent["model"] == "m"
    assert sent["top_p"] == 0.5
    assert body == before


def test_a_conversation_keeps_its_turns_and_the_demonstrations_stand_before_the_last_question() -> None:
    earlier = [USER, {"role": "assistant", "content": "hello"}]
    later = [
        {"role": "user", "content": "look it up"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "7"},
    ]
    sent = TUNED(CHAT, {"messages": [*earlier, *later]})
    assert sent["messages"][1:] == [*earlier, *SHOWN, *later]


def test_temperature_is_the_measured_one_unless_the_client_says() -> None:
    assert TUNED(CHAT, {"messages": [USER]})["temperature"] == 0
    assert TUNED(CHAT, {"messages": [USER], "temperature": 0.7})["temperature"] == 0.7
    free = made({"a": "A"}, temperature=None)
    assert "temperature" not in free(CHAT, {"messages": [USER]})
    assert "temperature" not in TUNED(COUNT, {"messages": [USER]})


def test_a_cue_begins_the_answer_where_the_user_spoke_last() -> None:
    cued = made({"a.system": "S", "a.demos": DEMOS, "a.cue": "Sum:"}, continues=True)
    sent = cued(CHAT, {"messages": [USER]})
    assert sent["messages"][2] == {"role": "assistant", "content": "Sum: 4"}
    assert sent["messages"][-1] == {"role": "assistant", "content": "Sum:"}
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False
    begun = cued(CHAT, {"messages": [USER, {"role": "assistant", "content": "Well,"}]})
    assert begun["messages"][-1]["content"] == "Well,"
    assert begun["messages"][2]["content"] == "Well, 4"
    assert "continue_final_message" not in begun
    with_tools = cued(CHAT, {"messages": [USER], "tools": [{"type": "function"}]})
    assert with_tools["messages"][-1] == USER
    own = cued(CHAT, {"messages": [USER], "add_generation_prompt": True})
    assert "continue_final_message" not in own
    assert "continue_final_message" not in made({"a": "A", "a.cue": "C"}, continues=False)(CHAT, {"messages": [USER]})


@pytest.mark.parametrize(
    ("route", "reply", "tidy"),
    [
        (CHAT, {"choices": [{"message": {"content": "Sum: 4"}}, {"message": {"content": None}}], "id": "é"}, " 4"),
        (CHAT, {"choices": [{"message": {"content": "4, Sum: 4"}}]}, None),
        (MESSAGES, {"content": [{"type": "text", "text": "Sum: 4"}]}, " 4"),
        (CHAT, {"content": []}, None),
        (CHAT, {"choices": 7}, None),
        (CHAT, [], None),
    ],
)
def test_a_reply_that_repeats_the_cue_is_given_without_it(route: str, reply: Any, tidy: str | None) -> None:
    cued = made({"a.system": "S", "a.cue": "Sum:"})
    raw = json.dumps(reply).encode()
    got = cued.finish(route, raw)
    if tidy is None:
        assert got == raw
        return
    read = json.loads(got)
    assert (read["content"][0]["text"] if route == MESSAGES else read["choices"][0]["message"]["content"]) == tidy
    assert read.keys() == reply.keys()
    assert cued.finish(route, b"{broken") == b"{broken"


def test_messages() -> None:
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "7"}]}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
    body = {"system": [{"type": "text", "text": "Reply in French."}], "messages": [USER, call, result]}
    for route in (MESSAGES, COUNT):
        sent = TUNED(route, body)
        assert sent["system"] == "Be kind.\n\nReply in French."
        assert sent["messages"] == [*SHOWN, USER, call, result], "nothing comes between a call and its result"
    assert TUNED(MESSAGES, {"messages": [USER]})["system"] == "Be kind."
    bare = made({"a.demos": DEMOS})
    assert "system" not in bare(MESSAGES, {"messages": [USER]})
    assert bare(MESSAGES, body)["system"] == body["system"]
    cued = made({"a.system": "S", "a.cue": "Sum:"})
    assert cued(MESSAGES, {"messages": [USER]})["messages"][-1] == {"role": "assistant", "content": "Sum:"}
    assert cued(MESSAGES, {"messages": [USER, call, result]})["messages"][-1] == result


def test_responses() -> None:
    sent = TUNED(RESPONSES, {"input": "hi", "instructions": "Reply in French."})
    assert sent["instructions"] == "Be kind.\n\nReply in French."
    assert sent["input"] == [*SHOWN, USER]
    items = [{"role": "system", "content": "Be brief."}, {"type": "function_call_output", "output": "7"}, USER]
    sent = TUNED(RESPONSES, {"input": items})
    assert sent["instructions"] == "Be kind.\n\nBe brief."
    assert sent["input"] == [items[1], *SHOWN, USER]
    for name in ("previous_response_id", "conversation", "prompt"):
        with pytest.raises(Refusal, match="must see the whole conversation"):
            TUNED(RESPONSES, {"input": "hi", name: "x"})
    with pytest.raises(Refusal, match="begins its answers"):
        made({"a": "A", "a.cue": "C"})(RESPONSES, {"input": "hi"})


@pytest.mark.parametrize("route", [COMPLETIONS, EMBEDDINGS])
def test_routes_without_turns_are_refused(route: str) -> None:
    with pytest.raises(Refusal, match="made of chat turns") as caught:
        TUNED(route, {"prompt": "hi", "input": "hi"})
    assert caught.value.status == 400


def test_variables() -> None:
    asking = made({"a.prompt": "Translate {text} into {language}."})
    sent = asking(CHAT, {"messages": [USER], "agentopt": {"variables": {"text": "hi", "language": "French"}}})
    assert sent["messages"] == [{"role": "user", "content": "Translate hi into French."}]
    assert "agentopt" not in sent
    for variables, words in (
        ({"text": "hi"}, "language has no value"),
        ({"text": "hi", "language": "x", "tone": "y"}, "tone is no variable"),
        ({"text": ["hi"], "language": "x"}, "expected {"),
    ):
        with pytest.raises(Refusal, match=words):
            asking(CHAT, {"messages": [USER], "agentopt": {"variables": variables}})
    with pytest.raises(Refusal, match="text, language has no value"):
        asking(CHAT, {"messages": [USER]})
    with pytest.raises(Refusal, match="x is no variable"):
        TUNED(CHAT, {"messages": [USER], "agentopt": {"variables": {"x": "1"}}})
    with pytest.raises(Refusal, match="expected"):
        TUNED(CHAT, {"messages": [USER], "agentopt": {"colour": "red"}})
    number = made({"a.prompt": "{price:.2f}"})
    with pytest.raises(Refusal, match="cannot be filled"):
        number(CHAT, {"messages": [USER]})
    sent = number(CHAT, {"messages": [], "agentopt": {"variables": {"price": 2.5}}})
    assert sent["messages"] == [{"role": "user", "content": "2.50"}]


def test_a_template_takes_the_users_text_and_keeps_the_image() -> None:
    asking = made({"a.prompt": "What is {this}?"})
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    sent = asking(CHAT, {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "that"}]}]})
    assert sent["messages"][0]["content"] == [{"type": "text", "text": "What is that?"}, image]
    sent = asking(RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "that"}]}]})
    assert sent["input"] == [{"role": "user", "content": "What is that?"}]


def test_braces_in_what_users_say_are_text() -> None:
    asking = made({"a.prompt": "Say {this}."})
    sent = asking(CHAT, {"messages": [{"role": "user", "content": "{this.__class__} {0}"}]})
    assert sent["messages"] == [{"role": "user", "content": "Say {this.__class__} {0}."}]


@pytest.mark.parametrize("messages", [None, "hi", 7, [1], ["x"], {"role": "user"}])
def test_messages_of_another_form_are_refused(messages: Any) -> None:
    for route in (CHAT, MESSAGES):
        with pytest.raises(Refusal) as caught:
            TUNED(route, {"messages": messages})
        assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text", "a"]), inner)
    ),
    max_leaves=8,
)
wild_turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values},
        optional={"content": json_values},
    ),
    max_size=4,
)


@given(
    route=st.sampled_from(sorted(FORWARDED)),
    body=st.dictionaries(st.sampled_from(["system", "tools", "agentopt", "instructions", "temperature"]), json_values),
    turns=wild_turns | json_values,
    cue=st.sampled_from(["", "Sum:"]),
    prompt=st.sampled_from(["Be kind.", "Say {this}."]),
)
def test_whatever_a_client_sends_is_rewritten_or_refused(
    route: str, body: dict[str, Any], turns: Any, cue: str, prompt: str
) -> None:
    body = {"messages": turns, "input": turns, **body}
    before = copy.deepcopy(body)
    try:
        sent = made({"a.prompt": prompt, "a.demos": DEMOS, "a.cue": cue})(route, body)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert "agentopt" not in sent
        assert sent is not body
    assert body == before
