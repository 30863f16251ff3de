"""Bits per weight of a small language model trained in three ways: plain, with GG init, with GG init and BackSlash.

    python benchmarks/gg_training.py [--quick] [--seeds 3] [--data ../shared/data] [--only tune|main|extra]

A Llama of 0.7M weights (width 128, 3 blocks, tied head, 512 byte-pair tokens) on GSM8K (on generated prose where that
is not at hand), AdamW, the same batches in the same order and the same number of steps for every way. Results in
results/gg_training.json, one line per training in results/gg_training.jsonl (a run that was cut off goes on there),
curves in results/gg_training.svg.

Rules, written down before the counted runs:

1. Strength. BackSlash's lam is chosen on a seed of its own (100) from a fixed list, as the one with the fewest bits
   whose perplexity at the step of rule 2 is at most 0.5 % above the plain training's. GG init's two numbers (nu 1; xi
   such that a matrix of 128 inputs has the plain width 0.02) were fixed on that seed too.
2. Step. One grid for all ways and seeds: the coarsest power of two at which the plain model of seed 100 loses at most
   0.1 % of its perplexity by rounding. All matrices are rounded to it, embeddings too; norms stay (0.1 % of it).
3. Bits are the entropy of the rounded weights, one code per matrix (an arithmetic coder reaches it; Huffman and
   exp-Golomb are beside it). Perplexity is that of the rounded model, on the same 24,576 validation tokens.
4. Because one fixed step is kind to a model with smaller weights, every way is also given its own best step: the one
   with the fewest bits among those whose rounded perplexity is at most 1 % above the plain model's own of that seed.
   For the plain way this is what uniform quantization and entropy coding alone give.

Goals: 60 % fewer bits at 1 % loss in perplexity, under rule 2 and 3. Losing cases are rows too: BackSlash without GG
init, L1 of the same strength, the published explicit step, and GG init alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _curves import curves
from _gg_lm import LENGTH, STEPS, Text, Way, load_text, run
from _report import RESULTS, ROOT, Row, middle, write_results

TUNING_SEED = 100
TRAINING_STEPS = 600
XI = 0.0512
"""128 inputs times the plain variance 0.02^2."""
STRENGTHS = (0.002, 0.004, 0.008, 0.016, 0.032)
STEP_LOSS, TUNED_LOSS, ALLOWED_LOSS = 1.001, 1.005, 1.01
PLAIN, GG = Way(), Way("gg", xi=XI)
Runs = Mapping[str, Mapping[int, dict[str, Any]]]
"""Way, seed, what came out."""


class Store:
    """The trainings that are done, one line each; without a path they are not kept."""

    def __init__(self, path: Path | None, steps: int, text: Text) -> None:
        self.path, self.steps, self.text = path, steps, text
        self.rows: dict[tuple[Way, int, int, str], dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        """Other processes may have added lines."""
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for row in (json.loads(line) for line in lines if line.strip()):
            way = Way(**{one.name: row[one.name] for one in dataclasses.fields(Way) if one.name in row})
            self.rows[_key(way, row["seed"], row["steps"], row["text"])] = row

    def get(self, way: Way, seed: int) -> dict[str, Any]:
        """Train, unless it was done before."""
        key = _key(way, seed, self.steps, self.text.name)
        self._read()
        if key not in self.rows:
            print(f"{way}, seed {seed}", flush=True)
            settings = {**dataclasses.asdict(way), "seed": seed, "steps": self.steps, "text": self.text.name}
            found = {**settings, **run(way, seed, self.steps, self.text, _tell)}
            self.rows[key] = found
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
        return self.rows[key]


def _key(way: Way, seed: int, steps: int, text: str) -> tuple[Way, int, int, str]:
    return way, seed, steps, text


def _tell(text: str) -> None:
    print(text, flush=True)


def choose_step(plain: Mapping[str, Any]) -> float:
    """Rule 2."""
    return max(
        (one["step"] for one in plain["grids"] if one["perplexity"] <= STEP_LOSS * plain["perplexity"]),
        default=STEPS[-1],
    )


def choose_strength(store: Store, step: float, strengths: Sequence[float]) -> float:
    """Rule 1; the weakest one where none is within the loss."""
    limit = TUNED_LOSS * at(store.get(PLAIN, TUNING_SEED), step)["perplexity"]
    chosen = strengths[0]
    for lam in strengths:
        if at(store.get(dataclasses.replace(GG, lam=lam), TUNING_SEED), step)["perplexity"] > limit:
            break
        chosen = lam
    return chosen


def at(found: Mapping[str, Any], step: float) -> dict[str, float]:
    """The rounded model."""
    return next(one for one in found["grids"] if one["step"] == step)


def best(found: Mapping[str, Any], limit: float) -> dict[str, float] | None:
    """Rule 4: fewest bits within the limit; None where even the finest grid is beyond it."""
    return min((one for one in found["grids"] if one["perplexity"] <= limit), key=_bits, default=None)


def _bits(one: Mapping[str, float]) -> float:
    return one["entropy"]


def table(runs: Runs, step: float) -> list[Row]:
    """One block of rows per way; changes are paired by seed with the plain training."""
    rows: list[Row] = []
    plain = runs["plain"]
    for name, by_seed in runs.items():
        both = [(found, plain[seed]) for seed, found in by_seed.items()]
        saved = [100 * (1 - at(found, step)["entropy"] / at(base, step)["entropy"]) for found, base in both]
        lost = [100 * (at(found, step)["perplexity"] / at(base, step)["perplexity"] - 1) for found, base in both]
        counted = name == "GG init + BackSlash"
        for what, unit in (
            ("perplexity", ""),
            ("entropy", "bits/weight"),
            ("huffman", "bits/weight"),
            ("eg", "bits/weight"),
        ):
            rows.append(
                Row(f"{name}: {what} at step {step:g}", *middle([at(found, step)[what] for found, _ in both]), unit)
            )
        rows.append(
            Row(f"{name}: zeros at that step", *middle([at(found, step)["zeros"] for found, _ in both]), "share")
        )
        rows.append(Row(f"{name}: perplexity, not rounded", *middle([found["perplexity"] for found, _ in both]), ""))
        if name != "plain":
            rows.append(Row(f"{name}: fewer bits than plain", *middle(saved), "%", ">= 60" if counted else None))
            rows.append(Row(f"{name}: loss in perplexity", *middle(lost), "%", "<= 1" if counted else None))
        rows += _own_step(name, both)
    return rows


def _own_step(name: str, both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    """Rule 4."""
    pairs = [
        (best(found, ALLOWED_LOSS * base["perplexity"]), best(base, ALLOWED_LOSS * base["perplexity"]))
        for found, base in both
    ]
    within = [(one, base) for one, base in pairs if one and base]
    note = f"{len(within)} of {len(pairs)} seeds have a step within 1 % of plain" if len(within) < len(pairs) else None
    if not within:
        return [Row(f"{name}: bits at its own best step", None, "bits/weight", note=note)]
    steps = ", ".join(sorted({f"{one['step']:g}" for one, _ in within}))
    row = Row(
        f"{name}: bits at its own best step ({steps})", *middle([one["entropy"] for one, _ in within]), "bits/weight"
    )
    fewer = middle([100 * (1 - one["entropy"] / base["entropy"]) for one, base in within])
    rows = [dataclasses.replace(row, note=note)]
    return (
        rows if name == "plain" else [*rows, Row(f"{name}: fewer bits than plain, each at its best step", *fewer, "%")]
    )


def draw(path: Path, runs: Runs) -> None:
    """Validation loss while training: mean and range of the seeds."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, by_seed in runs.items():
        columns = zip(*(found["curve"] for found in by_seed.values()), strict=True)
        series[name] = []
        for column in columns:
            losses = [loss for _, loss in column]
            if column[0][0] > 50:
                series[name].append((column[0][0], statistics.fmean(losses), min(losses), max(losses)))
    curves(path, "Training loss, nats per token: mean and range of the seeds", "steps", "loss", series)


