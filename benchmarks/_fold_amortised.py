"""Fold once and ask, read again for every question, or keep the keys and values: seconds and bytes of each.

One document, questions one after another as they come. Parts are timed (folding; reading the prefix; one question each
way) and added up: a question costs the same whether it is the first or the last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

QUESTION, ANSWER, ROW, RANK, STEPS = 32, 8, 128, 16, 4
WORDS = 2000


@dataclass(frozen=True)
class Parts:
    """Seconds, each as it was measured, and bytes."""

    context: int
    question_tokens: int
    fold: list[float]
    prefix: list[float]
    folded_question: list[float]
    reread_question: list[float]
    cached_question: list[float]
    adapter_bytes: int
    prefix_bytes: int
    question_bytes: int
    """Keys and values of one question and its answer."""
    whole_fold: float
    """`Folder.fold`, which also measures the recall before and after."""

    def total(self, way: str, questions: int) -> float:
        """Seconds of the document and so many questions."""
        fixed = {"fold": self.fold, "cached": self.prefix, "reread": [0.0]}[way]
        each = {"fold": self.folded_question, "cached": self.cached_question, "reread": self.reread_question}[way]
        return statistics.median(fixed) + questions * statistics.median(each)

    def break_even(self, way: str) -> float | None:
        """Questions from which on folding is cheaper; None when a question costs it as much or more."""
        saved = self.total(way, 1) - self.total(way, 0) - (self.total("fold", 1) - self.total("fold", 0))
        return None if saved <= 0 else max(0.0, (self.total("fold", 0) - self.total(way, 0)) / saved)


def random_model(quick: bool) -> tuple[Any, Any]:
    """A Llama with random weights, about 6M, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64 if quick else 256,
        intermediate_size=192 if quick else 768,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=4 if quick else 8,
        num_key_value_heads=2 if quick else 4,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer


def facts_of(codec: Any, tokens: int) -> list[str]:
    """Sentences of about `ROW` tokens that make a context of about so many tokens; each is a row of the inner loop."""
    found: list[str] = []
    left, number = tokens, 0
    while left > 0:
        want = min(ROW - len(codec.lead) - 1, left)
        words: list[str] = []
        while len(codec.ids(" ".join(words))) < want:
            words.append(f"w{number * 7919 % WORDS}")
            number += 1
        found.append(" ".join(words))
        left -= len(codec.ids(found[-1] + "\n"))
    return found


def measure(folder: Any, tokens: int, repeats: int, note: Callable[[str], None]) -> Parts:
    """One context length."""
    import torch

    codec = folder.codec
    facts = facts_of(codec, tokens)
    question = " ".join(f"w{number * 31 % WORDS}" for number in range(QUESTION))
    while len(codec.question(question)) > QUESTION:
        question = question.rpartition(" ")[0]
    rows = [folder.kit.encoder.facts(tuple(facts))]
    fold = [_seconds(lambda: folder.kit.fold(rows, graph=False)) for _ in range(repeats)]
    begun = time.process_time()
    adapter = folder.fold(facts)
    whole = time.process_time() - begun
    many = max(4, repeats)
    ask = [_seconds(lambda: folder.ask(adapter, question, gate=False, max_new=ANSWER)) for _ in range(many + 1)][1:]
    with folder.base_in_use():
        reader = folder.reader(ANSWER)
        known = reader.prefix(facts)
        prefix = [_seconds(lambda: reader.prefix(facts)) for _ in range(repeats)]
        cached = [_seconds(lambda: reader.ask_many(known, [question])) for _ in range(many + 1)][1:]
        reread = [_seconds(lambda: reader.ask(facts, question)) for _ in range(repeats)]
        with torch.no_grad():
            ids = torch.tensor([[*codec.question(question), *([codec.pad] * ANSWER)]])
            cache = folder.model(input_ids=ids, use_cache=True).past_key_values
    found = Parts(
        context=len(codec.context(facts)),
        question_tokens=len(codec.question(question)),
        fold=fold,
        prefix=prefix,
        folded_question=ask,
        reread_question=reread,
        cached_question=cached,
        adapter_bytes=sum(one.numel() * one.element_size() for one in adapter.state.values()),
        prefix_bytes=known.bytes,
        question_bytes=sum(part.numel() * part.element_size() for layer in cache.layers for part in _pair(layer)),
        whole_fold=whole,
    )
    note(
        f"{found.context} tokens: fold {statistics.median(fold):.3f} s, prefix {statistics.median(prefix):.3f} s; a "
        f"question folded {statistics.median(ask):.4f} s, cached {statistics.median(cached):.4f} s, "
        f"read again {statistics.median(reread):.3f} s"
    )
    return found


def _pair(layer: Any) -> tuple[Any, Any]:
    return layer.keys, layer.values


def _seconds(act: Callable[[], Any]) -> float:
    begun = time.process_time()
    act()
    return time.process_time() - begun


@contextmanager
def processor_time() -> Iterator[None]:
    """Within, the estimator's clock is the processor's as well: other work on the machine counts for neither."""
    with mock.patch("time.perf_counter", time.process_time):
        yield
