"""What one byte per weight costs a model: KL to the original, perplexity and two classification tasks, for all formats.

    python benchmarks/gg_quality.py [--quick] [--data ../shared/data] [--only embedded|tasks|trained] [--report]

The linear layers of a model (not the embedding, not the head) are stored in each format, decoded, and computed with in
float32; so only the weights differ. On the embedded 135M model, text from HotpotQA articles: the mean KL divergence to
the original and how often the most likely token is the same, on every fourth position; perplexity on all. Intervals are
95 % bootstraps over rows of 512 tokens; differences of KL are paired by row. SST-2 and TREC: labels by likelihood, with
no examples shown; changes are beside fp32 on the same rows. Books are the formula's, refined on sampled rows of the
model, or refined and searched with column weights from other text (mean square activations).

The embedded weights were 4 and 8 bits once. So the same is measured on models that are trained here, two widths and
two seeds each. Every finished cell is a line in results/gg_quality.jsonl, where a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import _gg_peers as peers
import torch
from _gg_models import LENGTH, embedded, linears, trained
from _report import RESULTS, ROOT, Row, write_results

from agentopt.weights import gg, tasks

EVERY = 4
"""Positions whose whole distributions are compared: one of so many."""
SAMPLED_ROWS = 24
CELLS = ((128, 0), (128, 1), (256, 0), (256, 1))
"""Width and seed of the trained models."""
RIVALS = ("E4M3 per channel", "e3m4", "rf8", "INT8 per channel")
OURS = "rf8-gg"
SST2 = {"0": "negative", "1": "positive"}
TREC = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}


@dataclass(frozen=True)
class Way:
    """How the weights are stored, and the bits that takes per weight, scales (and books) left out where one per row."""

    name: str
    bits: float
    store: Callable[[torch.Tensor, str], torch.Tensor]


def ways(books: torch.Tensor, columns: dict[str, torch.Tensor]) -> list[Way]:
    def peer(of: peers.Peer) -> Callable[[torch.Tensor, str], torch.Tensor]:
        def store(weight: torch.Tensor, name: str) -> torch.Tensor:
            unit, scale = of(weight)
            return unit * scale

        return store

    def ours(format: Any, books: torch.Tensor | None = None, weighed: bool = False) -> Callable[..., torch.Tensor]:
        def store(weight: torch.Tensor, name: str) -> torch.Tensor:
            column_weight = columns[name] if weighed else None
            return gg.decode(gg.encode(weight, format, books=books, column_weight=column_weight, name=name))

        return store

    return [
        Way(OURS, 8, ours("rf8-gg")),
        Way("INT8 per channel", 8, peer(peers.int8)),
        Way("E4M3 per channel", 8, peer(peers.e4m3)),
        Way("INT8 in blocks of 64", 8.25, peer(lambda weight: peers.int8_groups(weight, 64))),
        Way("e3m4", 8, ours("e3m4")),
        Way("rf8", 8, ours("rf8")),
        Way("rf8-gg, refined and weighed", 8, ours("rf8-gg", books, weighed=True)),
        Way("rf8-gg, refined", 8, ours("rf8-gg", books)),
        Way("bf16", 16, peer(peers.bf16)),
        Way("rf8-strict", 8, ours("rf8-strict")),
    ]


@dataclass
class Text:
    """Rows to measure on, with what the original says of them."""

    rows: list[torch.Tensor]
    losses: list[float]
    logs: list[torch.Tensor]

    @classmethod
    def of(cls, model: Any, rows: Sequence[torch.Tensor]) -> Text:
        found = cls(list(rows), [], [])
        for row in found.rows:
            loss, logs = _read(model, row)
            found.losses.append(loss)
            found.logs.append(logs)
        return found

    def measure(self, model: Any) -> dict[str, list[float]]:
        """Per row: mean loss per token, mean KL to the original, share of the same most likely token."""
        found: dict[str, list[float]] = {"loss": [], "kl": [], "same": []}
        for row, before in zip(self.rows, self.logs, strict=True):
            loss, after = _read(model, row)
            # float64: the divergence is a small difference of large sums.
            old, new = before.double(), after.double()
            found["loss"].append(loss)
            found["kl"].append(float((old.exp() * (old - new)).sum(-1).mean()))
            found["same"].append(float((old.argmax(-1) == new.argmax(-1)).double().mean()))
        return found


@torch.no_grad()
def _read(model: Any, row: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean loss per token, and the log-probabilities at every fourth position."""
    logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
    loss = float(torch.nn.functional.cross_entropy(logits, row[1:]))
    return loss, logits[::EVERY].log_softmax(-1)


@torch.no_grad()
def column_weights(model: Any, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean square of what goes into every column."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        def add(_: Any, given: Any) -> None:
            squares = given[0].float().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears(model).items()]
    for row in rows:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


