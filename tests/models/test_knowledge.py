"""`knowledge=`: where its text stands, which adapter a request asks for, what every client does with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph, models
from agentopt.errors import UserError
from agentopt.models import LM, LiteLLMClient, OpenAICompatible, Reply, Request, add_scheme, connect
from agentopt.models._remote import remote_models, request_from_dict, request_to_dict, roles_here, serve
from tests.models.conftest import MemoryCache, lm_for
from tests.models.fake_server import FakeServer

pytestmark = pytest.mark.anyio

FACTS = "Parcels leave at noon.\nLetters leave at six."


@pytest.fixture(autouse=True)
def own_parameters() -> Iterator[None]:
    with graph.parameter_scope():
        yield


@pytest.fixture
def handbook() -> ao.Knowledge:
    return ao.knowledge("desk.handbook", FACTS.splitlines())


def folded(handle: ao.Knowledge, adapter: str = "adapters/handbook-1a") -> Any:
    assert handle.spec.knowledge is not None
    value = {"form": "folded", "of": handle.spec.knowledge.hash, "adapter": adapter}
    return ao.Candidate({handle.name: value}).active()


def capsule(handle: ao.Knowledge, text: str) -> Any:
    assert handle.spec.knowledge is not None
    return ao.Candidate({handle.name: {"form": "capsule", "of": handle.spec.knowledge.hash, "text": text}}).active()


def turns(double: ao.ScriptedLM) -> list[tuple[str, Any]]:
    return [(turn["role"], turn["content"]) for turn in double.requests[-1].messages]


# ---- where the text stands


async def test_the_text_stands_before_the_system_text(handbook: ao.Knowledge) -> None:
    double = ao.ScriptedLM({"": "x"})
    await double.complete(user="When?", knowledge=handbook)
    assert turns(double) == [("system", FACTS), ("user", "When?")]
    await double.complete(system="Be brief.", user="When?", knowledge=handbook)
    assert turns(double) == [("system", f"{FACTS}\n\nBe brief."), ("user", "When?")]
    await double.complete(system="When?", knowledge=handbook)
    assert turns(double) == [("user", f"{FACTS}\n\nWhen?")]
    given = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "When?"},
    ]
    await double.complete(given, knowledge=handbook)
    parts = [{"type": "text", "text": FACTS}, {"type": "text", "text": "Be brief."}]
    assert turns(double) == [("system", parts), ("user", "When?")]


async def test_a_text_that_is_in_the_prompt_is_not_placed_again(handbook: ao.Knowledge) -> None:
    double = ao.ScriptedLM({"": "x"})
    await double.complete(f"{handbook}\n\nWhen?", knowledge=handbook)
    assert turns(double) == [("user", f"{FACTS}\n\nWhen?")]
    await double.complete(system=handbook, user="When?", knowledge=handbook)
    assert turns(double) == [("system", FACTS), ("user", "When?")]
    with folded(handbook):
        await double.complete(system=handbook, user="When?", knowledge=handbook)
    assert turns(double) == [("user", "When?")]


async def test_demonstrations_and_several_texts(handbook: ao.Knowledge) -> None:
    double = ao.ScriptedLM({"": "x"})
    prices = ao.knowledge("desk.prices", ["A letter costs one."])
    shown = [{"input": "Who?", "output": "Ann."}]
    with capsule(handbook, "Parcels: noon."):
        await double.complete(user="When?", demos=shown, knowledge=[handbook, prices])
    assert turns(double) == [
        ("system", "Parcels: noon.\n\nA letter costs one."),
        ("user", "Who?"),
        ("assistant", "Ann."),
        ("user", "When?"),
    ]


async def test_all_three_calls_pass_the_adapter(handbook: ao.Knowledge) -> None:
    double = ao.ScriptedLM({"": "yes it is"})
    with folded(handbook):
        await double.complete(user="When?", knowledge=handbook)
        double.complete_sync(user="When?", knowledge=handbook)
        pieces = [piece async for piece in LM(double).stream(user="When?", knowledge=handbook)]
    assert pieces == ["yes ", "it ", "is"]
    assert [request.adapter for request in double.requests] == ["adapters/handbook-1a"] * 3
    assert all(turn["content"] == "When?" for request in double.requests for turn in request.messages)
    await double.complete(user="When?", knowledge=handbook)
    assert double.requests[-1].adapter is None


async def test_the_read_belongs_to_the_call(handbook: ao.Knowledge) -> None:
    with folded(handbook), ao.record() as recording:
        await ao.ScriptedLM({"": "x"}).complete(user="When?", knowledge=handbook)
    trace = recording.trace
    (op,) = [op for op in trace.ops if op.kind == "lm"]
    assert op.meta is not None
    assert (op.meta["knowledge"], op.meta["adapter"]) == (["desk.handbook"], "adapters/handbook-1a")
    assert trace.parameters["desk.handbook"].value["form"] == "folded"
    assert any(kind == "parameter" for _, kind in op.parents)


@pytest.mark.parametrize("given", ["text", 3, ["text"], [None]])
async def test_something_else_than_knowledge_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="expected what ao"):
        await ao.ScriptedLM({"": "x"}).complete("q", knowledge=given)


async def test_two_folded_ones_are_too_many(handbook: ao.Knowledge) -> None:
    other = ao.knowledge("desk.prices", ["A letter costs one."])
    assert handbook.spec.knowledge is not None and other.spec.knowledge is not None
    values: dict[str, Any] = {
        handle.name: {"form": "folded", "of": source.hash, "adapter": handle.name}
        for handle, source in ((handbook, handbook.spec.knowledge), (other, other.spec.knowledge))
    }
    with ao.Candidate(values).active(), pytest.raises(UserError, match="both folded, and a request names one adapter"):
        await ao.ScriptedLM({"": "x"}).complete("q", knowledge=[handbook, other])


# ---- keys


def test_the_adapter_is_in_the_key_and_its_absence_changes_no_key() -> None:
    plain = Request("m", ({"role": "user", "content": "q"},))
    assert "adapter" not in plain.to_dict()
    # Written down before requests had adapters: replies that were cached then are found still.
    assert plain.key() == "23e12ab6db21b46c7e4e5a3c76ff83ddc2abec2455f3ce5ab272ca89a8da7ed2"
    keys = {plain.key(), replace(plain, adapter="a").key(), replace(plain, adapter="b").key()}
    assert len(keys) == 3
    assert request_from_dict(request_to_dict(replace(plain, adapter="a"))) == replace(plain, adapter="a")


async def test_cached_replies_of_two_forms_do_not_mix(handbook: ao.Knowledge, cache: MemoryCache) -> None:
    model = LM(ao.FunctionLM(lambda request: f"by {request.adapter}", name="forms"), cache=cache)
    texts: list[str] = []
    for adapter in ("one", "two", "one"):
        with folded(handbook, adapter):
            texts.append((await model.complete("q", knowledge=handbook)).text)
    assert texts == ["by one", "by two", "by one"]
    assert cache.puts == 2


async def test_cached_replies_do_not_outlive_what_was_folded(
    handbook: ao.Knowledge, cache: MemoryCache, tmp_path: Path
) -> None:
    model = LM(ao.FunctionLM(lambda _: (tmp_path / "fold.json").read_text("utf-8"), name="reader"), cache=cache)
    texts: list[str] = []
    for facts in ("noon", "midnight", "midnight"):
        (tmp_path / "fold.json").write_text(facts, encoding="utf-8")
        with folded(handbook, str(tmp_path)):
            texts.append((await model.complete("q", knowledge=handbook)).text)
    assert texts == ["noon", "midnight", "midnight"]


# ---- clients


async def test_a_server_is_asked_for_the_adapters_name(handbook: ao.Knowledge, server: FakeServer) -> None:
    model = lm_for(server)
    for adapter in ("runs/adapters/handbook-1a", "runs/adapters/handbook-1a/", "handbook-1a"):
        with folded(handbook, adapter):
            await model.complete("q", knowledge=handbook)
            assert [piece async for piece in model.stream("q", knowledge=handbook)]
    await model.complete("q", knowledge=handbook)
    assert [body["model"] for body in server.requests] == ["handbook-1a"] * 6 + ["fake"]


def test_litellm_keeps_the_provider(handbook: ao.Knowledge) -> None:
    request = Request("m", ({"role": "user", "content": "q"},), adapter="adapters/handbook-1a")
    arguments = LiteLLMClient("hosted_vllm/org/base")._arguments(request)
    assert arguments["model"] == "hosted_vllm/handbook-1a"
    assert (
        LiteLLMClient("hosted_vllm/org/base")._arguments(replace(request, adapter=None))["model"]
        == "hosted_vllm/org/base"
    )


class Plain:
    """A client of a user, who never heard of adapters."""

    name = "own/model"
    deterministic = True

    async def send(self, request: Request) -> Reply:
        return Reply("x")

    async def stream(self, request: Request) -> AsyncIterator[str]:
        yield "x"

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("client", [Plain(), OpenAICompatible("https://api.openai.com/v1", "m"), "embedded"])
async def test_a_model_without_adapters_says_what_to_do(handbook: ao.Knowledge, client: Any) -> None:
    if client == "embedded":
        if not models.embedded_available():
            pytest.skip("no embedded engine")
        client = connect("embedded/smollm2-135m-instruct")
    with folded(handbook), pytest.raises(UserError, match=r"^.*, and parameter 'desk.handbook' is folded .*in-context"):
        await LM(client).complete("q", knowledge=handbook)


async def test_a_compressing_client_passes_the_adapter_on(handbook: ao.Knowledge) -> None:
    inner = ao.ScriptedLM({"": "x"})
    outer = ao.CapsuleLM(inner, budget=ao.TokenBudget(500, tokenizer="bytes"))
    with folded(handbook):
        await LM(outer).complete("q", knowledge=handbook)
        assert inner.requests[-1].adapter == "adapters/handbook-1a"
        with pytest.raises(UserError, match="takes no adapters"):
            await LM(ao.CapsuleLM(Plain(), budget=ao.TokenBudget(500, tokenizer="bytes"))).complete(
                "q", knowledge=handbook
            )


async def test_the_owner_in_another_process_gets_the_adapter_or_refuses(handbook: ao.Knowledge) -> None:
    inner = ao.ScriptedLM({"": "x"})
    for client in (inner, Plain()):
        owner = models.ModelsConfig({"agent": client})

        async def forward(question: dict[str, Any], owner: models.ModelsConfig = owner) -> dict[str, Any]:
            with models.use(owner):
                return await serve(question)

        with models.use(owner):
            config = remote_models(roles_here(), forward)
        with models.use(config), folded(handbook):
            if client is inner:
                await ao.lm().complete("q", knowledge=handbook)
                assert inner.requests[-1].adapter == "adapters/handbook-1a"
            else:
                with pytest.raises(UserError, match="takes no adapters"):
                    await ao.lm().complete("q", knowledge=handbook)


def test_schemes_of_other_rooms() -> None:
    made = ao.ScriptedLM({"": "x"})
    seen: list[str] = []
    add_scheme("twice", lambda spec: (seen.append(spec), made)[1], "twice:X")
    assert connect("twice:a/b") is made and seen == ["twice:a/b"]
    with pytest.raises(models.UnknownModel, match="twice:X"):
        connect("nonsense")
    with pytest.raises(UserError, match=r"found no meta\.json"):
        connect("fold:/nowhere/at/all")
