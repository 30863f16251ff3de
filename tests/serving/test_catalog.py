"""What a model's name means: base, adapters, tuned prompts; who gets which variant; what is told when it is unknown."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.serving._catalog import ServedCatalog
from agentopt.serving._types import CHAT, COMPLETIONS, Abilities, Address, Exchange, Key, Listed, Refusal
from agentopt.serving.fake_engine import Ready
from agentopt.serving.variants import VirtualModel, load_candidates

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "hi"}]


class Registry:
    """Adapters that are resident while they are held."""

    def __init__(self, *names: str) -> None:
        self.there = list(names)
        self.held: list[str] = []

    def names(self) -> tuple[str, ...]:
        return tuple(self.there)

    def __contains__(self, name: str) -> bool:
        return name in self.there

    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        @asynccontextmanager
        async def held() -> AsyncGenerator[None]:
            self.held.append(name)
            yield
            self.held.remove(name)

        return held()


def engine(name: str = "vllm", **abilities: Any) -> Any:
    made = Ready(Address(), Abilities(model="inner", **abilities))
    made.name = name
    return made


def tuned(tmp_path: Path, *specs: str) -> list[VirtualModel]:
    path = ao.Candidate({"a.instruction": "Be kind.", "a.cue": "Well:"}).save(tmp_path / "best.json")
    return load_candidates([spec.replace("FILE", str(path)) for spec in specs], warn=lambda _: None)


def asking(model: str, **fields: Any) -> Exchange:
    return Exchange(fields.pop("id", "req_1"), CHAT, "c", asked=model, **fields)


def test_the_base_has_several_names_and_none() -> None:
    catalog = ServedCatalog(["smol", "default"], engine(context=512), created=7)
    for name in ("smol", "default", ""):
        exchange = asking(name)
        choice = catalog.choose(exchange)
        assert (choice.model, choice.adapter, choice.variant, choice.rewrite) == ("inner", None, None, None)
        assert not exchange.notes
    with pytest.raises(Refusal):
        catalog.choose(asking("inner"))  # the engine's own name is nobody's business
    assert [entry["id"] for entry in catalog.entries()] == ["smol", "default"]
    assert catalog.entries()[0] == {
        "id": "smol",
        "object": "model",
        "created": 7,
        "owned_by": "agentopt",
        "root": "smol",
        "parent": None,
        "max_model_len": 512,
    }
    assert catalog.entries()[1]["parent"] == "smol"


async def test_adapters_are_held_while_they_answer() -> None:
    registry = Registry("b", "a")
    catalog = ServedCatalog(["smol"], engine(), registry=registry)
    choice = catalog.choose(asking("a"))
    assert (choice.model, choice.adapter) == ("a", "a")
    async with catalog.hold(choice):
        assert registry.held == ["a"]
    assert registry.held == []
    async with catalog.hold(catalog.choose(asking("smol"))):
        assert registry.held == []
    assert [entry["id"] for entry in catalog.entries()] == ["smol", "a", "b"]
    assert catalog.entries()[1]["parent"] == "smol"
    registry.there.append("late")
    assert catalog.choose(asking("late")).adapter == "late"


def test_an_unknown_name_is_told_what_there_is() -> None:
    catalog = ServedCatalog(["smol"], engine(), registry=Registry(*(f"a{number}" for number in range(40))))
    with pytest.raises(Refusal, match="no model 'gpt' here; there are: smol, a0") as caught:
        catalog.choose(asking("gpt"))
    assert caught.value.status == 404
    assert caught.value.code == "model_not_found"
    assert "and 21 more" in str(caught.value)
    with pytest.raises(Refusal, match="there are: a7"):
        catalog.choose(asking("gpt", key=Key("k", "n", models=("a7",))))
    with pytest.raises(Refusal, match="none for this key"):
        catalog.choose(asking("gpt", key=Key("k", "n", models=("x",))))
    with pytest.raises(Refusal) as long:
        catalog.choose(asking("x" * 100_000))
    assert len(str(long.value)) < 500


def test_a_tuned_prompt_is_a_model_of_its_own(tmp_path: Path) -> None:
    catalog = ServedCatalog(["smol"], engine(), virtual=tuned(tmp_path, "desk=FILE"))
    exchange = asking("desk")
    choice = catalog.choose(exchange)
    assert (choice.model, choice.adapter, choice.variant) == ("inner", None, "best")
    assert exchange.notes == {"X-Agentopt-Variant": "desk/best"}
    assert choice.rewrite is not None
    sent = choice.rewrite(CHAT, {"model": "desk", "messages": MESSAGES})
    assert sent["messages"][0] == {"role": "system", "content": "Be kind."}
    assert sent["model"] == "desk", "the gateway puts the engine's name in"
    assert catalog.known("desk")
    assert not catalog.known("gpt")
    assert catalog.taken("desk") == "a tuned model"
    assert catalog.entries()[1] == {**catalog.entries()[0], "id": "desk", "parent": "smol"}


@pytest.mark.parametrize(
    ("name", "spec", "asks"),
    [("vllm", "", True), ("embedded", "", False), ("vllm", "?continue=no", False), ("external", "?continue=yes", True)],
)
def test_engines_that_understand_it_are_asked_to_go_on_with_the_cue(
    tmp_path: Path, name: str, spec: str, asks: bool
) -> None:
    catalog = ServedCatalog(["smol"], engine(name), virtual=tuned(tmp_path, f"desk=FILE{spec}"))
    rewrite = catalog.choose(asking("desk")).rewrite
    assert rewrite is not None
    sent = rewrite(CHAT, {"messages": MESSAGES})
    assert sent["messages"][-1] == {"role": "assistant", "content": "Well:"}
    assert ("continue_final_message" in sent) == asks


def test_only_llama_cpp_repeats_the_cue(tmp_path: Path) -> None:
    for name, finishes in (("embedded", True), ("vllm", False)):
        choice = ServedCatalog(["smol"], engine(name), virtual=tuned(tmp_path, "desk=FILE")).choose(asking("desk"))
        assert (choice.finish is not None) == finishes


def test_variants_share_the_requests_and_users_keep_theirs(tmp_path: Path) -> None:
    catalog = ServedCatalog(["smol"], engine(), virtual=tuned(tmp_path, "desk=FILE@3", "desk=base@1"))
    picks = [catalog.choose(asking("desk", id=f"req_{number}")).variant for number in range(400)]
    assert 255 < picks.count("best") < 345
    assert picks.count("best") + picks.count("base") == 400
    for body, session in (({"user": "first"}, None), ({}, "s1"), ({"user": "second"}, "s1")):
        seen = {
            catalog.choose(asking("desk", id=f"req_{number}", body=body, session=session)).variant
            for number in range(20)
        }
        assert len(seen) == 1
    base = next(
        catalog.choose(asking("desk", id=f"req_{number}")) for number, label in enumerate(picks) if label == "base"
    )
    assert base.rewrite is not None
    assert base.rewrite(COMPLETIONS, {"prompt": "hi", "agentopt": {}}) == {"prompt": "hi"}


def test_a_variant_may_be_answered_by_an_adapter(tmp_path: Path) -> None:
    virtual = tuned(tmp_path, "desk=FILE?adapter=book")
    catalog = ServedCatalog(["smol"], engine(), registry=Registry("book"), virtual=virtual)
    choice = catalog.choose(asking("desk"))
    assert (choice.model, choice.adapter, choice.variant) == ("book", "book", "best")
    with pytest.raises(UserError, match=r"needs the adapter 'book'.*--adapter book=DIR"):
        ServedCatalog(["smol"], engine(), virtual=virtual)


def test_two_things_cannot_have_one_name(tmp_path: Path) -> None:
    virtual = tuned(tmp_path, "desk=FILE")
    with pytest.raises(UserError, match="desk: the base model has this name"):
        ServedCatalog(["desk"], engine(), virtual=virtual)
    with pytest.raises(UserError, match="desk: an adapter has this name"):
        ServedCatalog(["smol"], engine(), registry=Registry("desk"), virtual=virtual)
    with pytest.raises(UserError, match="smol: the base model has this name"):
        ServedCatalog(["smol"], engine(), registry=Registry("smol"))


def test_the_engines_name_for_its_base_may_come_late() -> None:
    late = engine()
    catalog = ServedCatalog(["smol"], late)
    late.abilities = replace(late.abilities, model="known-now")
    assert catalog.choose(asking("")).model == "known-now"


def test_models_of_an_engine_elsewhere_are_asked_by_their_own_names() -> None:
    far = engine("external", others=(Listed("large", context=9), Listed("book", parent="inner")), context=5)
    catalog = ServedCatalog(["smol"], far)
    assert [(one["id"], one["parent"], one.get("max_model_len")) for one in catalog.entries()] == [
        ("smol", None, 5),
        ("large", None, 9),
        ("book", "smol", None),
    ]
    assert [catalog.choose(asking(name)).model for name in ("smol", "large", "book", "")] == [
        "inner",
        "large",
        "book",
        "inner",
    ]
    assert catalog.names(Key("k", "k", models=("b*",))) == ["book"]
    assert catalog.known("large") and not catalog.known("inner")
    far.abilities = replace(far.abilities, others=())
    with pytest.raises(Refusal, match="no model 'large' here; there are: smol"):
        catalog.choose(asking("large"))


def test_without_a_name_the_base_has_the_engines_own(tmp_path: Path) -> None:
    far = engine("external")
    far.abilities = Abilities(model="")
    catalog = ServedCatalog([], far, virtual=tuned(tmp_path, "desk=FILE", "kind=FILE?adapter=book"))
    assert catalog.names() == ["desk", "kind"] and [one["parent"] for one in catalog.entries()] == [None, None]
    far.abilities = Abilities(model="inner", others=(Listed("desk"), Listed("book")))
    assert catalog.names() == ["inner", "desk", "kind", "book"]
    assert catalog.choose(asking("desk")).variant == "best"  # what is given here goes before what is there
    assert catalog.choose(asking("kind")).model == "book"
    far.abilities = Abilities(model="desk")
    assert catalog.choose(asking("desk")).variant == "best" and catalog.choose(asking("")).model == "desk"
