"""Generated prose: sentences of invented words with Zipf's frequencies, names and numbers, in paragraphs."""

from __future__ import annotations

import random
from collections.abc import Iterator

_FUNCTION_WORDS = "the of and to in a is that was for on with as by it from at which be this"
FUNCTION = _FUNCTION_WORDS.split()


def vocabulary(seed: int = 0, size: int = 20_000) -> list[str]:
    """Pronounceable words."""
    draw = random.Random(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(size)]


def paragraphs(seed: int = 0) -> Iterator[str]:
    """Paragraphs without end, each about something: its content words are drawn from a few."""
    draw = random.Random(seed)
    words = vocabulary()
    weights = [1 / (rank + 5) for rank in range(len(words))]
    while True:
        about = draw.choices(words, weights, k=90)
        yield " ".join(_sentence(draw, about) for _ in range(6))


def _sentence(draw: random.Random, about: list[str]) -> str:
    words = [draw.choice(FUNCTION) if draw.random() < 0.4 else draw.choice(about) for _ in range(draw.randint(8, 22))]
    if draw.random() < 0.3:
        words.insert(len(words) // 2, draw.choice(about).capitalize())
    if draw.random() < 0.2:
        words.append(str(draw.randint(1, 2_000)))
    return " ".join(words).capitalize() + "."


def prose(characters: int, seed: int = 0) -> str:
    """About that many characters."""
    out: list[str] = []
    size = 0
    for paragraph in paragraphs(seed):
        out.append(paragraph)
        size += len(paragraph) + 2
        if size >= characters:
            return "\n\n".join(out)
    return ""
