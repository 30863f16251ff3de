"""A model of a few thousand weights, a tokenizer of whole words, and knowledge bases of one hop.

A knowledge base says who owns what ("ann owns lamp"); a question asks for the thing of one person. Names and things are
drawn anew for every task, so that an answer can come from the facts alone.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from agentopt.weights.fold import Folder, FoldFormat, FoldOptions, FoldTask, MetaOptions, Question

SPECIAL = ("<pad>", "<eos>", "<unk>")
NAMES = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal")
THINGS = ("lamp", "rope", "coin", "drum", "kite", "sled")
WORDS = (*NAMES, *THINGS, "owns", "owns?", "not", "so:", "does", "what", "lot", "a")
FORMAT = FoldFormat(question="{question}", answer=" {answer}", recall=" {facts} so:", joiner=" ")


def tiny_model(
    *, width: int = 32, layers: int = 2, seed: int = 0, spread: float = 0.02, words: tuple[str, ...] = WORDS
) -> tuple[Any, Any]:
    """A Llama with random weights, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=spread,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer


def tasks(count: int, *, seed: int = 0, facts: int = 3, questions: int = 2, choices: bool = True) -> list[FoldTask]:
    """Knowledge bases with questions about them."""
    made: list[FoldTask] = []
    for number in range(count):
        draw = random.Random(f"{seed}-{number}")
        names = draw.sample(NAMES, facts)
        things = draw.sample(THINGS, facts)
        asked = [
            Question(f"{names[place]} owns?", things[place], (place,), 1, THINGS if choices else ())
            for place in draw.sample(range(facts), questions)
        ]
        lines = tuple(f"{name} owns {thing}" for name, thing in zip(names, things, strict=True))
        made.append(FoldTask(f"{seed}-{number}", lines, tuple(asked)))
    return made


OPTIONS = FoldOptions(rank=8, alpha=32, inner_steps=1, unroll=1, rule="normalized", lr=1e-2, format=FORMAT)
TRAINING = MetaOptions(steps=60, lr=1e-2, documents=16, questions=2, eval_every=30, eval_tasks=32)


def options(**fields: Any) -> FoldOptions:
    """The same with other values."""
    return FoldOptions.model_validate({**OPTIONS.model_dump(), **fields})


SPREAD = 0.3
"""Of the base's random weights: with less, a frozen head could not tell its words apart."""


def save_base(folder: Path) -> Path:
    """The base as a model folder."""
    model, tokenizer = tiny_model(spread=SPREAD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base: Path, out: Path) -> Path:
    """A META folder on a frozen base: about three seconds to an accuracy of one."""
    with Folder(base, options=OPTIONS, device="cpu") as folder:
        folder.meta_train(tasks(400), val=tasks(32, seed=1), options=TRAINING, out=out)
    return out
