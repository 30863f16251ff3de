"""What folding costs: beside reading a document (time, keys and values, break-even), and beside `higher` (training).

    python benchmarks/fold_cost.py [--quick] [--repeats 3] [--only reading|training] [--model embedded]

Part (a), reading (results/fold_cost.json). A document of 256 to 8,192 tokens and 1 to 64 questions of 32 tokens,
answered with 8: folded into an adapter (rank 16, 4 inner steps, rows of 128 tokens), read again for every question, or
read once with its keys and values kept. A Llama of 6M random weights in float32 on one thread; seconds are the
processor's. Every break-even stands beside the forecast of `estimate`, which knows the model's sizes and three timings
of it (`measure_speed`). Where folding loses, the row says so: against a kept prefix it loses in time, unless very many
questions are asked.

Part (b), training (results/fold_cost_training.json). One meta-gradient over 16 documents, full second order through 4
inner steps, by our inner loop and by `higher` 0.2.1 (installed into .venv-peers), which is used as RECKONING's code
uses it. Both compute the same gradient: the difference is a row. Every way runs in a process of its own; seconds are
the processor's on one thread, memory is what the peak of resident memory grows by over the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _fold_amortised import ANSWER, RANK, ROW, STEPS, Parts, measure, processor_time, random_model
from _fold_higher import CASES, SIZES
from _report import Row, peer_python, write_results

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
QUESTIONS = (1, 2, 4, 8, 16, 32, 64)
WAYS = {"fold": "fold", "cached": "kept prefix", "reread": "re-reading"}


# --- (a) reading -----------------------------------------------------------------------------------------------------


def reading(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of part (a), and all its numbers."""
    import torch

    from agentopt.weights import load
    from agentopt.weights.fold import Folder, FoldFormat
    from agentopt.weights.fold._estimator import estimate, measure_speed

    torch.set_num_threads(1)
    embedded = options.model == "embedded"
    model, tokenizer = load.model("embedded") if embedded else random_model(options.quick)
    contexts = (256, 1024) if options.quick else CONTEXTS[:3] if embedded else CONTEXTS
    form = FoldFormat(question="{question}", answer=" {answer}")
    rows: list[Row] = []
    cells: list[dict[str, Any]] = []
    right = {"fold or re-reading": 0, "cheapest": 0}
    with (
        processor_time(),
        Folder(
            model, tokenizer, rank=RANK, inner_steps=STEPS, row_tokens=ROW, lr=1e-3, multi_task=False, format=form
        ) as folder,
    ):
        sizes = {"model": sum(one.numel() for one in model.parameters()), "window": folder.window()}
        with folder.base_in_use():
            speed = measure_speed(model)
        for context in contexts:
            parts = measure(folder, context, options.repeats, lambda text: print(text, flush=True))
            forecasts = {
                number: estimate(
                    model,
                    context_tokens=parts.context,
                    questions=number,
                    question_tokens=parts.question_tokens,
                    answer_tokens=ANSWER,
                    inner_steps=STEPS,
                    rank=RANK,
                    row_tokens=ROW,
                    dtype="float32",
                    speed=speed,
                )
                for number in QUESTIONS
            }
            for number, forecast in forecasts.items():
                cell = _cell(parts, number, forecast)
                cells.append(cell)
                right["fold or re-reading"] += cell["fold_beats_reread"] == cell["forecast_fold_beats_reread"]
                right["cheapest"] += cell["cheapest"] == cell["forecast_cheapest"]
            rows += _rows_of(parts, forecasts[1], cells[-len(QUESTIONS) :])
    for what, count in right.items():
        rows.append(
            Row(
                f"forecast names the winner ({what})",
                count / len(cells),
                "of all cells",
                None,
                None if options.quick else ">= 0.9",
            )
        )
    return rows, {"sizes": sizes, "speed": vars_of(speed), "cells": cells}


def vars_of(speed: Any) -> dict[str, float]:
    return {"forward": speed.forward, "backward": speed.backward, "step": speed.step}


def _cell(parts: Parts, number: int, forecast: Any) -> dict[str, Any]:
    """One context length with one number of questions."""
    found = {way: parts.total(way, number) for way in WAYS}
    expected = {"fold": forecast.fold.seconds, "cached": forecast.cached.seconds, "reread": forecast.reread.seconds}
    return {
        "context": parts.context,
        "questions": number,
        "seconds": found,
        "forecast_seconds": expected,
        "cheapest": min(found, key=lambda way: found[way]),
        "forecast_cheapest": min(expected, key=lambda way: expected[way]),
        "fold_beats_reread": found["fold"] < found["reread"],
        "forecast_fold_beats_reread": expected["fold"] < expected["reread"],
    }


