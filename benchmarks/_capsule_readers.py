"""The embedded model as a reader of few-shot prompts, and the prompts: SST-2, TREC and one BIG-Bench Hard task.

The reader goes on from "<prompt>\\n\\n<row>\\n<cue>" (as the beginning of its reply) and every label is scored. With so
small a model a prompt mostly shifts the prior of the labels ("positive" for 39 of 40 reviews), so the label is the one
with the largest score after dividing by the mean over the test rows of the cell (batch calibration, arXiv 2309.17249:
no labels are used). It is the same for every method; accuracy without it is kept beside.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_public import MODEL, SST2, TREC
from tune_public import read as read_classification

import agentopt as ao

DEMONSTRATIONS = 16
BBH = "boolean_expressions"
"""Of the tasks tried with their own chain-of-thought prompt (40 to 120 rows each: boolean_expressions,
causal_judgement, navigate, snarks, sports_understanding) the model is at chance on all, .43 to .60; this one has
balanced answers and the shortest rows. It cannot show that a method keeps what helps, only that none misleads."""
TASKS = ("TREC", "SST-2", f"BBH {BBH}")


@dataclass(frozen=True)
class Prompt:
    """A few-shot prompt with the rows it is read with."""

    task: str
    seed: int
    instruction: str
    demonstrations: tuple[str, ...]
    cue: str
    labels: tuple[str, ...]
    rows: tuple[tuple[str, str], ...]
    """(text, label) of the test rows."""
    train: tuple[tuple[str, str], ...] = ()
    """Rows that a trained compressor may look at; none where training on the data is not wanted."""

    @property
    def text(self) -> str:
        """The whole prompt, without a row."""
        return "\n\n".join([self.instruction, *self.demonstrations])


def _classification(data: Path, name: str, seed: int, count: int) -> Prompt:
    """Demonstrations and training rows from the training file, test rows from the test file."""
    key, word, cue = ("review", "Review", "Sentiment:") if name == "sst2" else ("question", "Question", "Type:")
    labels = tuple(SST2 if name == "sst2" else TREC.values())
    pool, held_out = read_classification(name, data / "classification")
    pool = list({row[key]: row for row in pool}.values())
    known = {row[key] for row in pool}
    held_out = [row for row in {row[key]: row for row in held_out}.values() if row[key] not in known]
    rng = random.Random(seed)
    rng.shuffle(pool)
    rng.shuffle(held_out)
    if name == "sst2":
        instruction = "Decide whether the movie review is positive or negative."
    else:
        instruction = f"Say what type of thing the question asks for: {', '.join(labels[:-1])} or {labels[-1]}."

    def pairs(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
        return tuple((f"{word}: {row[key]}", row["expected"]) for row in rows)

    shown = tuple(f"{text}\n{cue} {label}" for text, label in pairs(pool[:DEMONSTRATIONS]))
    after = pool[DEMONSTRATIONS : DEMONSTRATIONS + 200]
    task = "SST-2" if name == "sst2" else "TREC"
    return Prompt(task, seed, instruction, shown, cue, labels, pairs(held_out[:count]), pairs(after))


def _bbh(data: Path, seed: int, count: int) -> Prompt:
    """The task's chain-of-thought prompt as it is; the seed draws the rows. Nothing is trained on these rows."""
    text = (data / "bbh" / "cot-prompts" / f"{BBH}.txt").read_text(encoding="utf-8").split("-----\n", 1)[1]
    instruction, *demonstrations = text.strip().split("\n\n")
    examples = json.loads((data / "bbh" / "bbh" / f"{BBH}.json").read_text(encoding="utf-8"))["examples"]
    random.Random(seed).shuffle(examples)
    labels = tuple(sorted({item["target"] for item in examples}))
    rows = tuple((f"Q: {item['input']}", item["target"]) for item in examples[:count])
    return Prompt(f"BBH {BBH}", seed, instruction, tuple(demonstrations), "A: So the answer is", labels, rows)


def prompt_of(task: str, data: Path, seed: int, count: int) -> Prompt:
    """The prompt of one task and seed, with `count` test rows."""
    if task.startswith("BBH"):
        return _bbh(data, seed, count)
    return _classification(data, "sst2" if task == "SST-2" else "trec", seed, count)


@dataclass(frozen=True)
class Reading:
    """What the reader made of one prompt."""

    scores: list[float]
    raw: float
    """Accuracy without calibration."""
    calls: int


class Reader:
    """Reads prompts; what was read before, in this run or an earlier one, is not read again."""

    def __init__(self, path: Path) -> None:
        ao.configure(models={"agent": MODEL})
        self._lm = ao.lm("agent")
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                self._known[found["key"]] = found

    def read(self, text: str, prompt: Prompt) -> Reading:
        """Answer all rows of `prompt` with `text` in its place."""
        described = json.dumps([text, prompt.cue, prompt.labels, prompt.rows])
        key = hashlib.sha256(described.encode()).hexdigest()
        if (found := self._known.get(key)) is not None:
            return Reading(found["scores"], found["raw"], 0)
        probabilities = [self.label_scores(text, row, prompt) for row, _ in prompt.rows]
        prior = {
            label: math.log(statistics.fmean(math.exp(each[label]) for each in probabilities))
            for label in prompt.labels
        }
        scores: list[float] = []
        raw = 0
        for each, (_, label) in zip(probabilities, prompt.rows, strict=True):
            scores.append(float(max(prompt.labels, key=lambda one: each[one] - prior[one]) == label))
            raw += max(prompt.labels, key=lambda one: each[one]) == label
        reading = Reading(scores, raw / len(scores), len(scores))
        self._known[key] = {"key": key, "scores": scores, "raw": reading.raw}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._known[key]) + "\n")
        return reading

    def label_scores(self, text: str, row: str, prompt: Prompt) -> Mapping[str, float]:
        """Log-probability of every label for one row."""
        begun = "\n\n".join([text] * bool(text) + [f"{row}\n{prompt.cue}"])
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": begun}]
        reply = self._lm.complete_sync(messages, choices=list(prompt.labels))
        return {label: max(score, -50.0) for label, score in (reply.logprobs or {}).items()}
