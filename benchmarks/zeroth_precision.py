"""What 16-bit weights do to zeroth-order tuning, and that ours leaves them alone: part (c) of docs/zeroth_study.md.

    python benchmarks/zeroth_precision.py [--quick] [--seeds 3] [--minutes M] [--shard i/n] [--table]

On the small GPT of `_zeroth_toy.py`: accuracy after 600 steps with the weights in float32, bfloat16 and float16, moved
in place or not, rounded to nearest or stochastically; what 1,000 steps at a learning rate of zero leave of the weights;
and which share of an update reaches weights of standard deviation 0.02, by their magnitude.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _report import RESULTS, ROOT, Row, write_results
from _zeroth_peers import InPlace, stored_masks
from _zeroth_runs import Cell, Runs, add_options, interval
from _zeroth_toy import CrossEntropy, accuracy, make_task, pretrained

from agentopt.weights.zeroth import NonFiniteLoss, ZerothOrder, fingerprint

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS: dict[str, Mapping[str, Any]] = {
    "in place, nearest": {},
    "in place, stochastic": {"rounding": "stochastic"},
    "restored exactly, nearest": {"restore": True},
    "ours": {},
}
RATES = (3e-4, 1e-4, 1e-3)
STEPS, STILL_STEPS = 600, 1000
UPDATES = (1e-6, 1e-5, 1e-4)


def cells(seeds: int) -> list[Cell]:
    """Every run: in float32 one way is enough, since nothing is rounded away."""
    return [
        Cell("c", f"{form} | {kind} | {mask}", lr, seed)
        for lr in RATES
        for seed in range(seeds)
        for mask in ("full", "small 50 %")
        for form in FORMATS
        for kind in KINDS
        if form != "float32" or kind == "ours"
    ]


def optimizer(model: Any, kind: str, mask: str, lr: float, seed: int) -> Any:
    """What makes the steps of a run."""
    if kind == "ours":
        # The mask that follows the weights lets them cross the threshold, as the stored mask of the others does.
        return ZerothOrder(model, lr=lr, seed=seed, mask="none" if mask == "full" else "small", mask_update="dynamic")
    masks = None if mask == "full" else stored_masks(model, 0.5)
    return InPlace(model, lr, seed=seed, masks=masks, **KINDS[kind])


def start(seed: int, form: str, folder: Path, pretraining: int) -> Any:
    """The pre-trained model in a format of its own."""
    model = copy.deepcopy(pretrained(seed, folder, pretraining)[0])
    return model.to(FORMATS[form])


def run(cell: Cell, folder: Path, steps: int, pretraining: int) -> dict[str, Any]:
    """One run: accuracy on dev and test at its end, and how far the weights came."""
    form, kind, mask = cell.method.split(" | ")
    model, task = start(cell.seed, form, folder, pretraining), make_task(cell.seed, aligned=True)
    zero_shot = accuracy(model, task.test, task.candidates)
    tuner = optimizer(model, kind, mask, cell.lr, cell.seed)
    failed: int | None = None
    for step in range(steps):
        try:
            tuner.step(CrossEntropy(task.batch(step), task.candidates))
        except (NonFiniteLoss, FloatingPointError):
            failed = step
            break
    return {
        "zero_shot": zero_shot,
        "dev": accuracy(model, task.dev, task.candidates),
        "test": accuracy(model, task.test, task.candidates),
        "failed_at": failed,
    }


def still(cell: Cell, folder: Path, steps: int, pretraining: int) -> dict[str, Any]:
    """Steps at a learning rate of zero: which weights are another number afterwards, and by how much."""
    form, kind, _ = cell.method.split(" | ")
    model, task = start(cell.seed, form, folder, pretraining), make_task(cell.seed, aligned=True)
    before = [weight.detach().clone() for weight in model.parameters()]
    print_before = fingerprint(model.named_parameters())
    dev = accuracy(model, task.dev, task.candidates)
    tuner = optimizer(model, kind, "full", 0.0, cell.seed)
    for step in range(steps):
        tuner.step(CrossEntropy(task.batch(step), task.candidates))
    pairs = list(zip(before, model.parameters(), strict=True))
    changed = sum(int((one.view(torch.uint8) != two.view(torch.uint8)).any()) for one, two in pairs)
    other = sum(int((one != two).sum()) for one, two in pairs)
    total = sum(one.numel() for one in before)
    drift = sum(float((two.double() - one.double()).square().sum()) for one, two in pairs)
    size = sum(float(one.double().square().sum()) for one in before)
    return {
        "dev": accuracy(model, task.dev, task.candidates),
        "test": accuracy(model, task.test, task.candidates),
        "dev_before": dev,
        "changed": other / total,
        "tensors_changed": changed,
        "drift": (drift / size) ** 0.5,
        "fingerprint_same": fingerprint(model.named_parameters()) == print_before,
    }


def landing(form: str, update: float, kind: str, weights: int = 1 << 18) -> list[float]:
    """Share of `update` x sign that reaches the weights (its projection), by quarters of magnitude, small first."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(512, weights // 512, bias=False)
    with torch.no_grad():
        model.weight.copy_(0.02 * torch.randn(model.weight.shape, generator=generator))
    model = model.to(FORMATS[form])
    before = model.weight.detach().float().clone().flatten()
    zo = ZerothOrder(model, lr=1.0, seed=1)
    signs = torch.empty(weights)
    from agentopt.weights.zeroth import Shift, probe_seed

    zo._directions.fill(zo.sites[0], Shift(probe_seed(1, 0, 0), 1.0), 0, 1.0, signs)
    with torch.no_grad():
        if kind == "ours":
            zo.update(0, probe_seed(1, 0, 0), (1.0,), update)
        else:
            model.weight.sub_((update * signs).view_as(model.weight).to(model.weight.dtype))
    moved = -(model.weight.detach().float().flatten() - before) * signs / update
    order = before.abs().argsort()
    return [float(moved[part].mean()) for part in order.chunk(4)]