def _rows_of(parts: Parts, forecast: Any, cells: list[dict[str, Any]]) -> list[Row]:
    """What is said about one context length."""
    name = f"{parts.context:,} tokens"
    fold, prefix = statistics.median(parts.fold), statistics.median(parts.prefix)
    last = cells[-1]
    errors = [cell["forecast_seconds"][way] / cell["seconds"][way] for cell in cells for way in WAYS]
    even = {way: parts.break_even(way) for way in ("reread", "cached")}
    note = f"Folder.fold with the recall before and after: {parts.whole_fold:.3f} s; reading once: {prefix:.3f} s"
    rows = [
        Row(
            f"{name}: folding",
            fold,
            "s",
            (min(parts.fold), max(parts.fold)),
            None,
            "forecast",
            forecast.fold.fixed_seconds,
            note,
        )
    ]
    rows.append(
        Row(
            f"{name}: folding is cheaper than re-reading from",
            even["reread"],
            "questions",
            peer="forecast",
            peer_value=forecast.break_even,
            note=f"re-reading takes {statistics.median(parts.reread_question):.3f} s a question",
        )
    )
    lose = "never: folding loses at any number of questions" if even["cached"] is None else "later than 64: it loses"
    note = (
        f"{lose if even['cached'] is None or even['cached'] > QUESTIONS[-1] else 'it wins'}; a question takes "
        f"{statistics.median(parts.folded_question):.4f} s folded, {statistics.median(parts.cached_question):.4f} s "
        f"behind the prefix; 64 questions {last['seconds']['fold']:.2f} s and {last['seconds']['cached']:.2f} s"
    )
    rows.append(
        Row(
            f"{name}: folding is cheaper than a kept prefix from",
            even["cached"],
            "questions",
            peer="forecast",
            peer_value=forecast.break_even_cached,
            note=note,
        )
    )
    rows.append(
        Row(
            f"{name}: keys and values that a kept prefix holds",
            parts.prefix_bytes / 2**20,
            "MiB",
            peer="forecast",
            peer_value=forecast.kv_saved / 2**20,
            note=f"a fold holds none, and an adapter of {parts.adapter_bytes / 2**20:.2f} MiB (forecast "
            f"{forecast.adapter_bytes / 2**20:.2f}); a question of its own {parts.question_bytes / 2**20:.3f} MiB",
        )
    )
    rows.append(
        Row(
            f"{name}: forecast over measured seconds",
            statistics.median(errors),
            "times",
            (min(errors), max(errors)),
            note="median and range over all numbers of questions and the three ways",
        )
    )
    return rows


# --- (b) training ----------------------------------------------------------------------------------------------------


def training(options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of part (b), and all its numbers."""
    python, reason = peer_python("higher==0.2.1", extra_args=["--no-deps"])
    if python is None:
        return [Row("higher", None, "", note=f"could not be installed: {reason}")], {}
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    peers = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", check=True).stdout.strip()
    rows: list[Row] = []
    numbers: dict[str, Any] = {}
    for size in ("tiny",) if options.quick else ("study", "small", "llama", "all"):
        cases = ["batch", "ours"] if options.quick else [case.key for case in CASES]
        found = _worker([*cases, "compare"], size, peers, options.repeats)
        numbers[size] = found
        rows += _training_rows(size, found, goals=not options.quick)
    return rows, numbers


def _worker(cases: list[str], size: str, peers: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("_fold_higher.py")), "--cases", *cases, "--size", size]
    command += ["--peers", peers, "--repeats", str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as worker:
        for line in worker.stdout or ():
            print(size, line, end="", flush=True)
            found |= json.loads(line)
    if worker.returncode:
        raise RuntimeError(f"{command} failed")
    return found


def _training_rows(size: str, found: dict[str, Any], *, goals: bool) -> list[Row]:
    """Gradient, then time and memory of every way of ours beside `higher`."""
    name = SIZES[size].name
    worst = max(found["compare"].values())
    rows = [Row(f"{name}: largest relative difference of the meta-gradients", worst, "", goal="<= 1e-4")]
    for case in CASES:
        peers = ("higher-first",) if case.key == "ours-first" else ("batch", "each")
        for peer in peers:
            if not case.peer and case.key in found and peer in found:
                rows += _beside(name, case, peer, found, goals=goals)
    return rows


def _beside(name: str, case: Any, peer: str, found: dict[str, Any], *, goals: bool) -> list[Row]:
    """How many times faster than the peer, and how much of its memory."""
    mine, theirs = found[case.key], found[peer]
    seconds, others = statistics.median(mine["seconds"]), statistics.median(theirs["seconds"])
    spread = [b / a for a in mine["seconds"] for b in theirs["seconds"]]
    # The goals are for the same gradient, computed as a folder does it, beside the way of RECKONING's code.
    aimed = goals and case.key == "ours" and peer == "batch"
    note = f"{seconds:.3f} s; the peer's value in seconds"
    if case.key == "ours-2":
        note += "; another gradient: the first two steps are constants"
    return [
        Row(
            f"{name}: {case.name}, speed",
            others / seconds,
            "times",
            (min(spread), max(spread)),
            ">= 2" if aimed else None,
            next(one.name for one in CASES if one.key == peer),
            others,
            note,
        ),
        Row(
            f"{name}: {case.name}, memory",
            mine["mib"] / theirs["mib"],
            "of its",
            None,
            "<= 0.5" if aimed else None,
            next(one.name for one in CASES if one.key == peer),
            theirs["mib"],
            f"{mine['mib']:.0f} MiB over the loaded model; the peer's value in MiB",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that everything runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("reading", "training"))
    parser.add_argument("--model", default="random", choices=("random", "embedded"), help="of part (a)")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    for name, file, part in (("reading", "fold_cost", reading), ("training", "fold_cost_training", training)):
        if options.only in (None, name):
            rows, numbers = part(options)
            write_results(file, rows, quick=options.quick, extra=numbers)


if __name__ == "__main__":
    main()
