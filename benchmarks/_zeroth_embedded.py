"""Part (b) of the study: the embedded model of 135M weights on rows of SST-2 and TREC.

A grid of rates and seeds over the whole model is more than a CPU does in an hour. So the study tunes the upper four of
the thirty blocks (14M weights), and what the frozen lower blocks make of a row is computed once for all runs. Rows
whose prompt is longer than 24 tokens are left out. The rows are the same for every seed; their order, the noise and
random masks are not.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _zeroth_peers import LoraAdam
from _zeroth_runs import Cell
from torch import nn
from torch.nn import functional

from agentopt.weights import load, zeroth
from agentopt.weights.zeroth import ZerothOrder

UPPER, WIDTH, BATCH, FORWARDS = 4, 24, 8, 400
SIZES = {"train": 500, "dev": 150, "test": 300}


@dataclass(frozen=True)
class Data:
    """A data set, its prompt and its label words, known to the model or not."""

    name: str
    template: str
    words: tuple[str, ...]
    others: tuple[str, ...]


DATA = {
    "sst2": Data("sst2", "{text} It was", (" terrible", " great"), (" paper", " window")),
    "trec": Data(
        "trec",
        "Question: {text}\nThe answer is a",
        (" description", " thing", " person", " place", " number", " word"),
        (" paper", " window", " river", " metal", " garden", " table"),
    ),
}
TREC = {"DESC": 0, "ENTY": 1, "HUM": 2, "LOC": 3, "NUM": 4, "ABBR": 5}


@dataclass(frozen=True)
class Method:
    """What ZerothOrder is given in one run."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    words: bool = True
    kind: str = "zo"
    preset: str = ""
    forwards: int = 2


METHODS = {
    "full": Method(),
    "small 50 %": Method({"mask": "small", "density": 0.5}),
    "AdamW, LoRA": Method(kind="lora-adam", rates=(1e-3,), forwards=3),
    "random 50 %": Method({"mask": "random", "density": 0.5}),
    "full, other label words": Method(words=False),
    "fzoo": Method(preset="fzoo", rates=(1e-3, 3e-3, 1e-2), forwards=9),
}
ORDER = (
    ("sst2", ("full", "small 50 %", "AdamW, LoRA")),
    ("trec", ("full", "small 50 %", "AdamW, LoRA")),
    ("sst2", ("random 50 %", "full, other label words", "fzoo")),
)


def cells(seeds: int) -> list[Cell]:
    """Every run, the most important first."""
    return [
        Cell(task, name, lr, seed)
        for task, names in ORDER
        for seed in range(seeds)
        for name in names
        for lr in METHODS[name].rates
    ]


def read(task: str, part: str, folder: Path) -> list[tuple[str, int]]:
    """All rows of a data set: text and number of the label."""
    if task == "sst2":
        text = (folder / "classification" / "sst2" / f"stsa.binary.{part}").read_text(encoding="utf-8")
        return [(line[2:].strip(), int(line[0])) for line in text.splitlines() if line]
    text = (folder / "classification" / "trec" / f"{part}.txt").read_text(encoding="utf-8")
    return [(line.split(" ", 1)[1].strip(), TREC[line.split(":", 1)[0]]) for line in text.splitlines() if line]


@dataclass(frozen=True)
class Rows:
    """What the lower blocks make of the rows, which of their positions are real, and the answers."""

    real: Any
    answers: Any
    hidden: Any

    def pick(self, which: Any) -> Rows:
        return Rows(self.real[which], self.answers[which], self.hidden[which])

    def __len__(self) -> int:
        return len(self.real)


