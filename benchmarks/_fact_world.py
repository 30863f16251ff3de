"""A synthetic compression task whose optimum is known: documents of tagged facts, a reader that looks facts up.

A document has seven facts, one per line, each one word: `tag:key:value`. A capsule is a list of such words. The reader
is a program: it answers the question "key" with the value that stands at the LAST mention of the key, or "unknown".
What is asked follows the tag, which the policy must find out from the reward alone:

    a  asked often        b  asked seldom        c  never asked
    s  never asked, and wrong: an outdated value of a key tagged a, mentioned after it, so that the reader with the
       whole document answers it wrongly. Leaving it out is better than the original.
    k  never asked, but a keep span: it must be in the capsule.

The budget is in words and allows for a part of the facts, so the best capsule is k, then a, then b, as far as they fit:
the expected score of the best capsule of every budget is known exactly, and so is the score of any capsule.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.capsules import Document, Meter, Span, Unit
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.capsules.train import Question, Sample

ASKED = {"a": 4, "b": 1}
PLAN = ("a", "a", "b", "b", "c", "s", "k")
KEYS = tuple(f"k{number:02d}" for number in range(8))
VALUES = tuple(f"v{number}" for number in range(4))
_PAIR = re.compile(r"(k\d\d):(v\d)")
WORDS = resolve_tokenizer("words")
_SPECIAL = ("<pad>", "<eos>", "<unk>")
WORDS_EACH = len(PLAN)
LIMITS = range(2, 6)
"""Budgets in words, of which a fact is one: two to five facts of seven."""


@dataclass(frozen=True)
class LookUp:
    """The reader: no model, no noise."""

    name: str = "look-up"

    def answers(self, text: str, questions: Sequence[str]) -> list[str]:
        known = dict(_PAIR.findall(text))
        return [known.get(question, "unknown") for question in questions]


def make(rng: random.Random) -> Sample:
    """One document with its questions (each as often as it is asked) and no targets."""
    keys = rng.sample(KEYS, len(PLAN) - 1)
    facts = [(tag, key, rng.choice(VALUES)) for tag, key in zip((t for t in PLAN if t != "s"), keys, strict=True)]
    stale_of = rng.choice([fact for fact in facts if fact[0] == "a"])
    rng.shuffle(facts)
    place = rng.randint(facts.index(stale_of) + 1, len(facts))
    facts.insert(place, ("s", stale_of[1], rng.choice([value for value in VALUES if value != stale_of[2]])))
    text, units, keep = "", [], []
    for tag, key, value in facts:
        start = len(text)
        text += f"{tag}:{key}:{value}\n"
        units.append(Unit(start, len(text) - 1, "item", 0, keep=tag == "k"))
        if tag == "k":
            keep.append(Span(start, len(text) - 1, "keep", "pattern"))
    document = Document(text.rstrip("\n"), tuple(units), tuple(keep))
    asked = [Question(key, value) for tag, key, value in facts for _ in range(ASKED.get(tag, 0))]
    return Sample(document, tuple(asked))


def facts_of(sample: Sample) -> list[tuple[str, str, str]]:
    """Tag, key and value of every line."""
    lines = [line.replace(":", " ").split() for line in sample.document.text.split("\n")]
    return [(tag, key, value) for tag, key, value in lines]


def random_capsule(sample: Sample, limit: int, rng: random.Random) -> str:
    """A valid capsule that knows nothing: the keep span, then facts at random, as many as fit."""
    return _written(sample, rng.sample(_others(sample), min(limit - 1, len(PLAN) - 1)))


def best_capsule(sample: Sample, limit: int) -> str:
    """The optimum: the keep span, then what is asked most."""
    facts = facts_of(sample)
    order = sorted((p for p in _others(sample) if facts[p][0] in ASKED), key=lambda place: -ASKED[facts[place][0]])
    return _written(sample, order[: limit - 1])


def _others(sample: Sample) -> list[int]:
    return [place for place, fact in enumerate(facts_of(sample)) if fact[0] != "k"]


def _written(sample: Sample, places: Sequence[int]) -> str:
    """The keep span, then the facts at these places in the order of the document."""
    facts = facts_of(sample)
    chosen = [fact for fact in facts if fact[0] == "k"] + [facts[place] for place in sorted(places)]
    return " ".join(":".join(fact) for fact in chosen)


def accuracy(sample: Sample, text: str) -> float:
    """Share of all questions answered right: the exact expectation, not a sample."""
    answers = LookUp().answers(text, [question.text for question in sample.questions])
    return sum(a == q.answer for a, q in zip(answers, sample.questions, strict=True)) / len(sample.questions)


def meter(limit: int) -> Meter:
    """Counts white-space separated words: the policy's own tokens, here."""
    return Meter(limit, WORDS)


def tiny_model(width: int, layers: int, seed: int) -> tuple[Any, Any]:
    """A transformer from scratch and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [
        *_SPECIAL,
        *(f"{tag}:{key}:{value}" for tag in "abcsk" for key in KEYS for value in VALUES),
        "[item]",
        "[item",
        "!]",
        *map(str, range(1, 13)),
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        initializer_range=0.1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=192,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer
