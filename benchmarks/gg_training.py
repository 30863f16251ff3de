"""Bits per weight of a small language model trained in three ways: plain, with GG init, with GG init and BackSlash.

    python benchmarks/gg_training.py [--quick] [--seeds 3] [--data ../shared/data] [--only tune|main] [--report]

A Llama of 0.7M weights (width 128, 3 blocks, tied head, 512 byte-pair tokens) on GSM8K (on generated prose where that
is not at hand), AdamW, the same batches in the same order and the same number of steps for every way. Results in
results/gg_training.json, one line per training in results/gg_training.jsonl (a run that was cut off goes on there),
curves in results/gg_training.svg.

Rules, written down before the counted runs:

1. Strength. BackSlash's settings are chosen on a seed of its own (100) from `STRENGTHS`: of those whose perplexity at
   the step of rule 2 is at most 0.5 % above the plain training's, the one with the fewest bits there. GG init's two
   numbers were fixed on that seed too: nu 1, and xi such that a matrix of 128 inputs has the plain width 0.02 (with
   xi 1 the perplexity was 15 % above the plain one).
2. Step. One grid for all ways and seeds: the coarsest power of two at which the plain model of seed 100 loses at most
   0.1 % of its perplexity by rounding. All matrices are rounded to it, embeddings too; norms stay (0.1 % of it).
3. Bits are the entropy of the rounded weights, one code per matrix (an arithmetic coder reaches it; Huffman and
   exp-Golomb are beside it). Perplexity is that of the rounded model, on the same 256 validation sequences.
4. Because one fixed step is kind to a model with smaller weights, every way is also given its own best step: the one
   with the fewest bits among those whose rounded perplexity is at most 1 % above the plain model's own of that seed.
   For the plain way this is what uniform quantization and entropy coding alone give.
5. GG init alone reaches a lower perplexity than plain init in so few steps, so that a loss against the plain training
   flatters what is built on it: the loss against GG init alone stands beside it.

Goals: 60 % fewer bits at 1 % loss in perplexity, under rules 2 and 3. Losing cases are rows too: BackSlash without GG
init, L1 of the same strength, the published explicit step; and a Gaussian drawn by the rule of `gg.init_` (nu 2), which
tells the part of the shape from the part of the widths.
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
from _gg_lm import QUICK, SIZE, STEPS, Size, Text, Way, load_text, run
from _report import RESULTS, ROOT, Row, middle, write_results

TUNING_SEED = 100
STEP_LOSS, TUNED_LOSS, ALLOWED_LOSS = 1.001, 1.005, 1.01
FULL = "GG init + BackSlash"
PLAIN = Way()
STRENGTHS: tuple[tuple[float, float | str], ...] = (
    (0.004, "auto"),
    (0.016, "auto"),
    (0.02, "auto"),
    (0.008, 0.5),
    (0.012, 0.5),
    (0.016, 0.5),
)
"""lam and nu of the candidates."""
Runs = Mapping[str, Mapping[int, dict[str, Any]]]
"""Way, seed, what came out."""


class Store:
    """The trainings that are done, one line each; without a path they are not kept."""

    def __init__(self, path: Path | None, text: Text) -> None:
        self.path, self.text = path, text
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

    def has(self, way: Way, seed: int) -> bool:
        """Whether it was trained before."""
        return _key(way, seed, self.text.size.steps, self.text.name) in self.rows

    def get(self, way: Way, seed: int) -> dict[str, Any]:
        """Train, unless it was done before."""
        key = _key(way, seed, self.text.size.steps, self.text.name)
        self._read()
        if key not in self.rows:
            print(f"{way}, seed {seed}", flush=True)
            settings = {**dataclasses.asdict(way), "seed": seed, "steps": self.text.size.steps, "text": self.text.name}
            found = {**settings, **run(way, seed, self.text, _tell)}
            self.rows[key] = found
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
        return self.rows[key]


def _key(way: Way, seed: int, steps: int, text: str) -> tuple[Way, int, int, str]:
    return way, seed, steps, text


def _tell(text: str) -> None:
    print(text, flush=True)


def gg_init(size: Size) -> Way:
    """Nu 1, and the plain width 0.02 in a matrix with as many inputs as the model is wide."""
    return Way("gg", xi=round(size.width * 0.02**2, 6))


def choose_step(plain: Mapping[str, Any]) -> float:
    """Rule 2."""
    return max(
        (one["step"] for one in plain["grids"] if one["perplexity"] <= STEP_LOSS * plain["perplexity"]),
        default=STEPS[-1],
    )


def choose_way(store: Store, step: float, candidates: Sequence[Way]) -> Way:
    """Rule 1; the first one where none is within the loss."""
    limit = TUNED_LOSS * at(store.get(PLAIN, TUNING_SEED), step)["perplexity"]
    found = {way: at(store.get(way, TUNING_SEED), step) for way in candidates}
    within = [way for way, one in found.items() if one["perplexity"] <= limit]
    return min(within, key=lambda way: found[way]["entropy"], default=candidates[0])


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
    for name, by_seed in runs.items():
        both = [(found, runs["plain"][seed]) for seed, found in by_seed.items()]
        rounded = [at(found, step) for found, _ in both]
        goals = (">= 60", "<= 1") if name == FULL else (None, None)
        rows.append(_row(f"{name}: perplexity, not rounded", [found["perplexity"] for found, _ in both], ""))
        rows.append(_row(f"{name}: perplexity at step {step:g}", [one["perplexity"] for one in rounded], ""))
        for what in ("entropy", "huffman", "eg"):
            rows.append(_row(f"{name}: {what} at that step", [one[what] for one in rounded], "bits/weight"))
        rows.append(_row(f"{name}: zeros at that step", [100 * one["zeros"] for one in rounded], "%"))
        if name != "plain":
            base = [at(one, step) for _, one in both]
            rows.append(_row(f"{name}: fewer bits than plain", _fewer(rounded, base), "%", goals[0]))
            rows.append(_row(f"{name}: loss against plain", _loss(rounded, base), "%", goals[1]))
        if name == FULL:
            alone = [at(runs["GG init"][seed], step) for seed in by_seed]
            rows.append(_row(f"{name}: loss against GG init alone", _loss(rounded, alone), "%"))
        rows += _own_step(name, both)
    return rows


def _fewer(found: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> list[float]:
    return [100 * (1 - one["entropy"] / other["entropy"]) for one, other in zip(found, base, strict=True)]


def _loss(found: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> list[float]:
    return [100 * (one["perplexity"] / other["perplexity"] - 1) for one, other in zip(found, base, strict=True)]


def _own_step(name: str, both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    """Rule 4."""
    limits = [ALLOWED_LOSS * base["perplexity"] for _, base in both]
    pairs = [(best(found, limit), best(base, limit)) for (found, base), limit in zip(both, limits, strict=True)]
    within = [(one, base) for one, base in pairs if one and base]
    what = f"{name}: bits at its own best step"
    if not within:
        return [Row(what, None, "bits/weight", note="no step within 1 % of plain")]
    steps = ", ".join(format(one["step"], "g") for one, _ in within)
    note = f"{len(within)} of {len(pairs)} seeds; steps {steps}"
    rows = [_row(what, [one["entropy"] for one, _ in within], "bits/weight", note=note)]
    if name != "plain":
        fewer = _fewer([one for one, _ in within], [base for _, base in within])
        rows.append(_row(f"{name}: fewer bits than plain, each at its best step", fewer, "%"))
    return rows


def _row(name: str, values: Sequence[float], unit: str, goal: str | None = None, note: str | None = None) -> Row:
    """Median and range of the seeds."""
    value, interval = middle(values)
    return Row(name, value, unit, interval, goal, note=note)


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
    parser.add_argument("--quick", action="store_true", help="a smaller model for 30 steps, for make bench")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", choices=("tune", "main"), help="train this part and write no results")
    parser.add_argument("--report", action="store_true", help="train nothing: the results from what was trained so far")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    size = QUICK if options.quick else SIZE
    text = load_text(options.data, size)
    print(f"{text.name}: {len(text.train):,} tokens to train on, {len(text.valid):,} to test on")
    store = Store(None if options.quick else RESULTS / "gg_training.jsonl", text)
    step = choose_step(store.get(PLAIN, TUNING_SEED))
    drawn = gg_init(size)
    candidates = [dataclasses.replace(drawn, lam=lam, nu=nu) for lam, nu in STRENGTHS]
    if options.report:
        candidates = [way for way in candidates if store.has(way, TUNING_SEED)]
    full = choose_way(store, step, candidates[:1] if options.quick else candidates)
    print(f"step {step:g}, {full}")
    if options.only == "tune":
        return
    ways = {"plain": PLAIN, "GG init": drawn, FULL: full}
    extra = {
        "BackSlash, plain init": dataclasses.replace(PLAIN, lam=full.lam, nu=full.nu),
        "Gaussian init of the same widths": dataclasses.replace(drawn, shape=2.0),
        "GG init + L1 of the same lam": dataclasses.replace(full, nu=1.0),
        "GG init + explicit step": dataclasses.replace(full, prox=False),
    }
    seeds = range(1 if options.quick else options.seeds)
    # Seed by seed, so that a run that is cut off has whole comparisons.
    chosen = ways if options.quick or options.only == "main" else {**ways, **extra}
    order = [(name, seed) for part in (ways, extra) for seed in seeds for name in part if name in chosen]
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in chosen}
    for name, seed in order:
        if not options.report or store.has(chosen[name], seed):
            runs[name][seed] = store.get(chosen[name], seed)
    runs = {name: by_seed for name, by_seed in runs.items() if by_seed}
    if options.only:
        return
    rows = table(runs, step)
    if options.quick:  # a smoke test: its numbers mean nothing
        rows = [dataclasses.replace(row, goal=None) for row in rows]
    facts = {
        "text": text.name,
        "step": step,
        "way": dataclasses.asdict(full),
        "tuning": _tuning(store),
        "weights": runs["plain"][0]["weights"],
    }
    facts["history"] = {name: found[0]["log"] for name, found in runs.items() if found[0]["log"]}
    write_results("gg_training", rows, quick=options.quick, extra=facts)
    if not options.quick:
        draw(RESULTS / "gg_training.svg", {name: runs[name] for name in ways})


def _tuning(store: Store) -> list[dict[str, Any]]:
    """Every training of the tuning seed, with all its grids."""
    rows = [row for row in store.rows.values() if row["seed"] == TUNING_SEED and row["steps"] == store.text.size.steps]
    return [
        {
            key: row.get(key)
            for key in ("init", "lam", "nu", "eps", "stop", "perplexity", "fitted_nu", "grids", "exact_zeros")
        }
        for row in rows
    ]


if __name__ == "__main__":
    main()