class Upper(nn.Module):
    """The last blocks and the norm of a Llama model: from the lower blocks' output to the state of the last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model.model.layers[-UPPER:])
        self.norm = model.model.norm
        self.rotary = model.model.rotary_emb

    def forward(self, hidden: Any, real: Any) -> Any:
        return self.norm(through(self.layers, self.rotary, hidden, real)[:, -1:])[:, 0]


def through(layers: Any, rotary: Any, hidden: Any, real: Any) -> Any:
    """Some blocks, with a mask that hides padding and later tokens."""
    width = hidden.shape[1]
    places = torch.arange(width).expand(len(hidden), width)
    seen = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, None, :]
    seen = seen | torch.eye(width, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    angles = rotary(hidden, places)
    for layer in layers:
        out = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=angles)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


@functools.cache
def embedded() -> tuple[Any, Any]:
    """The model and its tokenizer, as they come."""
    return load.model("embedded", device="cpu")


@functools.cache
def prepared(task: str, folder: Path) -> dict[str, Rows]:
    """The rows of the study with what the lower blocks make of them; the same for every run."""
    model, tokenizer = embedded()
    template = DATA[task].template
    pool, held_out = read(task, "train", folder), read(task, "test", folder)
    rng = random.Random(0)
    seen: set[str] = set()
    parts: dict[str, list[tuple[list[int], int]]] = {}
    rng.shuffle(pool)
    rng.shuffle(held_out)
    for part, source in (("train", pool), ("dev", pool), ("test", held_out)):
        rows: list[tuple[list[int], int]] = []
        for text, answer in source:
            if len(rows) == SIZES[part]:
                break
            if text in seen:
                continue
            ids = tokenizer(template.format(text=text))["input_ids"]
            if len(ids) <= WIDTH:
                seen.add(text)
                rows.append((ids, answer))
        parts[part] = rows
    return {part: _encoded(model, tokenizer, rows) for part, rows in parts.items()}


def _encoded(model: Any, tokenizer: Any, rows: list[tuple[list[int], int]]) -> Rows:
    ids = torch.full((len(rows), WIDTH), tokenizer.pad_token_id)
    real = torch.zeros((len(rows), WIDTH), dtype=torch.bool)
    for number, (tokens, _) in enumerate(rows):
        ids[number, -len(tokens) :] = torch.tensor(tokens)
        real[number, -len(tokens) :] = True
    hidden: list[Any] = []
    inner = model.model
    with torch.no_grad():
        for at in range(0, len(rows), 50):
            part = inner.embed_tokens(ids[at : at + 50])
            hidden.append(through(inner.layers[:-UPPER], inner.rotary_emb, part, real[at : at + 50]))
    return Rows(real, torch.tensor([answer for _, answer in rows]), torch.cat(hidden))


@dataclass(frozen=True)
class CrossEntropy:
    """Per-example cross-entropy over the label words at the end of the prompt."""

    rows: Rows
    columns: Any
    """Columns of the output layer: the label words'."""

    def logits(self, model: Any, copies: int = 1) -> Any:
        rows = self.rows
        return model(rows.hidden.repeat(copies, 1, 1), rows.real.repeat(copies, 1)) @ self.columns.t()

    def __call__(self, model: Any) -> Any:
        return self.losses(model, 1)[0]

    def losses(self, model: Any, copies: int) -> Any:
        answers = self.rows.answers.repeat(copies)
        return functional.cross_entropy(self.logits(model, copies), answers, reduction="none").view(copies, -1)


def accuracy(model: Any, rows: Rows, columns: Any) -> float:
    """Share of right answers."""
    right = 0
    with torch.inference_mode():
        for at in range(0, len(rows), 50):
            part = rows.pick(slice(at, at + 50))
            logits = CrossEntropy(part, columns).logits(model)
            right += int((torch.nan_to_num(logits).argmax(-1) == part.answers).sum())
    return right / len(rows)


@functools.cache
def subject(task: str, words: bool, folder: Path) -> tuple[Upper, Any, float]:
    """The upper blocks, the label words' columns of the output layer, and zero-shot accuracy on the test rows."""
    parts = prepared(task, folder)
    model, tokenizer = embedded()
    names = DATA[task].words if words else DATA[task].others
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in names]
    if any(len(one) != 1 for one in encoded):
        raise ValueError(f"{task}: a label word has several tokens: {dict(zip(names, encoded, strict=True))}")
    columns = model.lm_head.weight.detach()[[one[0] for one in encoded]].clone()
    upper = Upper(model)
    return upper, columns, accuracy(upper, parts["test"], columns)


def run(cell: Cell, folder: Path, forwards: int = FORWARDS) -> dict[str, Any]:
    """One run; the model is as it was afterwards."""
    method, folder = METHODS[cell.method], folder.resolve()
    parts = prepared(cell.part, folder)
    upper, columns, zero_shot = subject(cell.part, method.words, folder)
    before = {name: weight.detach().clone() for name, weight in upper.named_parameters()}
    upper.requires_grad_(True)
    optimizer = _optimizer(method, upper, cell)
    failed: int | None = None
    for step in range(forwards // method.forwards):
        which = np.random.default_rng([cell.seed, 11, step]).integers(0, len(parts["train"]), BATCH)
        try:
            optimizer.step(CrossEntropy(parts["train"].pick(torch.from_numpy(which)), columns))
        except (zeroth.NonFiniteLoss, FloatingPointError):
            failed = step
            break
    found = {
        "zero_shot": zero_shot,
        "dev": accuracy(upper, parts["dev"], columns),
        "test": accuracy(upper, parts["test"], columns),
        "forwards": forwards // method.forwards * method.forwards,
        "failed_at": failed,
    }
    if method.kind == "lora-adam":
        optimizer.adapters.detach_model()
    with torch.no_grad():
        for name, weight in upper.named_parameters():
            weight.copy_(before[name])
    return found


def _optimizer(method: Method, subject: Any, cell: Cell) -> Any:
    if method.kind == "lora-adam":
        return LoraAdam(subject, cell.lr, seed=cell.seed)
    settings = {"lr": cell.lr, "seed": cell.seed, **method.settings}
    if method.preset:
        return ZerothOrder.preset(method.preset, subject, eps=1e-3, copies=3, **settings)
    return ZerothOrder(subject, eps=1e-3, **settings)
