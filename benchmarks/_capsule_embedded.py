"""The embedded part of `capsule_utility.py`: few-shot prompts compressed once, without a question, then read.

Budgets are shares of the prompt's tokens under the reader's own tokenizer. Methods that are not ours are told which
part is the instruction and keep it whole; ours get the prompt as one text. The compressor's language model is the
reader's: self-information and LLMLingua read its log-probabilities (float32, transformers), rewriting asks it to write.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from _capsule_baselines import most_informative, phrases, random_units, random_words, truncate
from _capsule_cells import Cell, Cells, key_of
from _capsule_readers import TASKS, Prompt, Reader, prompt_of
from _report import peer_python

import agentopt as ao
from agentopt.capsules.training._bernoulli import UnitPolicy, leave_one_out_changes
from agentopt.capsules.units._units import parse

RATIOS = (0.5, 0.25, 0.12)
BBH_RATIOS = (0.25,)
"""The reader is at chance there, so one ratio says what there is to say."""
TRAIN_ROWS = 12
"""Training rows on which a unit is judged by leaving it out."""
PEERS = ("llmlingua==0.2.2", "torch==2.13.0", "transformers==5.23.0")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Made:
    """A shorter prompt; `text` is None when the method gave none."""

    text: str | None
    seconds: float
    reader_calls: int = 0
    note: str = ""


Method = Callable[[Prompt, int, Reader], Made]


@cache
def _model() -> tuple[Any, Any]:
    """The embedded weights in torch."""
    import torch

    from agentopt.weights import load

    torch.set_num_threads(1)
    return load.model("embedded")


@cache
def _tokens(text: str) -> int:
    """Tokens under the reader's tokenizer."""
    return ao.TokenBudget(1, tokenizer="embedded").meter().total([text])


def _timed(make: Callable[[], str]) -> Made:
    began = time.perf_counter()
    text = make()
    return Made(text, time.perf_counter() - began)


def _truncation(prompt: Prompt, limit: int, reader: Reader) -> Made:
    return _timed(lambda: truncate(prompt.text, limit, _tokens))


def _random_units(prompt: Prompt, limit: int, reader: Reader) -> Made:
    rng = random.Random(prompt.seed)
    shown = prompt.demonstrations
    return _timed(lambda: random_units(shown, limit, _tokens, rng, glue="\n\n", head=prompt.instruction))


def _random_words(prompt: Prompt, limit: int, reader: Reader) -> Made:
    rng = random.Random(prompt.seed)
    shown = "\n\n" + "\n\n".join(prompt.demonstrations)
    return _timed(lambda: random_words(shown, limit, _tokens, rng, head=prompt.instruction))


@cache
def _information(text: str) -> list[tuple[int, int, float]]:
    """(start, end, -log p) of every token of the text but the first."""
    import torch

    model, tokenizer = _model()
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    with torch.no_grad():
        logits = model(encoded.input_ids).logits[0, :-1].log_softmax(-1)
    surprise = -logits.gather(1, encoded.input_ids[0, 1:, None])[:, 0]
    return [(int(a), int(b), float(bits)) for (a, b), bits in zip(encoded.offset_mapping[0][1:], surprise, strict=True)]


def _self_information(prompt: Prompt, limit: int, reader: Reader) -> Made:
    """Phrases with the largest mean self-information of their tokens stay, in their own order."""

    def make() -> str:
        text = prompt.text
        at = len(prompt.instruction)
        pieces = phrases(text[at:])
        found: list[list[float]] = [[] for _ in pieces]
        ends: list[int] = []
        for piece in pieces:
            at += len(piece)
            ends.append(at)
        place = 0
        for _, end, bits in _information(text):
            if end <= len(prompt.instruction):
                continue
            while place < len(ends) - 1 and end > ends[place]:
                place += 1
            found[place].append(bits)
        means = [statistics.fmean(bits) if bits else 0.0 for bits in found]
        return most_informative(pieces, means, limit, _tokens, head=prompt.instruction)

    return _timed(make)


def _ours(prompt: Prompt, limit: int, **arguments: Any) -> Made:
    """What a user gets; below what must stay, the budget is raised to it, and the cell counts as over."""
    began = time.perf_counter()
    note = ""
    try:
        found = ao.capsule(prompt.text, budget=ao.TokenBudget(limit, tokenizer="embedded"), **arguments)
    except ao.BudgetInfeasible as short:
        note = "budget raised to what must be kept"
        found = ao.capsule(prompt.text, budget=ao.TokenBudget(short.minimum, tokenizer="embedded"), **arguments)
    if found.fallback:
        note = "; ".join([note] * bool(note) + [f"fell back to {found.made}: {found.fallback}"])
    return Made(found.text, time.perf_counter() - began, note=note)


def _extract(prompt: Prompt, limit: int, reader: Reader) -> Made:
    return _ours(prompt, limit, mode="extract")


def _rewrite(prompt: Prompt, limit: int, reader: Reader) -> Made:
    """One style and no repair: a model of this size hardly ever passes the checks, and every try costs a minute."""
    options = ao.CapsuleOptions(styles=("telegraphic",), repairs=0)
    return _ours(prompt, limit, mode="rewrite", lm=ao.lm("agent"), options=options)


