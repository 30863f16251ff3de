"""A task that a tiny random model learns in a few dozen steps: texts of warm or cold words, and which they are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.weights.tiny import tiny

WARM, COLD = ("warm", "bright", "kind", "sweet"), ("cold", "dark", "mean", "sour")
THINGS = ("film", "book", "song", "play", "meal", "room")
PROMPT = "{text} It was"
LABELS = {"0": "terrible", "1": "great"}
WORDS = (*WARM, *COLD, *THINGS, "the", "was", "and", "very", "It", "terrible", "great", "\n")


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with different texts."""
    draw, found = random.Random(seed), dict[str, int]()
    while len(found) < number:
        label = draw.randrange(2)
        one, two = draw.sample(WARM if label else COLD, 2)
        first, second = draw.sample(THINGS, 2)
        found[f"the {first} was {one} and the {second} very {two}"] = label
    return [{"text": text, "label": label} for text, label in found.items()]


def write_rows(path: Path, number: int, seed: int = 0) -> Path:
    """The same as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(number, seed)), encoding="utf-8")
    return path


def moods(folder: Path, number: int = 160) -> Path:
    """A folder with `model/` and `rows.jsonl`."""
    model, tokenizer = tiny(WORDS)
    (folder / "model").mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", number)
    return folder
