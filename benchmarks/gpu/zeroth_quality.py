"""Whether a mask of small weights helps: a model pre-trained here, then tuned by forward passes on a shifted task.

    python benchmarks/gpu/zeroth_quality.py [--minutes 3.5]
    python benchmarks/gpu/zeroth_quality.py --device cpu --tiny   # the same code, far too small to find anything

SYNTHETIC. The task is that of `_zeroth_toy`: eight topics and their labels are learnt, then the topics are regrouped
onto two of the labels, each of the two getting the other's. Here the model is a Llama shape of 25M weights in bfloat16
instead of 105,408 in float32, and all runs go through the Triton kernels and stochastic rounding.

{all weights, small 50 %, random 50 %} x learning rates x seeds at equal steps, both signs in one batch. Cells are run
seed by seed, so that what time leaves out is whole seeds. The learning rate of a method is the one with the best mean
on the dev rows; its test accuracy is given as mean and standard deviation over the seeds. The number that matters is
(small - all). AdamW on LoRA adapters, at the same number of forward passes (its step counts as three), is the upper
bound. Whatever comes out is written down.
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import Bench, Row, options

METHODS: dict[str, dict[str, Any]] = {
    "all weights": {"mask": "none"},
    "small 50 %": {"mask": "small", "density": 0.5},
    "random 50 %": {"mask": "random", "density": 0.5},
}
BOUND = "AdamW on LoRA adapters"


@dataclass(frozen=True)
class Plan:
    """Sizes of a study."""

    width: int
    inner: int
    layers: int
    heads: int
    pretraining: int
    rows: int
    steps: int
    seeds: int
    rates: tuple[float, ...]
    bound_rates: tuple[float, ...]


FULL = Plan(512, 1408, 8, 8, 400, 256, 300, 3, (3e-7, 1e-6, 3e-6, 1e-5), (3e-4, 1e-3))
TINY = Plan(32, 64, 1, 2, 3, 8, 2, 1, (1e-5,), (1e-3,))


def main() -> None:
    given = options(__doc__ or "", minutes=3.5)
    bench = Bench("zeroth_quality", given)
    plan = TINY if given.tiny else FULL
    results: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for seed in range(plan.seeds):
        if bench.late(f"seed {seed}"):
            break
        if not one_seed(bench, plan, seed, results):
            break
        report(bench, results)
    bench.finish()


def one_seed(bench: Bench, plan: Plan, seed: int, results: dict[tuple[str, float], list[tuple[float, float]]]) -> bool:
    """All cells of a seed; false when time ended before the last."""
    from _zeroth_toy import make_task

    base = pretrained(plan, seed, bench)
    task = make_task(seed, aligned=True)
    found: dict[tuple[str, float], tuple[float, float]] = {}
    if seed == 0:
        _, test = scores(base, task, bench.device)
        bench.add(Row("shifted task, before tuning: accuracy", test, "share"))
    cells = [(name, rate) for rate in plan.rates for name in METHODS]
    cells += [(BOUND, rate) for rate in plan.bound_rates]
    for name, rate in cells:
        if bench.late(f"seed {seed}: {name}, lr {rate:g}"):
            return False
        model = copy.deepcopy(base)
        found[name, rate] = tuned(plan, name, rate, seed, model, task, bench.device)
        bench.extra[f"seed {seed}, {name}, lr {rate:g}"] = {"dev": found[name, rate][0], "test": found[name, rate][1]}
        print(f"  seed {seed}, {name}, lr {rate:g}: test {found[name, rate][1]:.3f}", flush=True)
    for cell, pair in found.items():
        results.setdefault(cell, []).append(pair)
    return True


def build(plan: Plan, seed: int, device: str) -> Any:
    """The shape with random weights, in float32: it is pre-trained so."""
    import torch
    from _zeroth_toy import VOCABULARY
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=plan.width,
        intermediate_size=plan.inner,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device)


def pretrained(plan: Plan, seed: int, bench: Bench) -> Any:
    """A model that knows the eight labels, in the 16-bit format of the GPU."""
    import numpy as np
    import torch
    from _zeroth_toy import LABEL, TOPICS, documents
    from torch.nn import functional

    model = build(plan, seed, bench.device)
    rng = np.random.default_rng([seed, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=plan.pretraining)
    for _ in range(plan.pretraining):
        topics = rng.integers(0, TOPICS, plan.rows)
        rows = np.concatenate([documents(rng, topics), LABEL + topics[:, None]], axis=1)
        tokens = torch.from_numpy(rows).to(bench.device)
        with torch.autocast(bench.device, torch.bfloat16, enabled=bench.device != "cpu"):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + functional.cross_entropy(logits[:, -1], tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    topics = rng.integers(0, TOPICS, 64 if bench.tiny else 2000)
    with torch.no_grad():
        tokens = torch.from_numpy(documents(rng, topics)).to(bench.device)
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1, LABEL : LABEL + TOPICS]
    share = float((logits.argmax(-1).cpu().numpy() == topics).mean())
    bench.add(Row(f"seed {seed}: accuracy on the eight labels after pre-training", share, "share"))
    return model.eval() if bench.device == "cpu" else model.eval().to(torch.bfloat16)


class TwoAnswers:
    """Per-example cross-entropy over the two answers; several copies of the weights in one pass."""

    def __init__(self, rows: Any, candidates: tuple[int, int], device: str) -> None:
        self.tokens, self.answers = rows.tokens.to(device), rows.answers.to(device)
        self.candidates = list(candidates)

    def logits(self, model: Any, copies: int = 1) -> Any:
        found = model(input_ids=self.tokens.repeat(copies, 1), use_cache=False, logits_to_keep=1).logits
        return found[:, -1, self.candidates].float()

    def __call__(self, model: Any) -> Any:
        return self.losses(model, 1)[0]

    def losses(self, model: Any, copies: int) -> Any:
        from torch.nn import functional

        answers = self.answers.repeat(copies)
        return functional.cross_entropy(self.logits(model, copies), answers, reduction="none").view(copies, -1)


def tuned(plan: Plan, name: str, rate: float, seed: int, model: Any, task: Any, device: str) -> tuple[float, float]:
    """Accuracy on dev and test rows after a run; of a run whose loss blew up, that of the last good weights."""
    from _methods import Adam

    from agentopt.weights.zeroth import NonFiniteLoss, ZerothOrder

    steps = plan.steps
    if name == BOUND:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        peer: Any = Adam(model, rate)
        steps = max(1, 2 * steps // 3)
    else:
        model.requires_grad_(True)
        peer = ZerothOrder(model, lr=rate, eps=1e-3, seed=seed, **METHODS[name])
    for step in range(steps):
        try:
            peer.step(TwoAnswers(task.batch(step), task.candidates, device))
        except NonFiniteLoss:
            break
    return scores(model, task, device)


def scores(model: Any, task: Any, device: str) -> tuple[float, float]:
    """Accuracy on dev and test rows."""
    import torch

    found: list[float] = []
    with torch.no_grad():
        for rows in (task.dev, task.test):
            asked = TwoAnswers(rows, task.candidates, device)
            found.append(float((asked.logits(model).nan_to_num().argmax(-1) == asked.answers).float().mean()))
    return found[0], found[1]


def report(bench: Bench, results: dict[tuple[str, float], list[tuple[float, float]]]) -> None:
    """Rows of the methods at their best learning rates, over the seeds so far."""
    bench.rows = [row for row in bench.rows if not row.name.startswith(("best", "small -"))]
    best: dict[str, list[float]] = {}
    for name in (*METHODS, BOUND):
        rates = {rate: pairs for (method, rate), pairs in results.items() if method == name}
        rate = max(rates, key=lambda one: statistics.fmean(dev for dev, _ in rates[one]))
        best[name] = [test for _, test in rates[rate]]
        seeds = len(best[name])
        spread = statistics.stdev(best[name]) if seeds > 1 else 0.0
        mean = statistics.fmean(best[name])
        bench.add(
            Row(
                f"best learning rate, {name}: test accuracy",
                mean,
                "share",
                (mean - spread, mean + spread),
                note=f"lr {rate:g}, {seeds} seeds, range is one standard deviation",
            )
        )
    gain = [small - every for small, every in zip(best["small 50 %"], best["all weights"], strict=True)]
    bench.add(Row("small - all, test accuracy at the best learning rates", statistics.fmean(gain), "share"))


if __name__ == "__main__":
    main()
