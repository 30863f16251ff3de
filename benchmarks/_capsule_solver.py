"""The ProofWriter part of `capsule_utility.py`: query-aware compression of a theory, read by a solver.

The budget is a share of the words of each theory. The reader is `_readers_proofwriter`, which is not a language model:
it understands whole sentences of the data set's grammar and nothing else, which favours methods that keep sentences
whole. That is the point of the part and its limit: whether the evidence for a proof survives, exactly.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from _capsule_baselines import Bigrams, best_units, most_informative, random_units, random_words, truncate, words
from _capsule_cells import Cell, Cells, key_of
from _readers_proofwriter import accuracy, sentences, statement_of

import agentopt as ao

TASK = "ProofWriter (solver)"
RATIOS = (0.75, 0.5, 0.25)
DRAWS = 5
"""Random methods are the mean of so many draws."""
Item = Mapping[str, str]
Method = Callable[[Item, int, random.Random], str]


def _count(text: str) -> int:
    return len(text.split())


def _ours(item: Item, limit: int, query: str | None) -> str:
    """What a user gets; a budget below what must stay is raised to it (and counted as over)."""
    try:
        return ao.capsule(item["context"], budget=ao.TokenBudget(limit, tokenizer="words"), query=query).text
    except ao.BudgetInfeasible as short:
        budget = ao.TokenBudget(short.minimum, tokenizer="words")
        return ao.capsule(item["context"], budget=budget, query=query).text


def methods(train: Sequence[Item]) -> dict[str, Method]:
    """Name → (item, limit, random draws) → shorter context."""
    model = Bigrams(item["context"] for item in train)

    def surprising(item: Item, limit: int, rng: random.Random) -> str:
        pieces = words(item["context"])
        return most_informative(pieces, model.information(item["context"]), limit, _count)

    def bm25(item: Item, limit: int, rng: random.Random) -> str:
        return best_units(sentences(item["context"]), statement_of(item), limit, _count)

    return {
        "BM25 sentences": bm25,
        "random sentences": lambda item, limit, rng: random_units(sentences(item["context"]), limit, _count, rng),
        "truncation": lambda item, limit, rng: truncate(item["context"], limit, _count),
        "random words": lambda item, limit, rng: random_words(item["context"], limit, _count, rng),
        "words by self-information (bigrams)": surprising,
        "ours, extract": lambda item, limit, rng: _ours(item, limit, statement_of(item)),
        "ours, extract, without the question": lambda item, limit, rng: _ours(item, limit, None),
    }


def _whole(item: Item, limit: int, rng: random.Random) -> str:
    return item["context"]


def _nothing(item: Item, limit: int, rng: random.Random) -> str:
    return ""


def measure(items: Sequence[Item], name: str, method: Method, ratio: float) -> Cell:
    """One method at one ratio over all items."""
    limits = [max(1, round(ratio * _count(item["context"]))) for item in items]
    runs: list[list[float]] = []
    lengths: list[int] = []
    over = 0
    began, reading = time.perf_counter(), 0.0
    for draw in range(DRAWS if name.startswith("random") else 1):
        rng = random.Random(draw)
        texts = [method(item, limit, rng) for item, limit in zip(items, limits, strict=True)]
        lengths += [_count(text) for text in texts]
        over += sum(_count(text) > limit for text, limit in zip(texts, limits, strict=True))
        read = time.perf_counter()
        runs.append(accuracy(items, texts))
        reading += time.perf_counter() - read
    return Cell(
        task=TASK,
        seed=0,
        method=name,
        ratio=ratio,
        scores=[statistics.fmean(found) for found in zip(*runs, strict=True)],
        length=statistics.fmean(lengths),
        original=statistics.fmean(_count(item["context"]) for item in items),
        over=over,
        reader_calls=len(items) * len(runs),
        seconds=(time.perf_counter() - began - reading) / len(runs),
        groups=[item["id"].rsplit("_", 1)[0] for item in items],
    )


def solver(data: Path, cells: Cells, *, quick: bool) -> None:
    """Measure what is not there yet."""
    folder = data / "proofwriter"
    if not folder.exists():
        print(f"capsule_utility: no proofwriter/ in {data.name}/; give --data DIR")
        return
    items: list[Item] = json.loads((folder / "logiclm_dev_600_owa_d5.json").read_text(encoding="utf-8"))
    train: list[Item] = json.loads((folder / "logiclm_train_first1000_owa_d5.json").read_text(encoding="utf-8"))
    items = items[:120] if quick else items
    plan: list[tuple[str, float, Method]] = [("original", 1.0, _whole), ("none", 0.0, _nothing)]
    plan += [(name, ratio, method) for ratio in RATIOS for name, method in methods(train).items()]
    for name, ratio, method in plan:
        if key_of(TASK, 0, name, ratio) not in cells:
            cell = measure(items, name, method, ratio)
            cells.add(cell)
            print(f"{cell.key}: {statistics.fmean(cell.scores):.3f}, {cell.length:.0f} words", flush=True)
