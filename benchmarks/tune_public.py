"""Claim: `agentopt tune` with the embedded model lifts two public classification tasks, honestly, on a laptop CPU.

SST-2 and TREC, 100 train / 100 validation / 300 test rows drawn per seed, starting from one plain line. The search may
use 1,200 rollouts; the final test (baseline and winner on the 300 rows) comes on top and is what is reported. `gepa`
0.1.4 runs beside it: same model for task and reflection, same rows, same scorer, same 1,200 metric calls. Beside them
stand the baselines that need no search: majority class, the starting line with its label bias calibrated away (arXiv
2102.09690: the prior is read on content-free inputs), and the best of several hand-written instructions (chosen on the
same validation rows).

    python benchmarks/tune_public.py [--quick] [--seeds 5] [--data DIR] [--skip-gepa] [--only TASK]

The data is not part of this project: `--data` names a folder with sst2/stsa.binary.{train,test} and
trec/{train,test}.txt (the few-shot-learning collection). Without it the script says so and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _report import PEERS, ROOT, Row, peer_python, write_results

import agentopt as ao
from agentopt import models
from agentopt.store import Store

SEARCH_ROLLOUTS = 1200
"""The most a search may use; --search lowers it."""
SST2 = ["negative", "positive"]
TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
SCREEN_SIZE = 32
"""Twice the default: with 0/1 scores near .7 a difference on 16 rows is mostly noise."""
MODEL = "embedded/smollm2-135m-instruct"
CONTENT_FREE = ("N/A", "[MASK]", "")

sst2_instruction = ao.prompt("Is the movie review positive or negative?", name="sst2.instruction")
sst2_cue = ao.prompt("", name="sst2.cue")
sst2_calibrate = ao.choice(["none", "content_free"], name="sst2.calibrate")
sst2_examples = ao.demos(name="sst2.examples", max_items=8)
trec_instruction = ao.prompt("What type of thing does the question ask for?", name="trec.instruction")
trec_cue = ao.prompt("", name="trec.cue")
trec_calibrate = ao.choice(["none", "content_free"], name="trec.calibrate")
trec_examples = ao.demos(name="trec.examples", max_items=8)


def with_cue(text: str, cue: str) -> list[dict[str, str]]:
    """The user's turn and, when there is a cue, an open assistant turn that the label continues."""
    turns = [{"role": "user", "content": text}]
    return [*turns, {"role": "assistant", "content": cue}] if cue else turns


def reading(calibrate: object) -> ao.LMOptions:
    """How label probabilities are read: as they are, or divided by their prior on content-free inputs."""
    return ao.LMOptions(extra={"calibrate": calibrate} if calibrate != "none" else {})


@ao.agent
async def sst2(review: str) -> str:
    turns, options = with_cue(review, str(sst2_cue)), reading(sst2_calibrate.value)
    model = ao.lm("agent")
    reply = await model.complete(turns, system=sst2_instruction, demos=sst2_examples, choices=SST2, options=options)
    return reply.text


@ao.agent
async def trec(question: str) -> str:
    labels = list(TREC.values())
    turns, options = with_cue(question, str(trec_cue)), reading(trec_calibrate.value)
    model = ao.lm("agent")
    reply = await model.complete(turns, system=trec_instruction, demos=trec_examples, choices=labels, options=options)
    return reply.text


@dataclass(frozen=True)
class Task:
    """One data set and what a person would write by hand for it."""

    name: str
    program: Any
    field: str
    labels: list[str]
    start: str
    by_hand: tuple[str, ...]
    goal: float | None = None


TASKS = (
    Task(
        "sst2",
        sst2,
        "review",
        SST2,
        "Is the movie review positive or negative?",
        (
            "Classify the sentiment of the movie review as positive or negative. Answer with one word.",
            "You are a sentiment classifier. Reply with exactly one word, positive or negative.",
            "Decide whether the critic liked the movie. Answer positive if they did and negative if they did not.",
            "Sentiment analysis. Read the review and output only its label: negative or positive.",
        ),
        goal=0.73,
    ),
    Task(
        "trec",
        trec,
        "question",
        list(TREC.values()),
        "What type of thing does the question ask for?",
        (
            "Classify the question by the type of its answer: abbreviation, description, entity, person, location or "
            "number. Answer with one word.",
            "What kind of answer does this question want? Choose one: abbreviation, description, entity, person, "
            "location, number.",
            "Label the question. Who = person, where = location, how many or when = number, what does it stand for = "
            "abbreviation, how or why = description, which thing = entity. Reply with the label only.",
        ),
    ),
)


