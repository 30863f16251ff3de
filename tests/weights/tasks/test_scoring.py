"""Likelihoods of candidates: the same with and without padding, sharing, copies and micro-batches."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from agentopt.weights.tasks import (
    Accuracy,
    Batch,
    Batches,
    CrossEntropy,
    Encoded,
    EncodedExample,
    LanguageModelLoss,
    log_likelihoods,
)


def causal(kind: str, **changes: Any) -> Any:
    """A random model of two layers of this type."""
    import torch
    import transformers

    sizes = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=128, **changes)
    else:
        config = transformers.AutoConfig.for_model(
            kind,
            **sizes,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            **changes,
        )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():  # far from uniform, so that a wrong position shows
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def example(number: int, lengths: tuple[int, ...], prompt: int) -> EncodedExample:
    draw = random.Random(number)
    ids = [tuple(draw.randrange(2, 61) for _ in range(length)) for length in (prompt, *lengths)]
    return EncodedExample(str(number), f"row {number}", ids[0], tuple(ids[1:]), number % len(lengths), ("?",) * 9)


TREES = [example(1, (1, 3, 2), 7), example(2, (2, 2), 3), example(3, (1, 1, 1, 4), 12), example(4, (5, 2), 1)]
WORDS = [example(number, (1, 1), 3 + 2 * number) for number in range(6)]
TEXTS = [example(number, (2 + number,), 9 - number) for number in range(5)]


def alone(model: Any, one: EncodedExample, *, mean: bool = False) -> list[float]:
    """The log-probability of each candidate, computed without padding, mask or sharing."""
    import torch

    result: list[float] = []
    for candidate in one.candidates:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*one.prompt, *candidate]]), use_cache=False).logits[0]
        start = len(one.prompt) - 1
        chosen = logits[start:-1].log_softmax(1)[torch.arange(len(candidate)), torch.tensor(candidate)]
        result.append(float(chosen.mean() if mean else chosen.sum()))
    return result


@pytest.mark.parametrize("rows", [TREES, WORDS, TEXTS])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"attn_implementation": "eager"}),
        ("gpt2", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 6}),  # too narrow for trees: one row per candidate
        ("gemma", {}),
        ("phi3", {}),
        ("smollm3", {}),
    ],
)
def test_a_batch_gives_what_each_candidate_gives_alone(
    kind: str, changes: dict[str, Any], rows: list[EncodedExample]
) -> None:
    check(causal(kind, **changes), rows, mean=False)


def test_the_mean_over_tokens() -> None:
    check(causal("llama"), TREES, mean=True)


def check(model: Any, rows: list[EncodedExample], *, mean: bool) -> None:
    import torch

    with torch.no_grad():
        found = log_likelihoods(model, rows, pad=0, mean=mean)
    assert found.shape == (1, len(rows), max(len(row.candidates) for row in rows))
    for number, row in enumerate(rows):
        count = len(row.candidates)
        assert found[0, number, :count].tolist() == pytest.approx(alone(model, row, mean=mean), abs=2e-5)
        assert (found[0, number, count:] == float("-inf")).all()


def test_a_wrapped_model_gets_a_plain_mask_and_the_same_values() -> None:
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **given: Any) -> Any:
            assert given["attention_mask"].dim() == 2
            return self.inner(**given)

    model = causal("llama")
    with torch.no_grad():
        shared = log_likelihoods(model, TREES, copies=2, pad=0)
        single = log_likelihoods(Wrapper(model), TREES, copies=2, pad=0)
    torch.testing.assert_close(shared, single, atol=1e-5, rtol=0)


def test_the_head_runs_where_something_is_predicted_and_nowhere_else() -> None:
    import torch

    model = causal("llama")
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    with torch.no_grad():
        CrossEntropy(batch(WORDS))(model)
        LanguageModelLoss(batch(TEXTS))(model)
        CrossEntropy(batch(TREES))(model)
    assert seen == [(6, 1, 32), (5, 6, 32), (4, 6, 32)]


def batch(rows: list[EncodedExample], **changes: Any) -> Batch:
    return replace(Batch((tuple(rows),), pad=0, mean=False), **changes)


@pytest.mark.parametrize("objective", [CrossEntropy, LanguageModelLoss, Accuracy])
def test_copies_stand_one_after_the_other(objective: Any) -> None:
    import torch

    model = causal("llama")
    with torch.no_grad():
        once = objective(batch(TREES))(model)
        thrice = objective(batch(TREES)).losses(model, 3)
    assert once.shape == (4,) and thrice.shape == (3, 4) and thrice.dtype is torch.float32
    torch.testing.assert_close(thrice, once.expand(3, 4), atol=1e-5, rtol=0)


def test_cross_entropy_is_over_the_candidates() -> None:
    import torch

    model = causal("gpt2")
    with torch.no_grad():
        loss = CrossEntropy(batch(TREES))(model)
        wrong = Accuracy(batch(TREES))(model)
    for number, row in enumerate(TREES):
        scores = torch.tensor(alone(model, row))
        assert float(loss[number]) == pytest.approx(float(-scores.log_softmax(0)[row.answer]), abs=2e-5)
        assert bool(wrong[number]) == (int(scores.argmax()) != row.answer)


def test_losses_carry_gradients_for_first_order_training() -> None:
    import torch

    model = causal("llama")
    for rows, objective in ((TREES, CrossEntropy), (WORDS, CrossEntropy), (TEXTS, LanguageModelLoss)):
        model.zero_grad()
        objective(batch(rows))(model).mean().backward()
        gradients = [weight.grad for weight in model.parameters()]
        assert all(one is not None and bool(torch.isfinite(one).all()) for one in gradients)
        assert any(bool(one.any()) for one in gradients)


def test_shares_of_a_batch_give_the_bits_of_the_whole() -> None:
    import torch

    rows = tuple(example(number, (1, 2), 2 + number % 7) for number in range(16))
    encoded = Encoded("data", "classification", rows, ("a", "b"), ("a", "b"), 0, False, (), 0, ())
    whole = Batches(encoded, batch=16, seed=3, micro_batch=4).at(0)
    model = causal("llama")
    with torch.no_grad():
        union = CrossEntropy(whole).losses(model, 2)
        shares = [CrossEntropy(whole.share(rank, 2)) for rank in range(2)]
        parts = torch.cat([share.losses(model, 2) for share in shares], 1)
        singles = torch.cat([one.losses(model, 2) for one in CrossEntropy(whole).split()], 1)
    assert torch.equal(union, parts) and torch.equal(union, singles)
    assert [share.batch.first for share in shares] == [0, 8]
    assert shares[1].pass_sizes == [4, 4]
    assert [one.batch.first for one in shares[1].split()] == [8, 12]


def test_bfloat16_trees_run() -> None:
    import torch

    model = causal("llama").to(torch.bfloat16)
    with torch.no_grad():
        found = log_likelihoods(model, TREES, pad=0)
        plain = [alone(model, row) for row in TREES]
    assert found.dtype is torch.float32
    assert found[0, 2].tolist() == pytest.approx(plain[2], abs=0.3)
