"""Reading facts in the prompt: cached, re-read, trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from agentopt.errors import UserError
from agentopt.weights import adapters
from agentopt.weights.fold import FoldFormat, FoldTask, Question
from agentopt.weights.fold._answers import Written, write_answers
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._icr_training import IcrPoint, train_incontext
from agentopt.weights.fold._incontext import InContext
from agentopt.weights.fold._scores import FoldScores, judge
from tests.weights.tiny import tiny

NAMES, COLOURS = ("one", "two", "three", "four"), ("red", "blue", "green", "black")
WORDS = (*NAMES, *COLOURS, "is", "not", "dark", ".", "Question:", "Answer:", "So:", "x")
FACTS = ("one is red .", "two is dark blue .", "three is not green .")
CHOICES = ("red", "blue", "green")
# Choices of several tokens, one inside another.
NESTED = ("red", "red dark", "dark blue not", "green")


def llama() -> tuple[Any, Any]:
    return tiny(WORDS)


def gpt2() -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer = tiny(WORDS)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval(), tokenizer


def sliding() -> tuple[Any, Any]:
    """A model whose layers look back 8 tokens only, and whose heads share keys and values."""
    from transformers import MistralConfig, MistralForCausalLM

    _, tokenizer = tiny(WORDS)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval(), tokenizer


def questions(choices: tuple[str, ...]) -> list[Question]:
    texts = ("one is", "two", "three is not not not", "four is dark")
    return [Question(text, "red", (0,), choices=choices) for text in texts]


MODELS = pytest.mark.parametrize("make", [llama, gpt2, sliding])


# --- cached and re-read ----------------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("choices", [(), CHOICES, NESTED])
@pytest.mark.parametrize("multi_task", [True, False])
def test_cached_batched_and_single_answers_agree(make: Any, choices: tuple[str, ...], multi_task: bool) -> None:
    reader = InContext(*make(), multi_task=multi_task, batch=3, max_new=5)
    asked = questions(choices)
    prefix = reader.prefix(FACTS)
    cached, again = reader.ask_many(prefix, asked), reader.ask_many(prefix, asked)
    read, single = reader.ask_many(FACTS, asked), [reader.ask(FACTS, one) for one in asked]
    task, short = FoldTask("a", FACTS, tuple(asked)), FoldTask("b", FACTS[:1], tuple(asked))
    judged = reader.evaluate([task, short]).rows[: len(asked)]
    assert cached == again
    for one, *others in zip(cached, read, single, judged, strict=True):
        for other in others:
            assert other.text == one.text
            assert math.isclose(other.margin, one.margin, abs_tol=1e-5)
            assert math.isclose(other.logprob, one.logprob, abs_tol=1e-5)
    assert [one.recalled for one in cached] == [one.recalled for one in single]
    assert {one.source for one in cached} == {"in-context"}


@MODELS
def test_a_prefix_gives_the_logits_of_reading_and_stays_as_it_is(make: Any) -> None:
    model, tokenizer = make()
    reader = InContext(model, tokenizer, max_new=4)
    prefix = reader.prefix(FACTS)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.memory.cache.layers]
    reader.ask_many(prefix, questions(NESTED))
    for layer, (keys, values) in zip(prefix.memory.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    context, asked = reader.codec.context(FACTS), reader.codec.question("one is")
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([context + asked])).logits[0, len(context) :]
        ids = torch.tensor([asked, asked])
        rest = model(input_ids=ids, past_key_values=prefix.memory.taken([0, 0])).logits
    assert torch.allclose(rest, whole.expand_as(rest), atol=1e-5)


def test_the_bytes_of_a_prefix_are_its_keys_and_values() -> None:
    prefix = InContext(*llama()).prefix(FACTS)
    # Two of them, 2 layers, 4 heads of 8 numbers in float32.
    assert prefix.tokens == 14
    assert prefix.bytes == 2 * 2 * 4 * 8 * prefix.tokens * 4


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [CHOICES, NESTED])
def test_choices_are_scored_by_mean_log_probability(choices: tuple[str, ...]) -> None:
    model, tokenizer = llama()
    codec = Codec(tokenizer, FoldFormat(), multi_task=False)
    prompt = codec.question("two is")
    (found,) = write_answers(model, codec, [prompt], [choices])
    means: list[float] = []
    for choice in choices:
        part = codec.answer(choice) + ([codec.eos] if choices is NESTED else [])
        with torch.no_grad():
            ranked = model(input_ids=torch.tensor([prompt + part])).logits[0].log_softmax(-1)
        means.append(sum(float(ranked[len(prompt) + at - 1, one]) for at, one in enumerate(part)) / len(part))
    ordered = sorted(means, reverse=True)
    assert found.text == choices[means.index(ordered[0])]
    assert found.logprob == pytest.approx(ordered[0], abs=1e-5)
    assert found.margin == pytest.approx(ordered[0] - ordered[1], abs=1e-5)


def test_free_answers_are_greedy() -> None:
    model, tokenizer = llama()
    codec = Codec(tokenizer, FoldFormat(), multi_task=False)
    prompts = [codec.question(text) for text in ("one", "two is not dark")]
    found = write_answers(model, codec, prompts, [(), ()], max_new=5)
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert one.text == tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
        assert one.margin > 0 > one.logprob


def test_every_row_of_a_batch_may_have_an_adapter_of_its_own() -> None:
    model, tokenizer = llama()
    codec = Codec(tokenizer, FoldFormat())
    prompts = [codec.question(text) for text in ("one", "two is not dark", "three is", "four")]
    held = adapters.attach(model, rank=2)
    draw = torch.Generator().manual_seed(1)
    states = [
        {name: torch.randn(value.shape, generator=draw) for name, value in held.state().items()} for _ in range(2)
    ]
    options = [NESTED, CHOICES, (), NESTED]
    with held.use({name: torch.stack([one[name] for one in states]) for name in states[0]}):
        together = write_answers(model, codec, prompts, options, max_new=4)
    alone: list[Written] = []
    for number, state in enumerate(states):
        with held.use(state):
            alone += write_answers(model, codec, prompts[2 * number :][:2], options[2 * number :][:2], max_new=4)
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.recalled, one.tokens) == (other.text, other.recalled, other.tokens)
        assert one.margin == pytest.approx(other.margin, abs=1e-4)


@pytest.mark.parametrize(
    "format",
    [
        FoldFormat(),
        FoldFormat(joiner=" ; ", recall=" x {facts} So:", answer=" is {answer} ."),
        FoldFormat(question="{question}"),
    ],
)
@pytest.mark.parametrize("relevant", [(), (1,), (2, 0)])
def test_a_target_is_read_back_as_what_it_was_made_of(format: FoldFormat, relevant: tuple[int, ...]) -> None:
    codec = Codec(tiny((*WORDS, ";"))[1], format)
    question = Question("two is", "dark blue", relevant)
    response = codec.response(question, FACTS)
    recalled, answer = codec.parse(codec.text(response.ids))
    assert recalled is not None
    assert codec.sentences(recalled) == tuple(FACTS[number] for number in relevant)
    assert answer == "dark blue"
    assert response.ids[-1] == codec.eos
    assert codec.marked(response.ids[: response.recalled])
    assert not any(codec.marked(response.ids[:end]) for end in range(1, response.recalled))


def test_recall_is_judged_in_order_and_as_a_set() -> None:
    codec = Codec(llama()[1], FoldFormat())
    task = FoldTask("a", FACTS, (Question("q", "red", (2, 0), depth=2, choices=CHOICES),))
    right = Written("red", (FACTS[2], FACTS[0]), True, 1.0, -0.1, 9)
    turned, less = replace(right, recalled=right.recalled[::-1]), replace(right, recalled=right.recalled[:1])
    wrong, unclosed = replace(right, text="blue"), replace(right, closed=False)
    rows = tuple(judge(task, 0, one, codec=codec) for one in (right, turned, less, wrong, unclosed))
    assert [row.recall_exact for row in rows] == [True, False, False, True, False]
    assert [row.recall_set for row in rows] == [True, True, False, True, False]
    scores = FoldScores(rows)
    assert (scores.accuracy, scores.recall_exact, scores.recall_set) == (0.8, 0.4, 0.6)
    assert scores.by_depth() == {2: 0.8}
    single = judge(task, 0, right, codec=Codec(llama()[1], FoldFormat(), multi_task=False))
    assert FoldScores((single,)).recall_exact is None


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_what_is_longer_than_the_window_is_refused() -> None:
    reader = InContext(*gpt2())
    with pytest.raises(UserError, match=r"the model's window has 64; fold the facts instead"):
        reader.ask(FACTS * 5, "one is", CHOICES)
    with pytest.raises(UserError, match="fold the facts instead"):
        reader.prefix(FACTS * 5)
    with pytest.raises(UserError, match="window has 64"):
        train_incontext(*gpt2(), [FoldTask("long", FACTS * 5, (Question("one", "red"),))], val=tasks(2), steps=1)


@pytest.mark.parametrize(
    ("facts", "choices", "said"),
    [
        ([], (), "found no facts"),
        ("one is red .", (), "expected a list of facts"),
        (FACTS, ("red", "red"), "are the same to the tokenizer"),
        (FACTS, ("red", " "), "makes no token of ' '"),
    ],
)
def test_bad_input_is_refused(facts: Any, choices: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        InContext(*llama()).ask(facts, "one is", choices)


def test_a_format_without_its_parts_is_refused() -> None:
    _, tokenizer = llama()
    with pytest.raises(UserError, match="there the answer begins"):
        Codec(tokenizer, FoldFormat(recall=" {facts}"))
    with pytest.raises(UserError, match=r"question is 'Why', expected a text with \{question\} in it"):
        Codec(tokenizer, FoldFormat(question="Why"))


# --- training --------------------------------------------------------------------------------------------------------


def tasks(count: int, first: int = 0) -> list[FoldTask]:
    """A fact or two, and what one of them says."""
    found: list[FoldTask] = []
    for number in range(first, first + count):
        name, colour = NAMES[number % 4], COLOURS[number // 4 % 4]
        found.append(FoldTask(str(number), (f"{name} is {colour} .",), (Question(name, colour, (0,)),)))
    return found


def test_training_makes_a_reader_and_stops_when_nothing_is_left_to_win() -> None:
    model, tokenizer = llama()
    model.requires_grad_(False)
    seen: list[IcrPoint] = []
    result = train_incontext(
        model, tokenizer, tasks(16), val=tasks(8, 3), lr=5e-3, eval_every=15, patience=2, on_point=seen.append
    )
    assert result.stopped == "converged"
    assert result.best.val_accuracy == result.best.val_recall == 1.0
    assert result.curve == tuple(seen)
    assert result.steps == seen[-1].step < 200
    scores = result.reader.evaluate(tasks(16))
    assert (scores.accuracy, scores.recall_exact) == (1.0, 1.0)
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


def test_the_best_weights_are_kept_and_training_repeats_itself() -> None:
    runs: list[tuple[Any, Any]] = []
    for _ in range(2):
        model, tokenizer = llama()
        # Far too fast at the end: what comes last is not best.
        result = train_incontext(
            model, tokenizer, tasks(16), val=tasks(8), lr=0.1, warmup=60, steps=60, eval_every=5, patience=0, max_new=8
        )
        runs.append((result, [weight.clone() for weight in model.parameters()]))
    (first, weights), (second, others) = runs
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
    assert [point.val_loss for point in first.curve] == [point.val_loss for point in second.curve]
    assert first.best_step < first.steps == 60
    assert first.reader.evaluate(tasks(8), questions=4).accuracy == first.best.val_accuracy


def test_an_adapter_can_be_trained_alone() -> None:
    model, tokenizer = llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = train_incontext(
        model, tokenizer, tasks(8), val=tasks(4), method="lora", rank=4, steps=6, eval_every=3, multi_task=False
    )
    assert result.adapters is not None
    assert result.curve[-1].train_loss < result.curve[0].train_loss
    assert result.best.val_recall is None
    result.adapters.detach_model()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("max_tokens", [64, 4096])
@pytest.mark.parametrize("context_weight", [0, 0.25])
def test_the_loss_is_what_the_options_say(max_tokens: int, context_weight: float) -> None:
    model, tokenizer = llama()
    task = FoldTask("a", FACTS, (Question("two is", "dark blue", (2, 0)), Question("one", "red", (0,))))
    codec = Codec(tokenizer, FoldFormat())
    expected: list[float] = []
    for question in task.questions:
        context = codec.context(FACTS) + codec.question(question.text)
        response = codec.response(question, FACTS)
        ids = torch.tensor([context + list(response.ids)])
        with torch.no_grad():
            ranked = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nll = -ranked.gather(1, ids[0, 1:, None])[:, 0]
        start = len(context) - 1
        answer = float(nll[start + response.recalled :].mean())
        expected.append(
            answer
            + 0.5 * float(nll[start : start + response.recalled].mean())
            + context_weight * float(nll[:start].mean())
        )
    result = train_incontext(
        model,
        tokenizer,
        [task],
        val=[task],
        steps=1,
        documents=1,
        lr=1e-12,
        recall_weight=0.5,
        context_weight=context_weight,
        shuffle=False,
        max_tokens=max_tokens,
        max_new=2,
    )
    assert result.curve[0].train_loss == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert result.curve[0].val_loss == pytest.approx(sum(expected) / 2, abs=1e-4)


def test_a_curriculum_begins_with_few_facts_and_waits_with_stopping() -> None:
    model, tokenizer = llama()
    short, long = tasks(4), [FoldTask("long", FACTS * 6, (Question("one", "red", (0,)),))] * 4
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    train: dict[str, Any] = {"val": short, "documents": 2, "max_new": 2, "lr": 1e-12, "eval_every": 1, "patience": 1}
    result = train_incontext(model, tokenizer, [*long, *short], steps=20, curriculum=8, **train)
    hook.remove()
    assert max(widths[:4]) < 20 < max(widths)
    assert (result.stopped, result.steps) == ("converged", 9)


@MODELS
def test_sharing_the_pass_over_the_facts_trains_the_same(make: Any) -> None:
    longer = FoldTask("a", FACTS, (Question("two is", "dark blue", (2, 0)), Question("one", "red", (0,))))
    shorter = FoldTask("b", FACTS[1:], (Question("two is not", "green", (0,)), Question("x", "red", (1,))))
    trained: list[dict[str, Any]] = []
    for share in (True, False):
        model, tokenizer = make()
        given = [longer, shorter]
        train_incontext(
            model, tokenizer, given, val=given, steps=2, warmup=0, documents=2, share_context=share, max_new=2
        )
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-4), name  # each number moved by about 2e-3


def test_training_can_be_stopped_and_refuses_what_it_does_not_know() -> None:
    class Stop:
        wanted = True

    result = train_incontext(*llama(), tasks(4), val=tasks(2), stop=Stop(), max_new=2)
    assert (result.stopped, result.steps) == ("stopped", 1)
    with pytest.raises(UserError, match="unknown option 'rate'"):
        train_incontext(*llama(), tasks(4), val=tasks(2), rate=1)
    with pytest.raises(UserError, match="val has no questions"):
        train_incontext(*llama(), tasks(4), val=[])
