"""A model small enough to be tuned hundreds of times: a GPT of 105,408 parameters, pre-trained here on topics.

SYNTHETIC. A sequence is a start, twelve words, a separator and a label. Every topic has eight words; a word is one of
its topic's with probability 0.6, else any word. Pre-training (AdamW) teaches the label of the topic. The shifted task
regroups the eight topics onto two labels, so that what was learnt is useful but wrong as it stands: of the two topics
whose labels are used, each is given the other's label. `aligned` asks for those two known labels; without alignment the
answers are two words that never stood where a label stands.

Everything is a function of the seed: the task, the weights, the rows and their order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

TOPICS, WORDS_EACH, NOISE, LENGTH = 8, 8, 16, 12
WORDS = TOPICS * WORDS_EACH + NOISE
LABEL = WORDS
"""Token id of topic 0's label."""
SEPARATOR, START = LABEL + TOPICS, LABEL + TOPICS + 1
VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS = START + 1, 16, 64, 2, 4
OWN = 0.6
PRETRAINING_STEPS = 1500


class Block(nn.Module):
    """Attention and a feed-forward layer, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.attention_in = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        rows, tokens, _ = x.shape
        heads = self.attention_in(self.norm1(x)).view(rows, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = (heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).masked_fill(later, -1e4)
        mixed = weights.float().softmax(-1).to(x.dtype) @ heads[2]
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """Two blocks; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Any, last: bool = False) -> Any:
        """Logits of every position, or of the last alone (shape (rows, 1, vocabulary))."""
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.embed(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1:] if last else x))


@dataclass(frozen=True)
class Rows:
    """Token ids (rows, 14), ending with the separator, and the index of the right answer."""

    tokens: Any
    answers: Any

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, which: Any) -> Rows:
        """Some of the rows."""
        return Rows(self.tokens[which], self.answers[which])


@dataclass(frozen=True)
class Task:
    """The shifted task of one seed: the two answers' token ids and its rows."""

    candidates: tuple[int, int]
    train: Rows
    dev: Rows
    test: Rows
    seed: int

    def batch(self, step: int, size: int = 16) -> Rows:
        """The batch of a step: a function of the seed and the step."""
        return self.train.pick(np.random.default_rng([self.seed, 7, step]).integers(0, len(self.train), size))


def documents(rng: np.random.Generator, topics: np.ndarray) -> np.ndarray:
    """A sequence without its label for every topic given."""
    own = topics[:, None] * WORDS_EACH + rng.integers(0, WORDS_EACH, (len(topics), LENGTH))
    words = np.where(rng.random((len(topics), LENGTH)) < OWN, own, rng.integers(0, WORDS, (len(topics), LENGTH)))
    edge = np.ones((len(topics), 1), dtype=np.int64)
    return np.concatenate([edge * START, words, edge * SEPARATOR], axis=1)


def make_task(seed: int, aligned: bool, train: int = 1000, dev: int = 400, test: int = 1000) -> Task:
    """Topics regrouped onto two answers; the same rows with and without alignment."""
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(TOPICS)
    group = np.zeros(TOPICS, dtype=np.int64)
    first, second = int(order[0]), int(order[1])
    group[second], group[first] = 0, 1  # each of the two gets the other's label
    group[order[2 : 2 + (TOPICS - 2) // 2]] = 1
    noise = TOPICS * WORDS_EACH + rng.permutation(NOISE)[:2]
    candidates = (LABEL + first, LABEL + second) if aligned else (int(noise[0]), int(noise[1]))

    def rows(count: int) -> Rows:
        topics = rng.integers(0, TOPICS, count)
        return Rows(torch.from_numpy(documents(rng, topics)), torch.from_numpy(group[topics]))

    return Task(candidates, rows(train), rows(dev), rows(test), seed)


def pretrained(seed: int, folder: Path | None = None, steps: int = PRETRAINING_STEPS) -> tuple[TinyGPT, float]:
    """The pre-trained model of one seed, with its accuracy on the eight labels; kept in `folder` once made."""
    from safetensors.torch import load_file, save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyGPT()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 if parameter.shape[0] != VOCABULARY else 1 / math.sqrt(WIDTH))
    file = None if folder is None else folder / f"toy-{seed}-{steps}.safetensors"
    if file is not None and file.exists():
        model.load_state_dict({**load_file(file), "head.weight": load_file(file)["embed.weight"]})
    else:
        _pretrain(model, seed, steps)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.detach() for name, value in model.named_parameters()}, file)
    rng = np.random.default_rng([seed, 3])
    topics = rng.integers(0, TOPICS, 2000)
    with torch.inference_mode():
        logits = model(torch.from_numpy(documents(rng, topics)), last=True)[:, 0, LABEL : LABEL + TOPICS]
    return model.eval().requires_grad_(True), float((logits.argmax(-1).numpy() == topics).mean())


def _pretrain(model: TinyGPT, seed: int, steps: int) -> None:
    rng = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        topics = rng.integers(0, TOPICS, 64)
        tokens = torch.from_numpy(np.concatenate([documents(rng, topics), LABEL + topics[:, None]], axis=1))
        logits = model(tokens[:, :-1])
        every = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = every + functional.cross_entropy(logits[:, -1], tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class CrossEntropy:
    """Per-example cross-entropy over the two candidate answers; several copies of the weights in one pass."""

    rows: Rows
    candidates: tuple[int, int]

    def logits(self, model: Any, tokens: Any) -> Any:
        return model(tokens, last=True)[:, 0, list(self.candidates)].float()

    def __call__(self, model: Any) -> Any:
        return self.of(self.logits(model, self.rows.tokens), self.rows.answers)

    def losses(self, model: Any, copies: int) -> Any:
        logits = self.logits(model, self.rows.tokens.repeat(copies, 1))
        return self.of(logits, self.rows.answers.repeat(copies)).view(copies, -1)

    def of(self, logits: Any, answers: Any) -> Any:
        return functional.cross_entropy(logits, answers, reduction="none")


@dataclass(frozen=True)
class Errors(CrossEntropy):
    """0 for a right answer, 1 for a wrong one: an objective without a gradient."""

    def of(self, logits: Any, answers: Any) -> Any:
        return (logits.argmax(-1) != answers).float()


def accuracy(model: Any, rows: Rows, candidates: tuple[int, int]) -> float:
    """Share of right answers; logits that are not finite count as the first answer."""
    with torch.inference_mode():
        logits = model(rows.tokens, last=True)[:, 0, list(candidates)].float()
    return float((torch.nan_to_num(logits).argmax(-1) == rows.answers).float().mean())
