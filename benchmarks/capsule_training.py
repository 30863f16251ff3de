"""Training a capsulator: RLOO, GRPO and REINFORCE beside the published Nano-Capsulator loss, at equal reader calls.

    python benchmarks/capsule_training.py [--quick] [--seeds N] [--model tiny|embedded] [--device cpu|cuda]

SYNTHETIC. The task is `_fact_world.py`: documents of tagged facts, a program as reader, and an optimum that is known
exactly. The policy is a transformer of two layers from scratch. It first imitates valid capsules that know nothing of
what is asked, until most of its own are valid; from that one model every method goes on with the same number of reader
calls, per seed with other documents and other draws. What is reported is the expected score of greedy capsules on
documents not seen in training, as a share of the optimum:

* `score`: a capsule over the budget or without its keep span counts 0. This is what a user gets who insists on both.
* `cut`: the capsule is cut at the budget and the keep span is not asked for, the setting of the Nano loss.

Every method gets the learning rate that is best for it (by `cut`, which suits the Nano loss) among RATES on a seed that
is not reported, with half the calls; the Nano loss also runs at its published rate. With `--model embedded` the same
script trains a LoRA adapter on the 135M model; on a CPU that is a smoke test of a few steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _curves import curves
from _fact_world import LIMITS, WORDS_EACH, LookUp, accuracy, best_capsule, make, meter, random_capsule, tiny_model
from _report import RESULTS, Row, write_results

from agentopt.capsules import train
from agentopt.capsules.training._bernoulli import UnitSettings
from agentopt.capsules.training._nano import cut_off
from agentopt.capsules.training._policy import Policy
from agentopt.capsules.training._rewards import distance_from_valid, missing_keep
from agentopt.weights import load

RATES = (3e-4, 1e-3, 3e-3)
BUDGETS = train.Budgets(min(LIMITS) / WORDS_EACH, max(LIMITS) / WORDS_EACH, ("words",))
TUNING_SEED = 1000


GOLD = train.RewardSettings(questions=4)
NEAR = train.Update(kl=0.01)


@dataclass(frozen=True)
class Method:
    """One way to go on from the imitating model."""

    name: str
    algorithm: Any
    rate: float
    reward: train.RewardSettings = GOLD
    group: int = 8
    documents: int = 8
    update: train.Update = NEAR


METHODS = (
    Method("RLOO", "rloo", 1e-3),
    Method("GRPO", "grpo", 1e-3, update=train.Update(kl=0.01, clip=0.2)),
    Method("REINFORCE", "reinforce", 1e-3),
    Method("Nano loss", "nano", 1e-3, group=1, documents=64, update=train.Update(max_norm=0.8)),
)


def variants(methods: Sequence[Method]) -> tuple[Method, ...]:
    """The ablations of the first method, and the last one at its published rate."""
    first, last = methods[0], methods[-1]
    return (
        replace(first, name="RLOO, agreement", reward=replace(GOLD, task=0.0, agree=1.0)),
        replace(first, name="RLOO, no span gate", reward=replace(GOLD, gate="length")),
        replace(last, name="Nano loss, published rate", rate=5e-6),
    )


@dataclass
class World:
    """The sizes of one run, and its documents."""

    seed: int
    sft_steps: int = 250
    chunks: int = 6
    calls: int = 20_000
    tests: int = 180
    points: int = 10
    batch: int = 32
    longest: int = 12
    lora: train.Lora | None = None
    train_set: list[train.Sample] = field(default_factory=list[train.Sample])
    test_set: list[train.Sample] = field(default_factory=list[train.Sample])

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        for _ in range(2000):
            sample = make(rng)
            targets = tuple(random_capsule(sample, limit, rng) for limit in LIMITS)
            self.train_set.append(train.Sample(sample.document, sample.questions, targets))
        self.test_set = [make(rng) for _ in range(self.tests)]

    def limit(self, number: int) -> int:
        return LIMITS[number % len(LIMITS)]


@dataclass(frozen=True)
class Result:
    """Scores on the test documents, as shares of the optimum."""

    score: float
    cut: float
    valid: float
    kept: float


def judge(world: World, texts: Sequence[str]) -> Result:
    """Exact expectations, no sampling of questions."""
    best = score = cut = valid = kept = 0.0
    for number, (sample, text) in enumerate(zip(world.test_set, texts, strict=True)):
        budget = meter(world.limit(number))
        best += accuracy(sample, best_capsule(sample, budget.limit))
        good = distance_from_valid(sample.document, text, budget) == 0
        valid += good
        kept += missing_keep(sample.document, text) == 0
        score += accuracy(sample, text) * good
        cut += accuracy(sample, cut_off(text, budget))
    count = len(texts)
    return Result(score / best, cut / best, valid / count, kept / count)


def measure(world: World, trained: train.Trained) -> Result:
    """Greedy capsules, whatever they are: no second try, no repair."""
    policy = Policy(trained.model, trained.tokenizer)
    texts: list[str] = []
    for start in range(0, len(world.test_set), 60):
        part = range(start, min(start + 60, len(world.test_set)))
        prompts = [policy.prompt_ids(world.test_set[n].document, meter(world.limit(n))) for n in part]
        texts += policy.write(prompts, each=1, longest=world.longest, seed=0, greedy=True).texts
    return judge(world, texts)


def imitate(world: World, model: tuple[Any, Any], rate: float) -> train.Trained:
    """Imitation in parts, until 85 % of greedy capsules are valid; the rate falls to a third after the first two."""
    start: Any = model
    for number in range(world.chunks):
        settings = train.Settings(
            stages=(train.Stage("sft", world.sft_steps, rate if number < 2 else rate / 3),),
            budgets=BUDGETS,
            sampling=train.Sampling(documents=world.batch, microbatch=world.batch, longest=world.longest),
            lora=world.lora,
            seed=world.seed + number,
        )
        start = train.train(world.train_set, model=start, settings=settings)
        result = measure(world, start)
        print(f"imitating, {(number + 1) * world.sft_steps} steps: {result}", flush=True)
        if result.valid >= 0.85:
            break
    return start


def go_on(world: World, start: train.Trained, method: Method) -> tuple[list[list[float]], Result]:
    """Train from a copy of the model; gives (reader calls, score) at even distances and the end result.

    A capsule that is not valid is not read, so a run may take more steps for its calls; it gets half more than a run
    that reads everything, and ends then with calls unspent.
    """
    steps = math.ceil(1.5 * world.calls / (method.documents * method.group * method.reward.questions))
    settings = train.Settings(
        algorithm=method.algorithm,
        stages=(train.Stage("quality", steps, method.rate, reader_calls=world.calls),),
        budgets=BUDGETS,
        sampling=train.Sampling(method.documents, method.group, world.longest, microbatch=64 if not world.lora else 16),
        update=method.update,
        seed=world.seed,
    )
    line: list[list[float]] = []

    def progress(step: train.Step, trained: train.Trained) -> None:
        if step.reader_calls >= world.calls * (len(line) + 1) / world.points:
            line.append([step.reader_calls, measure(world, trained).score])

    reward = train.Reward([LookUp()], method.reward)
    copied = replace(start, model=copy.deepcopy(start.model))
    done = train.train(world.train_set, model=copied, reward=reward, settings=settings, progress=progress)
    return line, measure(world, done)


def units(world: World) -> tuple[list[list[float]], Result]:
    """The policy over units, on the same documents and budgets; a fact is one unit and one word."""
    line: list[list[float]] = []

    def result(policy: train.UnitPolicy) -> Result:
        best = score = kept = 0.0
        for number, sample in enumerate(world.test_set):
            text = policy.compress(sample.document, meter(world.limit(number)))
            best += accuracy(sample, best_capsule(sample, world.limit(number)))
            score += accuracy(sample, text)
            kept += missing_keep(sample.document, text) == 0
        return Result(score / best, score / best, 1.0, kept / len(world.test_set))

    def progress(step: Any, policy: train.UnitPolicy) -> None:
        if step.reader_calls >= world.calls * (len(line) + 1) / world.points:
            line.append([step.reader_calls, result(policy).score])

    settings = UnitSettings(
        steps=world.calls // (8 * 8 * 4),
        budgets=BUDGETS,
        buckets=32,
        seed=world.seed,
    )
    reward = train.Reward([LookUp()], GOLD)
    policy = train.UnitPolicy.reinforce(world.train_set, reward, settings, progress=progress)
    return line, result(policy)


def spread(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    return statistics.fmean(values), (min(values), max(values))


def tuned(world: World, start: train.Trained) -> tuple[Method, ...]:
    """The methods, each at the rate that is best for it on a seed that is not reported."""
    world = replace(world, seed=TUNING_SEED, calls=world.calls // 2, points=1, train_set=[], test_set=[])
    result: list[Method] = []
    for method in METHODS:
        scores = {rate: go_on(world, start, replace(method, rate=rate))[1].cut for rate in RATES}
        print(method.name, scores, flush=True)
        result.append(replace(method, rate=max(scores, key=lambda rate: scores[rate])))
    return tuple(result)


def embedded(world: World, device: str, smoke: bool) -> list[Row]:
    """LoRA on the embedded model: the whole comparison on a GPU, a few steps on a CPU."""
    world.lora, world.longest, world.batch = train.Lora(), 48, 2 if smoke else 16
    world.sft_steps, world.chunks = (2, 1) if smoke else (150, 2)
    world.calls, world.points = (20, 1) if smoke else (20_000, 5)
    world.test_set = world.test_set[:2] if smoke else world.test_set[:120]
    begun = time.perf_counter()
    start = imitate(world, load.model("embedded", device=device), 2e-4)
    rows = [Row("embedded, imitating: score", measure(world, start).score, "share of the optimum")]
    for method in METHODS[:1] if smoke else METHODS:
        small = replace(method, documents=2, group=2) if smoke else method
        _, result = go_on(world, start, replace(small, rate=5e-5))
        rows.append(Row(f"embedded, {method.name}: score", result.score, "share of the optimum"))
    note = f"{device}, {time.perf_counter() - begun:.0f} s"
    note += "; a smoke test of a few steps: the scores mean nothing" if smoke else ""
    return [replace(row, note=note) for row in rows]


def rows_of(finals: dict[str, list[Result]], calls: int) -> list[Row]:
    """A table row for every method and number."""
    nanos = [finals["Nano loss"], finals["Nano loss, published rate"]]
    best = max(nanos, key=lambda results: statistics.fmean(result.score for result in results))
    nano = statistics.fmean(result.score for result in best)
    rows: list[Row] = []
    for name, results in finals.items():
        ours = name in ("RLOO", "GRPO", "REINFORCE")
        value, interval = spread([result.score for result in results])
        peer: dict[str, Any] = {"peer": "Nano loss (arXiv 2402.18700), better rate", "peer_value": nano} if ours else {}
        rows.append(Row(f"{name}: score", value, "share of the optimum", interval, **peer))
    for name, results in finals.items():
        rows.append(Row(f"{name}: cut", *_pair([r.cut for r in results]), note=None))
        rows.append(Row(f"{name}: valid capsules", *_pair([r.valid for r in results])))
    for name in ("RLOO", "RLOO, no span gate"):
        rows.append(Row(f"{name}: keep span present", *_pair([r.kept for r in finals[name]])))
    for name in ("RLOO", "GRPO"):
        gains = [a.score - b.score for a, b in zip(finals[name], best, strict=True)]
        value, interval = spread(gains)
        rows.append(
            Row(
                f"{name} minus Nano loss at its better rate, same seed",
                value,
                "share of the optimum",
                interval,
                goal=">= 0.05",
            )
        )
    gains = [a.cut - b.cut for a, b in zip(finals["RLOO"], finals["RLOO, agreement"], strict=True)]
    value, interval = spread(gains)
    rows.append(Row("gold minus agreement (RLOO, cut)", value, "share of the optimum", interval))
    return [replace(row, note=f"{calls:,} reader calls") if row.name == "RLOO: score" else row for row in rows]


def _pair(values: Sequence[float]) -> tuple[float, str, tuple[float, float]]:
    value, interval = spread(values)
    return value, "share", interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, for make bench")
    parser.add_argument("--seeds", type=int, default=3, help="repeats")
    parser.add_argument("--model", choices=("tiny", "embedded"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)

    def world(seed: int) -> World:
        return World(seed, 30, 1, 500, 30, 2) if options.quick else World(seed)

    if options.model == "embedded":
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        rows = embedded(world(0), options.device, smoke=gpu is None)
        name = "capsule_training.gpu" if gpu else "capsule_training_smoke"
        write_results(name, rows, quick=options.quick or gpu is None, gpu=gpu)
        return
    finals: dict[str, list[Result]] = {}
    lines: dict[str, list[list[list[float]]]] = {}

    def note(name: str, seed: int, line: list[list[float]], result: Result) -> None:
        finals.setdefault(name, []).append(result)
        lines.setdefault(name, []).append(line)
        print(f"seed {seed} {name:20} {result}", flush=True)

    fresh = tiny_model(64, 2, TUNING_SEED)
    untrained = train.Trained(copy.deepcopy(fresh[0]), fresh[1])
    start = imitate(world(TUNING_SEED), fresh, 3e-3)
    methods = tuned(world(TUNING_SEED), start)
    for seed in range(options.seeds):
        here = world(seed)
        note("no training", seed, [], measure(here, untrained))
        begin = measure(here, start)
        note("imitating only", seed, [], begin)
        for method in (*methods, *variants(methods)):
            line, result = go_on(here, start, method)
            note(method.name, seed, [[0, begin.score], *line], result)
        note("unit policy", seed, *units(here))
        rng = random.Random(seed)
        valid = [random_capsule(sample, here.limit(n), rng) for n, sample in enumerate(here.test_set)]
        note("random facts", seed, [], judge(here, valid))
        whole = [sample.document.text for sample in here.test_set]
        print(f"the whole document: {judge(here, whole)} (over every budget)", flush=True)
        rates = {method.name: method.rate for method in methods}
        report(finals, lines, rates, world(0).calls, options.quick)


def report(
    finals: dict[str, list[Result]],
    lines: dict[str, list[list[list[float]]]],
    rates: dict[str, float],
    calls: int,
    quick: bool,
) -> None:
    """Written after every seed, so that a run that is stopped leaves what it has."""
    extra = {
        "synthetic": True,
        "seeds": len(finals["RLOO"]),
        "rates": rates,
        "not_measured": "the 135M model on a GPU, none was at hand: "
        "python benchmarks/capsule_training.py --model embedded --device cuda",
        "curves": {name: line for name, line in lines.items() if line[0]},
    }
    if not quick:
        draw(lines, finals, calls)
    write_results("capsule_training", rows_of(finals, calls), quick=quick, extra=extra)


def draw(lines: dict[str, list[list[list[float]]]], finals: dict[str, list[Result]], calls: int) -> None:
    """Mean over seeds with their range, at the same points of reader calls."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, seeds in lines.items():
        if not seeds[0]:
            continue
        points: list[tuple[float, float, float, float]] = []
        for column in zip(*seeds, strict=False):
            ys = [y for _, y in column]
            points.append((statistics.fmean(x for x, _ in column), statistics.fmean(ys), min(ys), max(ys)))
        series[name] = points
    for name in ("imitating only", "random facts"):
        value = statistics.fmean(result.score for result in finals[name])
        series[name] = [(0, value, value, value), (calls, value, value, value)]
    curves(
        RESULTS / "capsule_training.svg",
        "Synthetic facts: score under the budget with the keep span, share of the known optimum",
        "reader calls",
        "score",
        series,
        dashed=("imitating only", "random facts"),
    )


if __name__ == "__main__":
    main()