class Stored:
    """A model whose linear layers are exchanged for what a format makes of them, and put back."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = linears(model)
        self.original = {name: module.weight.data for name, module in self.layers.items()}

    def apply(self, way: Way) -> tuple[float, float]:
        """SQNR over all layers in dB, and CPU seconds."""
        begun = time.process_time()
        signal = noise = 0.0
        for name, module in self.layers.items():
            weight = self.original[name]
            module.weight.data = way.store(weight, name)
            signal += float(weight.double().square().sum())
            noise += float((weight - module.weight.data).double().square().sum())
        return 10 * math.log10(signal / noise), time.process_time() - begun

    def with_way(self, way: Way, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is measured while the layers are exchanged."""
        db, seconds = self.apply(way)
        try:
            return {"sqnr": db, "seconds": seconds, **measure()}
        finally:
            self.restore()

    def restore(self) -> None:
        for name, module in self.layers.items():
            module.weight.data = self.original[name]

    def books(self) -> torch.Tensor:
        """Refined on rows of every layer."""
        samples = [gg.sample_rows(one, SAMPLED_ROWS, seed) for seed, one in enumerate(self.original.values())]
        return gg.refine(gg.default_books(), samples)


# --- the cells, kept as lines ----------------------------------------------------------------------------------------


class Ledger:
    """Finished cells by their key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.cells = {cell["key"]: cell for cell in map(json.loads, lines)}

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.cells:
            self.cells[key] = {"key": key, **make()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.cells[key]) + "\n")
            shown = self.cells[key].get("kl", [])
            print(key, f"KL {statistics.mean(shown):.3e}" if shown else "", flush=True)
        return self.cells[key]


def hotpot(data: Path, tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """Rows of article text, generated prose where the articles are not at hand."""
    from _prose import prose

    path = data / "hotpotqa_dev100_contexts" / "dev_sample100.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        text = "\n\n".join(_strings(found, 200))
    else:
        text = prose(12 * count * length, seed=0)
    ids = tokenizer(text[: 12 * count * length], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return rows[:count]


def _strings(found: Any, least: int) -> Iterator[str]:
    """Whole paragraphs: lists of sentences, joined; questions and titles are too short."""
    if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        text = " ".join(one.strip() for one in found)
        if len(text) >= least:
            yield text
    elif isinstance(found, list | dict):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _strings(one, least)


def classification(data: Path, tokenizer: Any, count: int) -> dict[str, Any]:
    """Encoded rows of both tasks; none where the data is not at hand."""
    folder = data / "classification"
    if not folder.exists():
        print("no classification/ in the data folder: the two tasks are left out")
        return {}
    step = {"sst2": 1821 // count, "trec": 500 // count}
    sst2 = [
        {"text": line[2:].strip(), "label": line[0]}
        for line in (folder / "sst2" / "stsa.binary.test").read_text(encoding="utf-8").splitlines()
    ]
    trec = [
        {"text": line.split(" ", 1)[1].strip(), "label": line.split(":", 1)[0]}
        for line in (folder / "trec" / "test.txt").read_text(encoding="utf-8").splitlines()
    ]
    made = {
        "SST-2": tasks.load_task(sst2[:: max(1, step["sst2"])][:count], prompt="{text}\nIt was {label}", labels=SST2),
        "TREC": tasks.load_task(
            trec[:: max(1, step["trec"])][:count],
            prompt="Question: {text}\nThe answer is a kind of {label}",
            labels=TREC,
        ),
    }
    return {name: task.encode(tokenizer) for name, task in made.items()}


def _answers(model: Any, encoded: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, rows in encoded.items():
        predictions = tasks.evaluate(model, rows)
        found[name] = {"correct": list(predictions.correct), "predicted": list(predictions.predicted)}
    return {"answers": found}


def embedded_cells(ledger: Ledger, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways on the embedded model: the divergences first, then the tasks."""
    rows, held, labelled = (3, 1, 12) if options.quick else (20, 4, 120)
    names = [way.name for way in ways(gg.default_books(), {})]
    keys = ["embedded/fp32", *(f"embedded/{name}" for name in names)]
    missing = [one for key in keys for one in (key, f"{key}/tasks") if one not in ledger.cells]
    if missing and not options.report:
        model, tokenizer = embedded()
        texts = hotpot(options.data, tokenizer, rows + held, 512)
        stored = Stored(model)
        made = ways(stored.books(), column_weights(model, texts[:held]))
        if options.only != "tasks" and any(key in missing for key in keys):
            text = Text.of(model, texts[held:])
            ledger.get("embedded/fp32", lambda: {"loss": text.losses})
            for way in made:
                ledger.get(f"embedded/{way.name}", lambda way=way: stored.with_way(way, lambda: text.measure(model)))
        encoded = classification(options.data, tokenizer, labelled)
        ledger.get("embedded/fp32/tasks", lambda: _answers(model, encoded))
        for way in made:
            key = f"embedded/{way.name}/tasks"
            ledger.get(key, lambda way=way: stored.with_way(way, lambda: _answers(model, encoded)))
    tasked = {key: ledger.cells.get(f"{key}/tasks", {}).get("answers", {}) for key in keys}
    return [ledger.cells[key] | {"tasks": tasked[key]} for key in keys if key in ledger.cells]


