"""The estimator: its operations are those that torch counts, its comparisons agree with its totals."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.weights import adapters
from agentopt.weights.fold._estimator import Speed, estimate, measure_speed
from agentopt.weights.fold._incontext import InContext
from agentopt.weights.fold._shape import shape_of
from tests.weights.tiny import tiny


def plain(config: Any) -> Any:
    """With attention as two matrix products, which torch counts as such."""
    config._attn_implementation = "eager"
    return config


def llama_config(**other: Any) -> Any:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return plain(LlamaConfig(**(sizes | other)))


def qwen_config() -> Any:
    from transformers import Qwen3Config

    return plain(
        Qwen3Config(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def gpt2_config() -> Any:
    from transformers import GPT2Config

    return plain(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


CONFIGS = pytest.mark.parametrize("make", [llama_config, qwen_config, gpt2_config])


def model_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def counted(act: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        act()
    return int(counter.get_total_flops())


def above(config: Any, tokens: int, after: int = 0) -> float:
    """Operations of plain attention on what is masked: it computes the whole square."""
    shape = shape_of(config)
    square, half = tokens * (tokens + after), tokens * after + tokens * (tokens + 1) / 2
    return 4 * shape.layers * shape.heads * shape.head_dim * (square - half)


# --- against what torch counts ---------------------------------------------------------------------------------------


@CONFIGS
def test_reading_costs_what_torch_counts(make: Any) -> None:
    config = make()
    model = model_of(config)
    ids = torch.arange(60)[None] % 48
    found = estimate(config, context_tokens=50, questions=3, question_tokens=10, answer_tokens=1)
    with torch.no_grad():
        whole = counted(lambda: model(input_ids=ids, logits_to_keep=1))
        first = counted(lambda: model(input_ids=ids[:, :50], logits_to_keep=1))
        cache = model(input_ids=ids[:, :50]).past_key_values
        rest = counted(lambda: model(input_ids=ids[:, 50:], past_key_values=cache, logits_to_keep=1))
    assert found.reread.flops == 3 * (whole - above(config, 60))
    assert found.cached.fixed_flops == first - above(config, 50)
    assert found.cached.question_flops == rest - above(config, 10, 50)


@CONFIGS
def test_folding_costs_what_torch_counts(make: Any) -> None:
    config = make()
    model = model_of(config)
    held = adapters.attach(model, rank=4)
    ids = torch.arange(40).reshape(2, 20) % 48

    def inner_step() -> None:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=inputs, use_cache=False).logits.logsumexp(-1).sum().backward()

    found = estimate(config, context_tokens=40, questions=1, inner_steps=3, rank=4, row_tokens=20)
    # Forward and, twice as much, back.
    square = 2 * 3 * above(config, 20)
    assert found.fold.fixed_flops == 3 * (counted(inner_step) - square)
    assert found.adapter_bytes == sum(value.numel() * 4 for value in held.parameters().values())


def test_keys_and_values_are_those_of_a_real_cache() -> None:
    model, tokenizer = tiny()
    prefix = InContext(model, tokenizer).prefix(["red blue", "green ."])
    found = estimate(model, context_tokens=prefix.tokens, questions=1, question_tokens=3, answer_tokens=2)
    assert found.kv_saved == prefix.bytes
    assert found.cached.kv_bytes == prefix.bytes // prefix.tokens * (prefix.tokens + 5)
    assert found.fold.kv_bytes == prefix.bytes // prefix.tokens * 5
    # Grouped heads: two of them, 3 layers, 2 key heads of 8 numbers, in two bytes.
    grouped = estimate(llama_config(), context_tokens=100, questions=8, concurrent=4, dtype=torch.bfloat16)
    assert grouped.kv_saved == 2 * 3 * 2 * 8 * 100 * 2
    assert grouped.reread.kv_bytes - grouped.cached.kv_bytes == 3 * grouped.kv_saved


# --- what follows from the totals ------------------------------------------------------------------------------------

CASES = {
    "context_tokens": st.integers(1, 256),
    "question_tokens": st.integers(1, 64),
    "answer_tokens": st.integers(1, 16),
    "inner_steps": st.integers(2, 5),
    "rank": st.integers(1, 64),
    "row_tokens": st.integers(8, 256),
    "concurrent": st.integers(1, 8),
    "adapts": st.sampled_from(["lora", "all"]),
    "speed": st.sampled_from([None, Speed(1e9, 5e8), Speed(1e9, 2e9, 1e-3)]),
}


@settings(max_examples=100, deadline=None)
@given(case=st.fixed_dictionaries(CASES), questions=st.integers(1, 200))
def test_more_questions_cost_more_and_break_even_is_where_the_totals_cross(
    case: dict[str, Any], questions: int
) -> None:
    config = llama_config()
    found = estimate(config, questions=questions, **case)
    more = estimate(config, questions=questions + 1, **case)
    for name in ("fold", "reread", "cached"):
        assert getattr(more, name).amount > getattr(found, name).amount
    assert found.break_even == more.break_even
    for other, crossing in (("reread", found.break_even), ("cached", found.break_even_cached)):
        if crossing is None:
            assert found.fold.amount >= getattr(found, other).amount * (1 - 1e-9)
            continue
        at = estimate(config, questions=crossing, **case)
        assert at.fold.amount <= getattr(at, other).amount * (1 + 1e-9)
        if crossing > 1:
            before = estimate(config, questions=crossing - 1, **case)
            assert before.fold.amount >= getattr(before, other).amount * (1 - 1e-9)
    least = min(found.fold.amount, found.reread.amount, found.cached.amount)
    assert {"fold": found.fold, "re-reading": found.reread, "in-context, cached": found.cached}[
        found.cheaper
    ].amount == least


@settings(max_examples=50, deadline=None)
@given(case=st.fixed_dictionaries(CASES))
def test_one_question_is_never_cheaper_folded_than_read(case: dict[str, Any]) -> None:
    case["speed"] = None
    found = estimate(llama_config(), questions=1, **case)
    assert found.fold.flops > found.cached.flops
    assert found.cheaper != "fold"


def test_break_even_is_the_known_formula_where_its_assumptions_hold() -> None:
    # Wide layers: attention, head and factors are small beside them.
    config = llama_config(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24)
    for steps in (1, 4):
        case: dict[str, Any] = {
            "context_tokens": 256,
            "questions": 1,
            "question_tokens": 16,
            "answer_tokens": 1,
            "inner_steps": steps,
        }
        everything = estimate(config, adapts="all", **case).break_even
        factors = estimate(config, rank=1, **case).break_even
        # A question is asked of the fold as well: its tokens are read either way.
        assert everything == pytest.approx(3 * steps + 1, abs=1)
        assert factors == pytest.approx(2 * steps + 1, abs=1)


def test_only_the_topmost_layers_go_back() -> None:
    config = llama_config()
    few, all_of_them = (estimate(config, context_tokens=200, questions=1, layers=layers) for layers in (1, None))
    assert few.fold.fixed_flops < all_of_them.fold.fixed_flops
    assert 3 * few.adapter_bytes == all_of_them.adapter_bytes
    assert few.folding_bytes < all_of_them.folding_bytes
    queries = estimate(config, context_tokens=200, questions=1, targets=("q_proj",), rank=2, factor_bytes=2)
    assert queries.adapter_bytes == 3 * 2 * (32 + 32) * 2


# --- what it says ----------------------------------------------------------------------------------------------------


def test_it_admits_that_folding_loses() -> None:
    found = estimate(llama_config(), context_tokens=256, questions=2)
    assert found.cheaper == "in-context, cached"
    said = found.sentence()
    assert "For 2 questions about 256 tokens, folding loses: cached prefix" in said
    assert "than a cached prefix never" in said or "than a cached prefix only from" in said
    assert "Nor does it save memory here" in said


def test_it_says_when_the_context_cannot_be_read() -> None:
    found = estimate(llama_config(), context_tokens=4096, questions=2)
    assert (found.fits, found.cheaper, found.break_even) == (False, "fold", 1)
    assert "Reading is impossible: 4,136 tokens are needed and the model's window has 4,096" in found.sentence()
    assert estimate(llama_config(), context_tokens=4056, questions=2).fits


def test_a_very_long_context_is_cheaper_folded() -> None:
    config = llama_config(max_position_embeddings=10**6)
    found = estimate(config, context_tokens=50_000, questions=18, inner_steps=2, layers=1)
    assert found.cheaper == "fold"
    assert "folding is cheapest" in found.sentence()
    assert "It saves memory" in found.sentence()


def test_everything_goes_into_json() -> None:
    found = estimate(gpt2_config(), context_tokens=100, questions=4, speed=Speed.of_tokens(gpt2_config(), 1e5))
    values = json.loads(json.dumps(found.to_dict()))
    assert values["cached"]["seconds"] == found.cached.seconds
    assert values["sentence"] == found.sentence()
    # 100 tokens at 100,000 a second; the rates differ by the attention alone.
    assert found.cached.fixed_seconds == pytest.approx(1e-3, rel=0.1)


def test_speed_is_measured_and_leaves_the_model_as_it_was() -> None:
    model, _ = tiny()
    next(iter(model.parameters())).requires_grad_(False)
    before = [weight.requires_grad for weight in model.parameters()]
    speed = measure_speed(model, tokens=16, rows=2, repeats=1)
    assert min(speed.forward, speed.backward, speed.step) > 0
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert estimate(model, context_tokens=20, questions=2, speed=speed).fold.seconds


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"questions": 0}, "questions is 0, expected a whole number of at least 1"),
        ({"layers": 9}, "layers is 9, expected 1 to 3"),
        ({"targets": ("head",)}, "found 'head', expected 'all-linear' or one of q_proj, k_proj"),
        ({"dtype": "int3"}, "dtype: found 'int3'"),
    ],
)
def test_bad_numbers_are_refused(case: dict[str, Any], said: str) -> None:
    whole: dict[str, Any] = {"context_tokens": 100, "questions": 1} | case
    with pytest.raises(UserError, match=said):
        estimate(llama_config(), **whole)


def test_a_configuration_without_sizes_is_refused() -> None:
    from transformers import PreTrainedConfig

    with pytest.raises(UserError, match="has no hidden_size, expected that of a causal language model"):
        estimate(PreTrainedConfig(), context_tokens=100, questions=1)