def rows_of(runs: Runs) -> list[Row]:
    """Exactness, accuracy, and what lands."""
    rows: list[Row] = []
    for method in runs.methods("c, lr 0"):
        form, kind, _ = method.split(" | ")
        records = runs.of("c, lr 0", method)[0.0]
        changed = [record["changed"] for record in records]
        same = all(record["fingerprint_same"] for record in records)
        drift = statistics.fmean(record["drift"] for record in records)
        change = statistics.fmean(record["dev"] - record["dev_before"] for record in records)
        note = f"relative distance {drift:.2g}, dev accuracy {change:+.3f}"
        if kind == "ours":
            rows.append(
                Row(
                    f"learning rate 0, {form}, ours: weights changed",
                    statistics.fmean(changed),
                    "share",
                    goal="<= 0",
                    note=f"{note}; every bit the same: {'yes' if same else 'no'}",
                )
            )
        else:
            name = f"learning rate 0, {form}, {kind}: weights changed"
            rows.append(Row(name, statistics.fmean(changed), "share", interval(changed), note=note))
    for method in runs.methods("c"):
        form, kind, mask = method.split(" | ")
        for lr, records in sorted(runs.of("c", method).items()):
            tests = [record["test"] for record in records]
            spread = f"sd {statistics.stdev(tests):.3f}, " if len(tests) > 1 else ""
            failed = sum(record["failed_at"] is not None for record in records)
            note = f"{spread}n = {len(tests)}" + (f", {failed} diverged" if failed else "")
            rows.append(
                Row(
                    f"{form}, {kind}, {mask}, lr {lr:g}",
                    statistics.fmean(tests),
                    "test accuracy, mean of seeds",
                    interval(tests),
                    note=note,
                )
            )
    return [*rows, *landing_rows()]


def landing_rows() -> list[Row]:
    rows: list[Row] = []
    for form in ("bfloat16", "float16"):
        for update in UPDATES:
            for kind in ("nearest", "ours"):
                quarters = landing(form, update, kind)
                note = "by quarters of |w|, small first: " + ", ".join(f"{share:.2f}" for share in quarters)
                name = f"share of an update of {update:g} that lands, {form}, {kind}"
                rows.append(Row(name, statistics.fmean(quarters), "share", note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, still_steps, pretraining = (6, 6, 30) if options.quick else (STEPS, STILL_STEPS, 1500)
    seeds = 1 if options.quick else options.seeds
    quiet = [
        Cell("c, lr 0", f"{form} | {kind} | full", 0.0, 0) for form in FORMATS for kind in ("ours", "in place, nearest")
    ]
    runs_of = cells(seeds)[:6] if options.quick else cells(seeds)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) if options.quick else ROOT / ".agentopt" / "zeroth_quality"
        runs = Runs((Path(folder) if options.quick else RESULTS) / "zeroth_precision.jsonl")
        if not options.table:

            def unit(cells: Sequence[Cell]) -> list[dict[str, Any]]:
                if cells[0].part == "c":
                    return [run(cells[0], work, steps, pretraining)]
                return [still(cells[0], work, still_steps, pretraining)]

            left = runs.go_on([[cell] for cell in (*quiet, *runs_of)], unit, options)
            print(f"part c: {left} runs are missing" if left else "part c: complete")
        extra = {"synthetic": True, "steps": steps, "steps_at_lr_0": still_steps, "runs": len(runs.records)}
        write_results("zeroth_precision", rows_of(runs), quick=options.quick, extra=extra)


if __name__ == "__main__":
    main()