def trained_cells(ledger: Ledger, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All ways on every trained model."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = ["fp32", *(way.name for way in ways(gg.default_books(), {}))]
    for width, seed in CELLS[::2] if options.quick else CELLS:
        model = f"width {width}, seed {seed}"
        if not options.report and not all(f"{model}/{name}" in ledger.cells for name in names):
            _trained_model(ledger, model, width, seed, options)
        cells = [ledger.cells[f"{model}/{name}"] for name in names if f"{model}/{name}" in ledger.cells]
        if cells:
            found[model] = cells
    return found


def _trained_model(ledger: Ledger, name: str, width: int, seed: int, options: argparse.Namespace) -> None:
    steps, count = (20, 8) if options.quick else (300, 96)
    model, valid, loss = trained(width, seed, steps, options.data)
    rows = valid[: 2 * count * LENGTH].view(-1, LENGTH)
    stored, text = Stored(model), Text.of(model, rows[:count].unbind())
    ledger.get(f"{name}/fp32", lambda: {"loss": text.losses, "training_loss": loss})
    for way in ways(stored.books(), column_weights(model, rows[count : count + 16].unbind())):
        ledger.get(f"{name}/{way.name}", lambda way=way: stored.with_way(way, lambda: text.measure(model)))


# --- the table -------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], count: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    data = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(data), (count, len(data)), generator=torch.Generator().manual_seed(0))
    means = data[chosen].mean(1).sort().values
    return float(means[int(0.025 * count)]), float(means[int(0.975 * count)])


def rows_of(name: str, cells: Sequence[dict[str, Any]], *, goals: bool) -> list[Row]:
    """The rows of one model."""
    by = {cell["key"].split("/", 1)[1]: cell for cell in cells}
    base = by["fp32"]
    bits = {way.name: way.bits for way in ways(gg.default_books(), {})}
    rows = [_perplexity(name, "fp32", base)]
    mine = statistics.mean(by[OURS]["kl"])
    for way, cell in by.items():
        if "kl" not in cell:
            continue
        mean = statistics.mean(cell["kl"])
        note = f"{bits[way]:g} bits a weight; SQNR {cell['sqnr']:.2f} dB; {cell['seconds']:.0f} CPU s to encode"
        rows.append(Row(f"{name}: {way}: KL", mean, "nats", interval(cell["kl"]), None, OURS, mine, note))
    for way in (*RIVALS, "INT8 in blocks of 64"):
        if way in by:
            paired = [one - other for one, other in zip(by[OURS]["kl"], by[way]["kl"], strict=True)]
            low, high = interval(paired)
            aimed = "<= 0" if goals and way in RIVALS else None
            rows.append(
                Row(
                    f"{name}: KL of rf8-gg minus that of {way}: upper end of the interval",
                    high,
                    "nats",
                    (low, high),
                    aimed,
                    way,
                    statistics.mean(by[way]["kl"]),
                )
            )
    for way, cell in by.items():
        if "kl" in cell:
            rows.append(_perplexity(name, way, cell))
            rows.append(
                Row(f"{name}: {way}: same most likely token", statistics.mean(cell["same"]), "", interval(cell["same"]))
            )
    for way, cell in by.items():
        rows += _task_rows(name, way, cell, base)
    return rows


def _perplexity(name: str, way: str, cell: dict[str, Any]) -> Row:
    low, high = interval(cell["loss"])
    value = math.exp(statistics.mean(cell["loss"]))
    return Row(f"{name}: {way}: perplexity", value, "", (math.exp(low), math.exp(high)))


def _task_rows(name: str, way: str, cell: dict[str, Any], base: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for task, answers in cell.get("tasks", {}).items():
        before = base["tasks"][task]
        change = [new - old for new, old in zip(answers["correct"], before["correct"], strict=True)]
        same = statistics.mean(
            one == other for one, other in zip(answers["predicted"], before["predicted"], strict=True)
        )
        low, high = interval(change)
        note = (
            f"{len(change)} rows; {statistics.mean(change):+.4f} to fp32 ({low:+.4f} to {high:+.4f}); {same:.3f} alike"
        )
        rows.append(
            Row(
                f"{name}: {way}: {task}",
                statistics.mean(answers["correct"]),
                "accuracy",
                interval(answers["correct"]),
                None,
                "fp32",
                statistics.mean(before["correct"]),
                note,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows and steps: shows that everything runs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", choices=("embedded", "tasks", "trained"))
    parser.add_argument(
        "--report", action="store_true", help="the table of the cells that are finished, and no new ones"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("gg_quality.quick.jsonl" if options.quick else "gg_quality.jsonl")
    if options.quick:
        path.unlink(missing_ok=True)
    ledger = Ledger(path)
    rows: list[Row] = []
    if options.only in (None, "trained"):
        for name, cells in trained_cells(ledger, options).items():
            rows += rows_of(name, cells, goals=not options.quick)
    if options.only != "trained":
        rows += rows_of("embedded", embedded_cells(ledger, options), goals=not options.quick)
    write_results("gg_quality", rows, quick=options.quick)


if __name__ == "__main__":
    main()