def main() -> None:
    """Run what is not done and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 steps, for make bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", choices=("tune", "main", "extra"), help="train this part and write no results")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = load_text(options.data)
    print(f"{text.name}: {len(text.train):,} tokens to train on, {len(text.valid):,} to test on")
    steps = 30 if options.quick else TRAINING_STEPS
    if options.quick:
        text = dataclasses.replace(text, valid=text.valid[: 32 * LENGTH])
    store = Store(None if options.quick else RESULTS / "gg_training.jsonl", steps, text)
    step = choose_step(store.get(PLAIN, TUNING_SEED))
    lam = choose_strength(store, step, STRENGTHS[:1] if options.quick else STRENGTHS)
    print(f"step {step:g}, lam {lam:g}")
    if options.only == "tune":
        return
    full = dataclasses.replace(GG, lam=lam)
    ways = {"plain": PLAIN, "GG init": GG, "GG init + BackSlash": full}
    extra = {
        "BackSlash, plain init": Way(lam=lam),
        "GG init + L1 of the same lam": dataclasses.replace(full, nu=1.0),
        "GG init + explicit step": dataclasses.replace(full, prox=False),
    }
    seeds = range(1 if options.quick else options.seeds)
    # Seed by seed, so that a run that is cut off has whole comparisons.
    chosen = ways if options.quick or options.only == "main" else {**ways, **extra}
    order = [(name, seed) for part in (ways, extra) for seed in seeds for name in part if name in chosen]
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in chosen}
    for name, seed in order:
        runs[name][seed] = store.get(chosen[name], seed)
    if options.only:
        return
    rows = table(runs, step)
    facts = {
        "text": text.name,
        "step": step,
        "lam": lam,
        "tuning": _tuning(store),
        "weights": runs["plain"][0]["weights"],
    }
    facts["history"] = {name: found[0]["log"] for name, found in runs.items() if found[0]["log"]}
    write_results("gg_training", rows, quick=options.quick, extra=facts)
    if not options.quick:
        draw(RESULTS / "gg_training.svg", {name: runs[name] for name in ways})


def _tuning(store: Store) -> list[dict[str, Any]]:
    """Every training of the tuning seed, with all its grids."""
    rows = [row for row in store.rows.values() if row["seed"] == TUNING_SEED and row["steps"] == store.steps]
    return [{key: row[key] for key in ("init", "lam", "nu", "perplexity", "grids", "exact_zeros")} for row in rows]


if __name__ == "__main__":
    main()
