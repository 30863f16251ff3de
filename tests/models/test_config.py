"""Roles, overlays, connect, prices: which model answers, what it costs, and what a wrong spec is told."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from agentopt import models
from agentopt.errors import UserError
from agentopt.graph import Usage
from agentopt.models import (
    LM,
    FunctionLM,
    LiteLLMClient,
    LMOptions,
    LMSettings,
    ModelsConfig,
    OpenAICompatible,
    Price,
    PriceTable,
    ScriptedLM,
    UnknownModel,
    _config,
    configure,
    connect,
    default_prices,
    lm,
    load_prices,
    use,
)
from tests.models.conftest import MemoryCache
from tests.models.fake_server import FakeServer

pytestmark = pytest.mark.anyio


def says(text: str) -> ScriptedLM:
    return ScriptedLM({"": text}, name=text)


async def said(role: str) -> str:
    return (await lm(role).complete("x")).text


# ---- roles


async def test_roles_without_a_model_of_their_own_get_the_agents() -> None:
    configure(models={"agent": says("agent")})
    assert [await said(role) for role in ("agent", "optimizer", "judge", "helper")] == ["agent"] * 4
    configure(models={"judge": says("judge")})
    assert [await said(role) for role in ("agent", "judge")] == ["agent", "judge"]


async def test_an_lm_taken_before_configure_finds_the_model_when_called() -> None:
    early = lm("agent")
    configure(models={"agent": says("late")})
    assert (await early.complete("x")).text == "late"
    assert early.complete_sync("x").text == "late"
    assert [piece async for piece in early.stream("x")] == ["late"]
    assert early.name == "late"


async def test_an_overlay_holds_in_its_context_only() -> None:
    configure(models={"agent": says("process"), "optimizer": says("process optimizer")})

    async def inside() -> None:
        with use(ModelsConfig({"agent": says("overlay")})):
            await anyio.sleep(0.01)
            assert await said("agent") == "overlay"
            assert await said("optimizer") == "process optimizer"
            assert await said("judge") == "overlay"

    async with anyio.create_task_group() as group:
        group.start_soon(inside)
        await anyio.sleep(0.005)
        assert await said("agent") == "process"
    assert await said("agent") == "process"


async def test_d15_the_configured_cache_options_and_prices_are_used(server: FakeServer, cache: MemoryCache) -> None:
    spec = f"openai-compatible:{server.url}#m"
    configure(
        models={"agent": spec}, cache=cache, options=LMOptions(max_tokens=7), prices={spec: (1_000_000, 2_000_000)}
    )
    first = await lm("agent").complete("two words")
    assert first.cost == 2 * 1 + 1 * 2
    assert server.requests[0]["max_tokens"] == 7
    assert (await lm("agent").complete("two words")).cached
    assert (await lm("judge").complete("two words")).cached
    assert cache.puts == 1
    await _config.current_config().aclose()


async def test_an_overlays_cache_also_serves_a_ready_lm(cache: MemoryCache) -> None:
    ready = LM(FunctionLM(lambda _: "x", name="pure"))
    with use(ModelsConfig({"agent": ready}, LMSettings(cache=cache))):
        await lm().complete("x")
        assert (await lm().complete("x")).cached


async def test_roles_share_one_client_per_spec(server: FakeServer) -> None:
    spec = f"openai-compatible:{server.url}#m"
    config = ModelsConfig({"agent": spec, "judge": spec})
    assert config.build("agent", spec) is config.build("agent", spec)
    assert config.build("agent", spec).client is config.build("judge", spec).client


async def test_nothing_configured_and_nothing_installed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "_embedded_installed", lambda: False)
    with pytest.raises(UserError, match=r"no model is configured for the role 'agent'.*doctor --fix"):
        await lm().complete("x")


def test_a_model_of_another_type_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"models\['agent'\]"):
        configure(models={"agent": 3})  # pyright: ignore[reportArgumentType]


# ---- connect


def test_known_forms_give_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    direct = connect("openai/gpt-4o-mini")
    assert isinstance(direct, OpenAICompatible)
    assert direct.name == "openai/gpt-4o-mini"
    compatible = connect("openai-compatible:http://localhost:8000/v1#org/model")
    assert isinstance(compatible, OpenAICompatible)
    assert compatible.model == "org/model"
    assert isinstance(connect("m", base_url="http://localhost:1/v1"), OpenAICompatible)
    assert isinstance(connect("anthropic/claude-haiku-4-5"), LiteLLMClient)
    assert isinstance(connect("litellm:brand_new/model"), LiteLLMClient)
    double = says("x")
    assert connect(double) is double


def test_openai_goes_where_the_user_pointed_it_and_not_to_the_capture_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9000/v1")
    own = connect("openai/qwen")
    assert isinstance(own, OpenAICompatible)
    assert own.base_url == "http://localhost:9000/v1"
    monkeypatch.setenv("AGENTOPT_UPSTREAM_BASE_URL", "")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    official = connect("openai/gpt-4o")
    assert isinstance(official, OpenAICompatible)
    assert official.base_url == "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "empty"),
        ("gpt-4o-mini", "did you mean 'openai/gpt-4o-mini'"),
        ("something", "names no provider"),
        ("antropic/claude", "did you mean 'anthropic/claude'"),
        ("nowhere/model", "no provider is called 'nowhere'"),
        ("openai-compatible:http://x/v1", "expected openai-compatible:URL#model"),
        ("openai/gpt-4o", "OPENAI_API_KEY"),
    ],
)
def test_an_unknown_model_says_what_was_found_and_what_to_do(spec: str, told: str) -> None:
    with pytest.raises(UnknownModel, match=told) as caught:
        connect(spec)
    assert caught.value.exit_code == 2


def test_a_missing_litellm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentopt.models._connect.litellm_installed", lambda: False)
    with pytest.raises(UnknownModel, match=r"pip install 'agentopt\[litellm\]'"):
        connect("anthropic/claude-haiku-4-5")


# ---- prices


def test_the_shipped_table_is_dated_and_prices_common_models() -> None:
    table = default_prices()
    assert table.date
    assert table.source
    assert table.cost("openai/gpt-4o-mini", Usage(input_tokens=1_000_000, output_tokens=1_000_000)) == 0.75


def test_an_unknown_price_is_none_and_never_zero() -> None:
    assert default_prices().cost("openai-compatible:http://x/v1#m", Usage(input_tokens=5)) is None


def test_tokens_from_the_providers_cache_have_their_own_price() -> None:
    usage = Usage(input_tokens=1000, cached_tokens=400, output_tokens=10)
    assert Price(10, 20, 1).cost(usage) == pytest.approx((600 * 10 + 400 * 1 + 10 * 20) / 1e6)
    assert Price(10, 20).cost(usage) == pytest.approx((1000 * 10 + 10 * 20) / 1e6)


def test_overrides_win_and_a_bare_model_name_covers_every_endpoint() -> None:
    table = default_prices().override({"openai/gpt-4o-mini": {"input": 1, "output": 2}, "m": [3, 4]})
    assert table.of("openai/gpt-4o-mini") == Price(1, 2)
    assert table.of("openai-compatible:http://x/v1#m") == Price(3, 4)


@pytest.mark.parametrize("price", [(1,), (1, -2), "cheap", {"input": 1}, None])
def test_a_price_of_another_form_is_a_user_error(price: object) -> None:
    with pytest.raises(UserError, match="price of 'm'"):
        PriceTable().override({"m": price})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["", "[]", '{"date": "x"}'])
def test_a_broken_price_file_is_a_user_error(text: str) -> None:
    Path("p.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.json"):
        load_prices("p.json")
    with pytest.raises(UserError, match="nowhere"):
        load_prices("nowhere.json")


def test_a_price_file_can_replace_the_table() -> None:
    Path("p.json").write_text(json.dumps({"date": "2026-01-01", "models": {"a/b": [1, 2]}}), encoding="utf-8")
    assert load_prices("p.json").of("a/b") == Price(1, 2)


def test_every_public_name_is_there() -> None:
    for name in models.__all__:
        assert getattr(models, name) is not None
