"""What is served is what was measured: the turns that the engine gets are those that the program sends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentopt as ao
from agentopt.evaluation import load_program
from agentopt.models import FunctionLM, ModelsConfig, Request, use
from agentopt.serving import chat
from agentopt.serving._types import CHAT
from agentopt.serving.variants import Rewriting, Wanted, load_candidates, parts_of

TRIAGE = Path(__file__).parents[3] / "traces/ticket_triage/triage.py"

texts = st.text(max_size=20)
demo_lists = st.lists(
    st.fixed_dictionaries({"input": texts, "output": texts | st.integers(), "source": st.just("")}), max_size=3
)
contents = texts | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts})
    | st.just({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}),
    min_size=1,
    max_size=3,
)
user_turns = st.fixed_dictionaries({"role": st.just("user"), "content": contents})
other_turns = st.fixed_dictionaries({"role": st.just("assistant"), "content": contents}) | st.sampled_from(
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
)
talks = st.lists(user_turns | other_turns, max_size=5)


def rewriting(values: dict[str, Any], wanted: Wanted | None = None) -> Rewriting:
    parts, _ = parts_of(ao.Candidate(values), wanted or Wanted(), "best.json")
    return Rewriting(parts)


def served(rewrite: Any, turns: Any, **body: Any) -> Any:
    return rewrite(CHAT, {"model": "m", "messages": turns, **body})["messages"]


class Recorder:
    """A language model that keeps the messages it was sent."""

    def __init__(self, answer: str = "billing") -> None:
        self.answer = answer
        self.messages: list[Any] = []
        self.lm = FunctionLM(self._answer)

    def _answer(self, request: Request) -> str:
        self.messages = [dict(turn) for turn in request.messages]
        return self.answer


@given(talk=talks, system=st.none() | texts, demos=demo_lists, cue=st.none() | texts)
@settings(max_examples=150)
def test_a_program_that_passes_the_messages_on(
    talk: list[Any], system: str | None, demos: list[Any], cue: str | None
) -> None:
    values: dict[str, Any] = {"desk.examples": demos}
    values |= {} if system is None else {"desk.instruction": system}
    values |= {} if cue is None else {"desk.cue": cue}
    if not talk and not system:
        return
    turns = list(talk)
    if cue and turns and turns[-1]["role"] == "user":  # as the shipped example does
        turns.append({"role": "assistant", "content": cue})
    heard = Recorder()
    heard.lm.complete_sync(turns, system=system, demos=demos)
    wanted = (
        Wanted(system="" if system is None else "desk.instruction") if system is None or "{" in system else Wanted()
    )
    plain = rewriting(values, wanted)
    if plain.parts.user or (plain.parts.system and plain.parts.system.variables):
        return  # a template is another test
    assert served(plain, talk) == heard.messages


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@given(
    history=talks,
    message=texts,
    system=texts,
    demos=st.lists(st.fixed_dictionaries({"input": texts, "output": texts, "source": texts}), max_size=3),
    cue=texts,
    theirs=st.lists(texts, max_size=2),
    tools=st.none() | st.just([TOOL]),
)
@settings(max_examples=100)
def test_the_ready_program(
    history: list[Any], message: str, system: str, demos: Any, cue: str, theirs: list[str], tools: Any
) -> None:
    """`agentopt.serving.chat:reply`, which is tuned on captured traffic; the client may have a system text."""
    before = [*({"role": "system", "content": text} for text in theirs), *history]
    messages = [*before, *([{"role": "user", "content": message}] if message else [])]
    if not history and not message and not system and not any(theirs):
        return
    candidate = ao.Candidate({"served.system": system, "served.demos": demos, "served.cue": cue})
    heard = Recorder()
    with candidate.active(), use(ModelsConfig({"agent": heard.lm})):
        asyncio.run(chat.reply(before, tools, message))
    made = Rewriting(parts_of(candidate, Wanted(), "best.json")[0])
    assert served(made, messages, **({} if tools is None else {"tools": tools})) == heard.messages


tuned = st.fixed_dictionaries(
    {
        "triage.instruction": st.text(min_size=1, max_size=30).filter(
            lambda text: bool(text.strip()) and "{" not in text
        ),
        "triage.examples": st.lists(
            st.fixed_dictionaries({"input": texts, "output": texts, "source": texts}), max_size=4
        ),
        "triage.cue": texts,
        "triage.calibrate": st.just("none"),
    }
)


def test_the_shipped_example(tmp_path: Path) -> None:
    program = load_program(f"{TRIAGE}:triage")
    heard = Recorder()

    @given(ticket=texts, values=tuned)
    @settings(max_examples=40)
    def the_same(ticket: str, values: dict[str, Any]) -> None:
        candidate = ao.Candidate(values)
        (model,) = load_candidates([f"desk={candidate.save(tmp_path / 'best.json')}"], warn=lambda _: None)
        with candidate.active(), use(ModelsConfig({"agent": heard.lm})):
            asyncio.run(program.target(ticket))
        assert served(model.variants[0].rewrite, [{"role": "user", "content": ticket}]) == heard.messages

    the_same()


def test_a_template_is_the_whole_turn() -> None:
    """`complete(system=prompt.format(ticket=...), demos=...)`: the filled text is the only user turn."""
    prompt = "Sort this ticket: {ticket}. Answer with {{label}}."
    demos = [{"input": "a", "output": "b", "source": ""}]
    heard = Recorder()
    heard.lm.complete_sync(system=prompt.format(ticket="no {light}"), demos=demos)
    made = rewriting({"triage.prompt": prompt, "triage.demos": demos})
    assert served(made, [{"role": "user", "content": "no {light}"}]) == heard.messages
    assert served(made, [], agentopt={"variables": {"ticket": "no {light}"}}) == heard.messages


def test_a_structured_prompt_is_put_together_as_the_program_does() -> None:
    parts = ao.components(name="q", task="Answer: {question}", extra="Mind {braces}.", principles=["Be brief."])
    demos = [{"input": "1+1", "output": "2", "source": ""}]
    candidate = ao.Candidate(
        {
            "q.task": "Answer now: {question}",
            "q.principles": [{"id": "p1", "text": "Be exact.", "helpful": 0, "harmful": 0}],
            "q.demos": demos,
            "q.output_format": "",
            "q.extra": "Mind {braces}.",
        }
    )
    heard = Recorder()
    with candidate.active():
        heard.lm.complete_sync(system=parts.format(question="why?", braces="it"), demos=parts.demos)
    made = rewriting(dict(candidate.values))
    values = {"question": "why?", "braces": "it"}
    assert served(made, [{"role": "user", "content": "x"}], agentopt={"variables": values}) == heard.messages


def test_a_structured_prompt_without_variables_is_a_system_turn() -> None:
    parts = ao.components(name="q", task="Answer.", output_format='{"a": 1}')
    heard = Recorder()
    heard.lm.complete_sync("why?", system=parts)
    values = {f"q.{name}": handle.spec.default for name, handle in parts.handles.items()}
    assert served(rewriting(values), [{"role": "user", "content": "why?"}]) == heard.messages


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
def test_system_and_user_templates_together(content: Any) -> None:
    values: dict[str, Any] = {"a.system": "Be kind.", "a.user": "Question: {q}"}
    heard = Recorder()
    heard.lm.complete_sync(system="Be kind.", user="Question: hi")
    made = rewriting(values, Wanted(system="a.system", user="a.user"))
    assert served(made, [{"role": "user", "content": content}]) == heard.messages