@dataclass
class Rows:
    """The three parts of one seed."""

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    test: list[dict[str, Any]]


@dataclass
class Outcome:
    """Test accuracies and costs of one seed."""

    seed: int
    majority: float = 0.0
    start: float = 0.0
    calibrated: float = 0.0
    by_hand: float | None = None
    tuned: float = 0.0
    gepa: float | None = None
    status: str = ""
    p_value: float | None = None
    interval: Sequence[float] | None = None
    search_rollouts: int = 0
    seconds: float = 0.0
    gepa_calls: int = 0
    gepa_seconds: float = 0.0
    tuned_values: dict[str, Any] = field(default_factory=dict)


def read(task: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All training and all test rows of one data set, as {field, expected}."""
    if task == "sst2":
        parts = [folder / "sst2" / f"stsa.binary.{part}" for part in ("train", "test")]
        lines = [path.read_text(encoding="utf-8").splitlines() for path in parts]
        return tuple([{"review": line[2:], "expected": SST2[int(line[0])]} for line in part if line] for part in lines)  # type: ignore[return-value]
    parts = [folder / "trec" / f"{part}.txt" for part in ("train", "test")]
    lines = [path.read_text(encoding="utf-8").splitlines() for path in parts]
    return tuple(  # type: ignore[return-value]
        [{"question": line.split(" ", 1)[1], "expected": TREC[line.split(":", 1)[0]]} for line in part if line]
        for part in lines
    )


def draw(task: str, folder: Path, seed: int, sizes: tuple[int, int, int]) -> Rows:
    """Rows of one seed: train and validation from the training file, test from the test file; duplicates removed."""
    pool, held_out = read(task, folder)
    name = next(key for key in pool[0] if key != "expected")
    rng = random.Random(seed)
    unique = list({row[name]: row for row in pool}.values())
    known = {row[name] for row in unique}
    held_out = [row for row in {row[name]: row for row in held_out}.values() if row[name] not in known]
    rng.shuffle(unique)
    rng.shuffle(held_out)
    train, val, test = sizes
    return Rows(unique[:train], unique[train : train + val], held_out[:test])


async def answer(task: Task, instruction: str, rows: list[dict[str, Any]]) -> list[Any]:
    """Replies of the embedded model to every row, in order."""
    model = ao.lm("agent")
    return [await model.complete(system=instruction, user=row[task.field], choices=task.labels) for row in rows]


async def accuracy(task: Task, instruction: str, rows: list[dict[str, Any]]) -> float:
    """Share of rows answered with the right label."""
    replies = await answer(task, instruction, rows)
    return statistics.fmean(reply.text == row["expected"] for reply, row in zip(replies, rows, strict=True))


async def calibrated(task: Task, instruction: str, rows: list[dict[str, Any]]) -> float:
    """Accuracy after dividing by the label prior that content-free inputs show."""
    free = await answer(task, instruction, [{task.field: text} for text in CONTENT_FREE])
    prior = {label: statistics.fmean(reply.logprobs[label] for reply in free) for label in task.labels}
    replies = await answer(task, instruction, rows)
    right = 0
    for reply, row in zip(replies, rows, strict=True):
        best = max(task.labels, key=lambda label: reply.logprobs[label] - prior[label])
        right += best == row["expected"]
    return right / len(rows)


async def best_by_hand(task: Task, rows: Rows) -> float:
    """Test accuracy of the hand-written instruction that is best on validation."""
    scored = [(await accuracy(task, text, rows.val), text) for text in task.by_hand]
    return await accuracy(task, max(scored)[1], rows.test)


class GepaAdapter:
    """The task in gepa's words: one text component, the same model, the same scorer, feedback with the right label."""

    def __init__(self, task: Task, batch_type: Any) -> None:
        self.task = task
        self.batch_type = batch_type
        self.calls = 0

    def evaluate(self, batch: list[dict[str, Any]], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        self.calls += len(batch)
        replies = asyncio.run(answer(self.task, candidate["instruction"], batch))
        outputs = [reply.text for reply in replies]
        scores = [float(text == row["expected"]) for text, row in zip(outputs, batch, strict=True)]
        traces = list(zip(batch, outputs, scores, strict=True)) if capture_traces else None
        return self.batch_type(outputs=outputs, scores=scores, trajectories=traces)

    def make_reflective_dataset(self, candidate: dict[str, str], evaluated: Any, components: list[str]) -> Any:
        records = [
            {
                "Inputs": row[self.task.field],
                "Generated Outputs": output,
                "Feedback": "Correct." if score else f"Wrong. The right answer is {row['expected']}.",
            }
            for row, output, score in evaluated.trajectories
        ]
        return dict.fromkeys(components, records)


def run_gepa(task: Task, rows: Rows, seed: int) -> tuple[float, int, float]:
    """Test accuracy, metric calls and seconds of gepa on the same rows."""
    from gepa import optimize  # pyright: ignore[reportMissingImports]
    from gepa.core.adapter import EvaluationBatch  # pyright: ignore[reportMissingImports]

    adapter = GepaAdapter(task, EvaluationBatch)

    def reflect(prompt: Any) -> str:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        options = ao.LMOptions(temperature=1.0, max_tokens=256, seed=seed, sample=adapter.calls)
        return ao.lm("optimizer").complete_sync(user=text, options=options).text

    class Quiet:
        def log(self, message: str) -> None:
            pass

    began = time.monotonic()
    result = optimize(
        seed_candidate={"instruction": task.start},
        trainset=rows.train,
        valset=rows.val,
        adapter=adapter,
        reflection_lm=reflect,
        max_metric_calls=SEARCH_ROLLOUTS,
        seed=seed,
        logger=Quiet(),
        raise_on_exception=False,
    )
    took = time.monotonic() - began
    best = result.best_candidate["instruction"]
    return asyncio.run(accuracy(task, best, rows.test)), adapter.calls, took


def tune(task: Task, rows: Rows, seed: int, store: Path, search: int) -> Any:
    """One run through the public API."""
    return ao.tune(
        task.program,
        train=rows.train,
        val=rows.val,
        test=rows.test,
        metric="exact_match",
        budget=ao.Budget(rollouts=search + 2 * len(rows.test)),
        seed=seed,
        options=ao.TuneOptions(capture=False, screen_size=SCREEN_SIZE),
        store=str(store),
    )


def one_seed(task: Task, folder: Path, seed: int, options: argparse.Namespace, store: Path, gepa: bool) -> Outcome:
    """Everything that is measured for one task and seed."""
    sizes = (40, 40, 60) if options.quick else (100, 100, 300)
    rows = draw(task.name, folder, seed, sizes)
    out = Outcome(seed)
    common = Counter(row["expected"] for row in rows.train).most_common(1)[0][0]
    out.majority = statistics.fmean(row["expected"] == common for row in rows.test)
    search = min(400, options.search) if options.quick else options.search
    began = time.monotonic()
    result = tune(task, rows, seed, store, search)
    out.seconds = time.monotonic() - began
    claim = result.claim
    out.start, out.tuned, out.status = claim.baseline_mean, claim.tuned_mean, claim.status
    out.p_value, out.interval = claim.p_value, claim.interval
    tested = len(rows.test) * (1 if claim.status == "kept_baseline" else 2)
    out.search_rollouts = int(result.cost["rollouts"]) - tested
    # Demonstrations are rows of data sets that are not ours to pass on: their number is enough.
    out.tuned_values = {
        name: f"{len(value)} demonstrations" if isinstance(value, list) else value
        for name, value in result.best.values.items()
    }
    with Store.open(store) as cache:  # the starting line's test replies are known already
        ao.configure(models={"agent": MODEL}, cache=cache)
        out.calibrated = asyncio.run(calibrated(task, task.start, rows.test))
        if options.peer_seeds is None or seed < options.peer_seeds:
            out.by_hand = asyncio.run(best_by_hand(task, rows))
    models.reset()
    ao.configure(models={"agent": MODEL})
    if gepa and (options.peer_seeds is None or seed < options.peer_seeds):
        out.gepa, out.gepa_calls, out.gepa_seconds = run_gepa(task, rows, seed)
    text = f"{task.name} seed {seed}: start {out.start:.3f} tuned {out.tuned:.3f} ({out.status}) "
    text += f"calibrated {out.calibrated:.3f} by hand {out.by_hand} gepa {out.gepa}"
    print(f"{text} {out.search_rollouts} rollouts {out.seconds:.0f} s", flush=True)
    return out


def summarize(task: Task, found: list[Outcome], *, timed: bool) -> list[Row]:
    """Rows of the result file for one task; wall times only when no reply came from an earlier run's store."""

    def mean(name: str) -> tuple[float, tuple[float, float]]:
        values = [value for outcome in found if (value := getattr(outcome, name)) is not None]
        return statistics.fmean(values), (min(values), max(values))

    rows: list[Row] = []
    with_gepa = [outcome for outcome in found if outcome.gepa is not None]
    has_gepa = bool(with_gepa)
    gepa = statistics.fmean(outcome.gepa or 0 for outcome in with_gepa) if has_gepa else None
    labels = {
        "majority": "majority class",
        "start": "starting line",
        "calibrated": "starting line, label bias calibrated",
        "by_hand": "best hand-written instruction",
        "tuned": "agentopt tune",
    }
    for name, label in labels.items():
        if all(getattr(outcome, name) is None for outcome in found):
            continue
        value, interval = mean(name)
        peer = ("gepa 0.1.4", gepa) if name == "tuned" and has_gepa else (None, None)
        rows.append(Row(f"{task.name}: {label}", value, "test accuracy, mean of seeds", interval, None, *peer))
    if has_gepa and gepa is not None:
        scores = [outcome.gepa or 0.0 for outcome in with_gepa]
        rows.append(
            Row(
                f"{task.name}: gepa 0.1.4",
                gepa,
                f"test accuracy, mean of {len(scores)} seeds",
                (min(scores), max(scores)),
            )
        )
    improved = sum(outcome.status == "improved" for outcome in found)
    rows.append(Row(f"{task.name}: seeds with claim improved", improved, f"of {len(found)}"))
    if task.goal is not None:
        reached = sum(outcome.tuned >= task.goal for outcome in found)
        goal = f">= {round(0.8 * len(found))}"
        rows.append(Row(f"{task.name}: seeds at {task.goal} or better", reached, f"of {len(found)}", goal=goal))
    value, interval = mean("search_rollouts")
    peer = ("gepa 0.1.4", statistics.fmean(outcome.gepa_calls for outcome in with_gepa)) if has_gepa else (None, None)
    rows.append(
        Row(f"{task.name}: rollouts of the search", value, "rollouts", interval, f"<= {SEARCH_ROLLOUTS}", *peer)
    )
    if not timed:
        return rows
    value, interval = mean("seconds")
    peer = ("gepa 0.1.4", statistics.fmean(outcome.gepa_seconds for outcome in with_gepa)) if has_gepa else (None, None)
    rows.append(Row(f"{task.name}: wall time of one run, test included", value, "s", interval, None, *peer))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small rows and budget, two seeds, no gepa")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "classification")
    parser.add_argument("--search", type=int, default=SEARCH_ROLLOUTS, help="rollouts a search may use")
    parser.add_argument("--peer-seeds", type=int, default=None, help="seeds with gepa and hand-written; default all")
    parser.add_argument("--skip-gepa", action="store_true")
    parser.add_argument("--work", type=Path, help="keep the stores here; a second run replays the replies it finds")
    parser.add_argument("--only", choices=[task.name for task in TASKS])
    options = parser.parse_args()
    if not (options.data / "sst2").exists():
        print(f"tune_public: no data in {options.data.name}/; give --data DIR (see the top of this file); nothing ran")
        return 0
    gepa = not (options.skip_gepa or options.quick)
    if gepa:
        _, problem = peer_python("gepa==0.1.4", extra_args=("--no-deps",))
        gepa = not problem
        print(f"gepa could not be installed: {problem}" if problem else "gepa 0.1.4 runs beside", flush=True)
        sys.path.extend(glob.glob(str(ROOT / PEERS / "lib" / "python3*" / "site-packages")))
    seeds = 2 if options.quick else options.seeds
    ao.configure(models={"agent": MODEL})
    rows: list[Row] = []
    timed = options.work is None
    detail: dict[str, Any] = {}
    for task in TASKS:
        if options.only in (None, task.name):
            with tempfile.TemporaryDirectory() as folder:
                work = options.work or Path(folder)
                found: list[Outcome] = []
                for seed in range(seeds):
                    found.append(one_seed(task, options.data, seed, options, work / f"{task.name}-{seed}.db", gepa))
                    detail[task.name] = [vars(outcome) for outcome in found]
                    write_results(
                        "tune_public", [*rows, *summarize(task, found, timed=timed)], quick=options.quick, extra=detail
                    )
            rows += summarize(task, found, timed=timed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