@cache
def _policy(prompt: Prompt, reader: Reader) -> tuple[UnitPolicy, float, int]:
    """A unit policy fitted to what each unit of this prompt is worth to the reader on training rows.

    Worth is how far the calibrated log-probability of the right label falls when the unit alone is left out.
    """
    began = time.perf_counter()
    rows = prompt.train[:TRAIN_ROWS]
    calls = 0

    def utility(text: str) -> float:
        nonlocal calls
        calls += len(rows)
        found = [reader.label_scores(text, row, prompt) for row, _ in rows]
        prior = {label: math.log(statistics.fmean(math.exp(each[label]) for each in found)) for label in prompt.labels}
        return statistics.fmean(each[label] - prior[label] for each, (_, label) in zip(found, rows, strict=True))

    document = parse(prompt.text)
    changes = leave_one_out_changes(document, utility)
    meter = ao.TokenBudget(1, tokenizer="embedded").meter()
    return UnitPolicy.imitate([document], [changes], meter), time.perf_counter() - began, calls


def _trained(prompt: Prompt, limit: int, reader: Reader) -> Made:
    if not prompt.train:
        return Made(None, 0.0, note="not trained: the rows carry a mark that asks not to")
    policy, seconds, calls = _policy(prompt, reader)
    found = _ours(prompt, limit, mode="trained", options=ao.CapsuleOptions(trained=policy))
    first = limit == max(1, round(RATIOS[0] * _tokens(prompt.text)))
    return replace(found, seconds=found.seconds + seconds, reader_calls=calls * first)


@cache
def _lingua(prompt: Prompt, limits: tuple[int, ...]) -> dict[int, Made]:
    """LLMLingua on one prompt with several targets, in a process of the peers' environment."""
    python, problem = peer_python(*PEERS)
    shown = {"demonstrations": prompt.demonstrations, "instruction": prompt.instruction}
    jobs = [{**shown, "target": limit} for limit in limits]
    if python is None:
        return {limit: Made(None, 0.0, note=f"not installed: {problem}") for limit in limits}
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder))
        command = [python, str(HERE / "peer_adapters" / "llmlingua_.py"), folder]
        done = subprocess.run(command, input=json.dumps(jobs) + "\n", capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RUN ")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {limit: Made(None, 0.0, note=f"did not start: {last}") for limit in limits}
    return {
        limit: Made(answer["text"] or None, answer["seconds"], note=answer["error"])
        for limit, answer in zip(limits, json.loads(line[4:]), strict=True)
    }


def _save(folder: Path) -> None:
    """The embedded weights as a folder that any version of transformers loads."""
    from transformers import LlamaForCausalLM

    model, tokenizer = _model()
    model.config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


METHODS: dict[str, Method | None] = {
    "ours, extract": _extract,
    "truncation": _truncation,
    "random demonstrations": _random_units,
    "random words": _random_words,
    "self-information (phrases)": _self_information,
    "LLMLingua 0.2.2": None,
    "ours, trained": _trained,
    "ours, rewrite": _rewrite,
}
"""Name → how; LLMLingua's are made in a process of its own."""


def measure(prompt: Prompt, name: str, ratio: float, made: Made, reader: Reader, limit: int) -> Cell:
    """Read a shorter prompt."""
    whole = _tokens(prompt.text)
    if made.text is None:
        return Cell(prompt.task, prompt.seed, name, ratio, [], 0.0, whole, seconds=made.seconds, note=made.note)
    reading = reader.read(made.text, prompt)
    length = _tokens(made.text)
    return Cell(
        task=prompt.task,
        seed=prompt.seed,
        method=name,
        ratio=ratio,
        scores=reading.scores,
        length=length,
        original=whole,
        over=int(length > limit),
        reader_calls=reading.calls + made.reader_calls,
        seconds=made.seconds,
        note=made.note,
        raw=reading.raw,
    )


def embedded(
    data: Path, work: Path, cells: Cells, *, seeds: int, rows: int, only: Sequence[str], minutes: float
) -> None:
    """Measure what is not there yet, seed by seed, until `minutes` are over."""
    if not (data / "classification" / "sst2").exists():
        print(f"capsule_utility: no classification/ in {data.name}/; give --data DIR")
        return
    began = time.monotonic()
    reader = Reader(work / "reads.jsonl")
    # The BBH prompt is one text, whatever the seed.
    drawn = [(task, seed) for seed in range(seeds) for task in TASKS if seed == 0 or not task.startswith("BBH")]
    prompts = [prompt_of(task, data, seed, rows) for task, seed in drawn]
    limits = {
        (prompt.task, prompt.seed, ratio): max(1, round(ratio * _tokens(prompt.text)))
        for prompt in prompts
        for ratio in RATIOS
    }
    for prompt in prompts:
        plan: list[tuple[str, float]] = [("original", 1.0), ("none", 0.0)]
        ratios = BBH_RATIOS if prompt.task.startswith("BBH") else RATIOS
        plan += [(name, ratio) for name in METHODS if not only or name in only for ratio in ratios]
        for name, ratio in plan:
            key = key_of(prompt.task, prompt.seed, name, ratio)
            if key in cells:
                continue
            if time.monotonic() - began > 60 * minutes:
                print("embedded: out of time; what was done is kept")
                return
            limit = limits.get((prompt.task, prompt.seed, ratio), _tokens(prompt.text))
            if name in ("original", "none"):
                made = Made(prompt.text if name == "original" else prompt.instruction, 0.0)
            elif (method := METHODS[name]) is not None:
                made = method(prompt, limit, reader)
            else:
                jobs = tuple(limits[prompt.task, prompt.seed, share] for share in RATIOS)
                made = _lingua(prompt, jobs)[limit]
            cell = measure(prompt, name, ratio, made, reader, limit)
            cells.add(cell)
            shown = f"{statistics.fmean(cell.scores):.3f}" if cell.scores else "none"
            print(f"{key}: {shown}, {cell.length:.0f} of {limit} tokens {cell.note}", flush=True)
