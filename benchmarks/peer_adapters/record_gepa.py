"""Record what gepa 0.1.4 decides on synthetic scores, for the replay in `tests/search/test_pareto.py`.

Run with an interpreter that has gepa:

    python benchmarks/peer_adapters/record_gepa.py tests/search/data/gepa_decisions.json

The adapter scores a candidate on a row by a hash of (run, split, row, texts); the proposer numbers its texts. So the
whole run is a function of the seed, and everything gepa draws (parents, minibatches, merges) can be compared. A run
ends when the pool holds eight candidates: gepa walks through sets of candidate numbers, and from number eight on their
order is a matter of the interpreter's hash tables.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gepa
from gepa.core.adapter import EvaluationBatch

POOL = 8

RUNS = [
    {
        "seed": seed,
        "components": (1, 2, 3, 3, 2)[seed % 5],
        "train": (7, 9, 4, 10)[seed % 4],
        "validation": (6, 8, 11, 5, 16)[seed % 5],
        # Binary scores bring ties and perfect minibatches; coarse and fine ones merges and close calls.
        "levels": (2, 5, 20)[(seed // 3) % 3],
        "merge": seed % 7 != 6,
        "iterations": 32,
    }
    for seed in range(40)
]


def score(run: Mapping[str, Any], split: str, row: int, texts: Mapping[str, str]) -> float:
    """A number of 0..1 in `levels` steps."""
    text = json.dumps([run["seed"], split, row, sorted(texts.items())])
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    return number % run["levels"] / (run["levels"] - 1)


class _Adapter:
    def __init__(self, run: Mapping[str, Any]) -> None:
        self.run = run
        self.made = 0

    def evaluate(self, batch: list[Any], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        scores = [score(self.run, split, row, candidate) for split, row in batch]
        traces = [{"row": row} for _, row in batch] if capture_traces else None
        return EvaluationBatch(outputs=list(scores), scores=scores, trajectories=traces)

    def make_reflective_dataset(self, candidate: Any, evaluated: Any, components: list[str]) -> dict[str, Any]:
        return {name: [{"Feedback": "none"}] for name in components}

    def propose_new_texts(self, candidate: Any, records: Any, components: list[str]) -> dict[str, str]:
        self.made += 1
        return {name: f"text {self.made}" for name in components}


class _Watch:
    """One record per iteration."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps: list[dict[str, Any]] = []
        self.pool = 1

    def on_iteration_start(self, event: Any) -> None:
        self.steps.append({})

    def on_candidate_selected(self, event: Any) -> None:
        self.steps[-1]["parent"] = event["candidate_idx"]

    def on_minibatch_sampled(self, event: Any) -> None:
        self.steps[-1]["minibatch"] = list(event["minibatch_ids"])

    def on_evaluation_skipped(self, event: Any) -> None:
        self.steps[-1]["skipped"] = event["reason"]

    def on_merge_attempted(self, event: Any) -> None:
        self.steps[-1]["merge"] = {"parents": list(event["parent_ids"]), "texts": event["merged_candidate"]}

    def on_proposal_end(self, event: Any) -> None:
        self.steps[-1]["texts"] = event["new_instructions"]

    def on_valset_evaluated(self, event: Any) -> None:
        if self.steps:
            self.pool += 1
            self.steps[-1]["candidate"] = event["candidate"]

    def on_iteration_end(self, event: Any) -> None:
        state, step = event["state"], self.steps[-1]
        step["accepted"] = event["proposal_accepted"]
        if "merge" in step:
            step["merge"]["rows"] = list(state.full_program_trace[-1]["subsample_ids"])
        if step["accepted"]:
            fronts = state.get_pareto_front_mapping()
            step["fronts"] = [sorted(fronts[row]) for row in sorted(fronts)]
            step["mean"] = state.program_full_scores_val_set[-1]

    def stop(self, _state: Any) -> bool:
        return len(self.steps) >= self.limit or self.pool >= POOL


class _Quiet:
    def log(self, message: str) -> None:
        pass


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The run's settings, its steps and the best candidate."""
    watch = _Watch(run["iterations"])
    names = [f"part{number}" for number in range(run["components"])]
    result = gepa.optimize(
        seed_candidate={name: "start" for name in names},
        trainset=[("train", row) for row in range(run["train"])],
        valset=[("validation", row) for row in range(run["validation"])],
        adapter=_Adapter(run),  # type: ignore[arg-type]
        use_merge=run["merge"],
        stop_callbacks=watch.stop,
        callbacks=[watch],  # type: ignore[list-item]
        logger=_Quiet(),
        seed=run["seed"],
    )
    return {**run, "steps": watch.steps, "best": result.best_candidate}


def main() -> None:
    """Write the file and say what is in it."""
    runs = [record(run) for run in RUNS]
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    Path(sys.argv[1]).write_text(f'{{"gepa": "0.1.4", "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    steps = [step for run in runs for step in run["steps"]]
    merges = [step["merge"] for step in steps if "merge" in step]
    accepted = sum(step["accepted"] for step in steps)
    print(f"{len(runs)} runs, {len(steps)} iterations, {accepted} accepted, {len(merges)} merges tested,")
    print(f"{sum('skipped' in step for step in steps)} perfect minibatches")


if __name__ == "__main__":
    main()
