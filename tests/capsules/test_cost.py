"""The cost model: caches, answers, break-even, receipts of others, and the sentence that says not to compress."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentopt.capsules.gating._caching import CachingRule, default_caching, load_caching
from agentopt.capsules.gating._cost import Horizon, Rates, price_capsule
from agentopt.errors import UserError
from agentopt.models import Price, default_prices

# Input 1, output 5, read 0.1, write 1.25: the ratios of the published receipts, in USD per million tokens.
RATIOS = Price(1.0, 5.0)
RULE = CachingRule(minimum=1024)
BARE = Horizon(RATIOS, cached=False)


def horizon(**more: object) -> Horizon:
    return Horizon(**{"model": RATIOS, "caching": RULE, "calls": 1000, **more})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("input", "output", "read", "write", "published"),
    [
        (24_264, 14_291, 1_316_313, 222_321, 505_251),  # direct
        (12_850, 16_026, 1_558_541, 411_742, 763_512),  # through a proxy that rewrites earlier turns
        (24_280, 16_383, 1_702_586, 216_071, 546_543),  # through the same proxy, prefix left as it is
    ],
)
def test_the_receipts_of_headroom_issue_327_are_reproduced(
    input: int, output: int, read: int, write: int, published: int
) -> None:
    rates = Rates(input=1, output=5, read=0.1, write=1.25)
    cost = rates.cost(input=input, output=output, read=read, write=write) * 1e6
    assert cost == pytest.approx(published, abs=1)


def test_the_loss_of_litellm_issue_39519_is_reproduced() -> None:
    """Cache hits from 65-70 to 40-50 %, read at a quarter of the price: about twice the 8 % of tokens saved is lost."""
    rates = Rates(input=1, output=0, read=0.25, write=1)
    before = rates.cost(input=1 - 0.675, read=0.675) * 1e6
    kept = rates.cost(input=1 - 0.45, read=0.45) * 1e6
    assert (kept - before) / 0.08 == pytest.approx(2, abs=0.2)
    assert 0.92 * kept > before  # net loss although 8 % of the tokens are gone


@pytest.mark.parametrize(("rho", "n"), [(0.50, 2.9), (0.33, 5.0), (0.25, 7.7), (0.20, 11.5), (0.15, 23.0)])
def test_the_break_even_table_of_a_capsule_below_the_minimum(rho: float, n: float) -> None:
    original = 2000
    assert rho * original < 1024
    report = price_capsule(original, round(rho * original), horizon=horizon())
    assert report.assumptions["crossing"] == pytest.approx(n, abs=0.05)
    assert report.advice == "do not compress" and report.break_even == 0
    last = report.assumptions["cheaper_up_to"]
    inside = price_capsule(original, round(rho * original), horizon=horizon(calls=last))
    beyond = price_capsule(original, round(rho * original), horizon=horizon(calls=last + 1))
    assert inside.advice == "compress" and "only up to" in inside.reason
    assert beyond.saving_usd <= 1e-12 and "below the 1,024" in report.reason


def test_at_a_tenth_or_less_the_capsule_wins_at_every_n_even_uncached() -> None:
    for rho in (0.1, 0.05):
        for calls in (1, 10, 100_000):
            report = price_capsule(2000, round(2000 * rho), horizon=horizon(calls=calls))
            assert report.advice == "compress" and report.break_even == 0


def test_a_capsule_above_the_minimum_wins_by_its_share_at_every_n() -> None:
    for calls in (1, 2, 7, 1000, 10**6):
        report = price_capsule(8000, 2000, horizon=horizon(calls=calls))
        assert report.advice == "compress" and report.break_even == 0
        assert report.capsule_usd / report.original_usd == pytest.approx(0.25)


def test_a_capsule_made_anew_for_each_query_loses_unless_it_is_a_tenth() -> None:
    for capsule, advice in ((4000, "do not compress"), (1100, "do not compress"), (900, "compress")):
        report = price_capsule(10_000, capsule, horizon=horizon(calls=10_000), prefix="query")
        assert report.advice == advice, report
    assert "never in the provider's cache" in price_capsule(10_000, 4000, horizon=horizon(), prefix="query").reason
    tail = price_capsule(10_000, 4000, horizon=horizon(), prefix="tail")
    assert tail.advice == "compress" and tail.capsule_usd / tail.original_usd == pytest.approx(0.4)


def test_longer_answers_eat_the_saving_at_a_fifth_and_at_a_fiftieth() -> None:
    saved, answer = 500, 1000
    for growth, advice in ((saved / 5 - 1, "compress"), (saved / 5 + 1, "do not compress")):
        report = price_capsule(
            2000,
            2000 - saved,
            horizon=Horizon(RATIOS, cached=False, output_tokens=answer),
            output_ratio=1 + growth / answer,
        )
        assert report.advice == advice
    assert report.reason.startswith("Over 100 calls the capsule costs") and "answers grow by 10.1%" in report.reason
    assert report.assumptions["output_ratio_limit"] == pytest.approx(1 + saved / 5 / answer)
    cached = price_capsule(8000, 8000 - saved, horizon=horizon(output_tokens=answer, calls=10**7))
    assert cached.assumptions["output_ratio_limit"] == pytest.approx(1 + saved / 50 / answer)
    for growth, advice in ((saved / 50 - 1, "compress"), (saved / 50 + 1, "do not compress")):
        report = price_capsule(
            8000, 8000 - saved, horizon=horizon(output_tokens=answer, calls=10**7), output_ratio=1 + growth / answer
        )
        assert report.advice == advice


def test_making_is_earned_back_from_a_number_of_calls_on() -> None:
    # 1,000 tokens saved per call at $1 per million: $0.001 a call; making costs $0.05.
    few = price_capsule(2000, 1000, horizon=Horizon(RATIOS, calls=50, cached=False), making_usd=0.05)
    assert few.advice == "do not compress" and few.break_even == 51 and "from call 51 on" in few.reason
    many = price_capsule(2000, 1000, horizon=Horizon(RATIOS, calls=51, cached=False), making_usd=0.05)
    assert many.advice == "compress" and many.break_even == 51
    every = price_capsule(2000, 1000, horizon=Horizon(RATIOS, cached=False, compress_usd=0.002), prefix="tail")
    assert every.advice == "do not compress" and every.making_usd == pytest.approx(0.2) and "every call" in every.reason


def test_what_is_shared_counts_towards_the_minimum() -> None:
    alone = price_capsule(2000, 800, horizon=horizon())
    shared = price_capsule(2000, 800, horizon=horizon(shared_tokens=500))
    assert alone.advice == "do not compress" and shared.advice == "compress"
    # Without the prompt's help the tools fall out of the cache too, and a longer capsule that stays in is named.
    lost = price_capsule(6000, 600, horizon=horizon(shared_tokens=300))
    assert lost.assumptions["cached_tokens"] == {"original": 6300, "capsule": 0}
    assert "a capsule of 724 tokens would stay in the cache" in lost.reason


def test_openai_caches_by_itself_in_steps_and_newer_models_price_writing() -> None:
    old = Horizon("openai/gpt-5", calls=100)
    rule = old.rule
    assert rule is not None and [rule.cacheable(n) for n in (1023, 1024, 1151, 1152)] == [0, 1024, 1024, 1152]
    assert old.rates.write == old.rates.input and old.rates.read == pytest.approx(0.1 * old.rates.input)
    new = Horizon("openai/gpt-5.6-sol")
    assert new.rates.write == pytest.approx(1.25 * new.rates.input)
    assert new.rule is not None and new.rule.cacheable(1513) == 1513
    unstable = price_capsule(4000, 4000, horizon=new, prefix="query")
    assert unstable.capsule_usd == pytest.approx(100 * 4000 * new.rates.write / 1e6)


def test_minimums_are_by_model_and_say_when_they_are_general() -> None:
    table = default_caching()
    found = {
        name: rule.minimum
        for name in (
            "claude-opus-5",
            "claude-sonnet-4-5-20250929",
            "claude-opus-4-7",
            "claude-haiku-4-5",
            "claude-new-9",
        )
        if (rule := table.of(f"anthropic/{name}")) is not None
    }
    assert list(found.values()) == [512, 1024, 2048, 4096, 1024]
    known, unknown = table.of("anthropic/claude-opus-5"), table.of("anthropic/claude-new-9")
    assert known is not None and known.scope == "anthropic/claude-opus-5" and known.date == table.date
    assert unknown is not None and unknown.scope.startswith("provider")
    assert table.of("elsewhere/model") is None
    priced = [name for name in default_prices().prices if name.startswith(("anthropic/", "openai/", "gemini/"))]
    assert all(table.of(name) is not None for name in priced)
    hour = Horizon("anthropic/claude-sonnet-4-5", lifetime="1h")
    assert hour.rates.write == pytest.approx(2 * hour.rates.input)
    with pytest.raises(UserError, match="lifetime"):
        _ = Horizon("openai/gpt-5", lifetime="1h").rates


def test_a_cold_cache_is_written_again() -> None:
    warm = price_capsule(8000, 2000, horizon=horizon(calls=101))
    cold = price_capsule(8000, 2000, horizon=horizon(calls=101, hit_rate=0.5))
    assert warm.original_usd == pytest.approx(8000 * (1.25 + 100 * 0.1) / 1e6)
    assert cold.original_usd == pytest.approx(8000 * (1.25 + 50 * 0.1 + 50 * 1.25) / 1e6)


def test_figures_may_be_overridden(tmp_path: Path) -> None:
    mine = Horizon("mine/model", prices={"mine/model": (2, 8, 0.5)}, caching={"minimum": 256})
    assert mine.rates.read == 0.5 and mine.rule is not None and mine.rule.minimum == 256
    assert Horizon(Price(2, 8, 0.5), caching={"minimum": 256, "read": 0.2}).rates.read == pytest.approx(0.4)
    with pytest.raises(UserError, match="no price is known for 'mine/model'"):
        _ = Horizon("mine/model").price
    table = default_caching().override({"anthropic/claude-opus-5": {"minimum": 300}, "mine": {"minimum": 10}})
    changed, new = table.of("anthropic/claude-opus-5-20260724"), table.of("mine/any")
    assert changed is not None and changed.minimum == 300 and new is not None and new.minimum == 10
    with pytest.raises(UserError, match="minimum"):
        default_caching().override({"mine": {"read": 0.1}})
    with pytest.raises(UserError, match="minimal"):
        default_caching().override({"openai": {"minimal": 1}})
    file = tmp_path / "caching.json"
    file.write_text('{"providers": {"mine": {"minimum": 7}}}', encoding="utf-8")
    only = load_caching(file).of("mine/x")
    assert only is not None and only.minimum == 7 and load_caching(file).of("openai/gpt-5") is None
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="providers"):
        load_caching(file)
    with pytest.raises(UserError, match="No such file"):
        load_caching(tmp_path / "none.json")


def test_a_provider_without_a_caching_rule_is_told() -> None:
    unknown = price_capsule(2000, 500, horizon=Horizon("mistral/mistral-small"))
    assert unknown.advice == "compress" and "No caching rule is known for mistral/mistral-small" in unknown.reason
    for known in (Horizon("mistral/mistral-small", cached=False), Horizon("openai/gpt-5"), Horizon(RATIOS, calls=1)):
        assert "rule" not in price_capsule(2000, 500, horizon=known).reason


def test_free_models_and_longer_capsules_are_told() -> None:
    free = price_capsule(2000, 500, horizon=Horizon(Price(0, 0)))
    assert free.advice == "do not compress" and "cost nothing" in free.reason
    longer = price_capsule(500, 600, horizon=BARE)
    assert longer.break_even is None and "it has 600 tokens, the original 500" in longer.reason
    same = price_capsule(500, 500, horizon=BARE)
    assert same.advice == "do not compress" and same.saving_usd == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"calls": 0},
        {"hit_rate": 1.5},
        {"output_tokens": -1},
        {"caching": {"minimum": -1}},
        {"caching": {"nonsense": 1}},
    ],
)
def test_values_outside_their_range_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).partition("_")[0]):
        price_capsule(10, 5, horizon=horizon(**bad))


def test_arguments_outside_their_range_are_named() -> None:
    for name, more in (
        ("tokens", {}),
        ("output_ratio", {"output_ratio": float("nan")}),
        ("making_usd", {"making_usd": -1}),
        ("prefix", {"prefix": "middle"}),
    ):
        with pytest.raises(UserError, match=name):
            price_capsule(-1 if name == "tokens" else 10, 5, horizon=BARE, **more)  # pyright: ignore[reportArgumentType]


def test_a_report_is_plain_data() -> None:
    import json

    report = price_capsule(2000, 500, horizon=Horizon("anthropic/claude-sonnet-4-5", output_tokens=200))
    assert json.loads(json.dumps(report.to_dict()))["assumptions"]["caching"]["minimum"] == 1024
    assert report.assumptions["prices_date"] == default_prices().date
