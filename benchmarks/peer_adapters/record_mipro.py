"""Record what dspy 3.4.1 MIPROv2 decides on synthetic scores, for the replay in `tests/search/test_bayes.py`.

Run with an interpreter that has dspy:

    python benchmarks/peer_adapters/record_mipro.py tests/search/data/mipro_decisions.json

Instructions and demonstration sets are given, so that no model is asked: what runs is MIPROv2's third step, its search,
whole and unchanged. A combination's score on a row is a hash of (run, row, places in the menus).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy

logging.disable(logging.WARNING)

RUNS = [
    {
        "seed": seed,
        "predictors": 1 + seed % 2,
        "instructions": 3 + seed % 4,
        "demos": (4, 0, 2)[seed % 3],
        "validation": 30 + 7 * (seed % 4),
        "trials": (7, 10, 15, 22)[seed % 4],
        "minibatch": (6, 12, 25)[(seed // 2) % 3],
        "full_every": (5, 3)[seed % 5 == 4],
    }
    for seed in range(10)
]


def score(run: Mapping[str, Any], row: int, places: Mapping[str, int]) -> float:
    """0 or 1; each menu's later entries tend to be better."""
    text = json.dumps([run["seed"], row, sorted(places.items())])
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return float(number < 0.3 + 0.1 * sum(places.values()) / len(places))


class _Program(dspy.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        for number in range(count):
            setattr(self, f"step{number}", dspy.Predict(dspy.Signature("question -> answer", "0")))


def places_of(program: Any, run: Mapping[str, Any]) -> dict[str, int]:
    """Which entry of each menu a program uses."""
    found: dict[str, int] = {}
    for number, predictor in enumerate(program.predictors()):
        found[f"{number}_predictor_instruction"] = int(predictor.signature.instructions)
        if run["demos"]:
            found[f"{number}_predictor_demos"] = predictor.demos[0]["place"] if predictor.demos else 0
    return found


def record(run: dict[str, Any]) -> dict[str, Any]:
    """The run's settings, its evaluations in order, and the best combination."""
    steps: list[dict[str, Any]] = []

    def evaluate(program: Any, devset: Sequence[int], **_: Any) -> Any:
        places = places_of(program, run)
        values = [score(run, row, places) for row in devset]
        mean = sum(values) / len(values)
        rows = list(devset) if len(devset) < run["validation"] else "all"
        steps.append({"places": list(places.values()), "rows": rows, "score": mean})
        return dspy.Prediction(score=mean, results=[])

    unused: Any = object()
    search = dspy.MIPROv2(
        metric=lambda *_: 0.0, prompt_model=unused, task_model=unused, auto=None, num_candidates=2, seed=run["seed"]
    )
    search.rng = random.Random(run["seed"])
    count = run["predictors"]
    demos = [[[], *([dspy.Example(place=place)] for place in range(1, run["demos"]))] for _ in range(count)]
    best = search._optimize_prompt_parameters(
        _Program(count),
        {number: [str(place) for place in range(run["instructions"])] for number in range(count)},
        dict(enumerate(demos)) if run["demos"] else None,
        evaluate,
        list(range(run["validation"])),
        run["trials"],
        True,
        run["minibatch"],
        run["full_every"],
        run["seed"],
    )
    return {**run, "steps": steps, "best": list(places_of(best, run).values()), "best_score": best.score}


def main() -> None:
    """Write the file and say what is in it."""
    runs = [record(run) for run in RUNS]
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    Path(sys.argv[1]).write_text(f'{{"dspy": "3.4.1", "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    steps = [step for run in runs for step in run["steps"]]
    print(f"{len(runs)} runs, {len(steps)} evaluations, {sum(step['rows'] == 'all' for step in steps)} of them full")


if __name__ == "__main__":
    main()
