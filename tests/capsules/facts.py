"""Documents of `key value` facts and a reader that looks them up: what the training tests run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopt.capsules import Document, Unit
from agentopt.capsules.train import Question, Sample


@dataclass(frozen=True)
class LookUp:
    """Facts stand between semicolons; the last one about a key counts."""

    name: str = "look-up"

    def answers(self, text: str, questions: Sequence[str]) -> list[str]:
        pairs = [part.split() for part in text.replace("\n", ";").split(";")]
        known = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        return [known.get(question, "") for question in questions]


def document(text: str) -> Document:
    """One unit per line."""
    units: list[Unit] = []
    start = 0
    for line in text.split("\n"):
        units.append(Unit(start, start + len(line), "item", 0))
        start += len(line) + 1
    return Document(text, tuple(unit for unit in units if unit.end > unit.start))


def sample(text: str, gold: Mapping[str, str], targets: Sequence[str] = ()) -> Sample:
    return Sample(document(text), tuple(Question(key, value) for key, value in gold.items()), tuple(targets))
