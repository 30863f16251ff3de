"""One run of `fold_reasoning.py`: a base, a method, a seed; trained, then tested on every number of distractors."""

from __future__ import annotations

import copy
import functools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from _fold_worlds import FORMAT, World, read_proofwriter, small_model, world

from agentopt.errors import UserError
from agentopt.weights.fold import Folder, FoldScores, FoldTask, train_incontext
from agentopt.weights.fold._codec import Codec
from agentopt.weights.fold._encoding import Encoder, Pick


@dataclass(frozen=True)
class Size:
    """How long everything is."""

    tasks: int = 8000
    pretrain: int = 600
    steps: int = 700
    """Meta-steps of folding."""
    documents: int = 12
    icr_steps: int = 3000
    minutes: float = 6.0
    """Longest training of a reader."""
    test: int = 64
    """Test questions of a cell."""
    tested: tuple[str, ...] = ("clean", "+2", "all", "2x", "4x")
    longer: bool = True
    """Test longer chains too."""
    width: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Variant:
    """A method of the study."""

    method: str
    lr: float
    fold: dict[str, Any] = field(default_factory=dict[str, Any])
    multi_task: bool = True
    times: int = 1
    """Steps of reading, as a multiple."""


class Until:
    """Ends a training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def wanted(self) -> bool:
        """Whether it is time."""
        return time.monotonic() > self.end


def run(name: str, variant: Variant, seed: int, size: Size, data: Path, model: str = "small") -> dict[str, Any]:
    """Train and test; the record of the run."""
    began = time.perf_counter()
    tasks, val, cells, words = _prepared(name, seed, size, data)
    base, tokenizer = _base(model, words, size, seed)
    learned = _pretrained(base, tokenizer, (name, seed, size, variant.multi_task), data) if model == "small" else None
    started = time.perf_counter()
    if variant.method == "fold":
        given = FOLD if model == "small" else PRETRAINED
        record, evaluate = _fold(
            base, tokenizer, tasks, val, replace(variant, fold={**given, **variant.fold}), seed, size
        )
    else:
        record, evaluate = _read(base, tokenizer, tasks, val, variant, seed, size)
    trained = time.perf_counter() - started
    scores = {key: _scored(evaluate, found) for key, found in cells.items()}
    parameters = sum(parameter.numel() for parameter in base.parameters())
    return {
        "lr": variant.lr,
        "scores": scores,
        "pretrain_loss": learned,
        "parameters": parameters,
        "train_s": trained,
        "wall_s": time.perf_counter() - began,
        **record,
    }


Prepared = tuple[list[FoldTask], list[FoldTask], dict[str, list[FoldTask]], Sequence[str]]


@functools.lru_cache(maxsize=1)
def _prepared(name: str, seed: int, size: Size, data: Path) -> Prepared:
    """Training tasks, validation tasks, test tasks by cell, words."""
    if name == "proofwriter":
        return proofwriter(data, size)
    place = world(name)
    tasks, val = place.training(size.tasks, seed), place.training(64, 900 + seed, 1)
    return tasks, val, _cells(place, size, seed), place.words


_BASES: dict[tuple[str, int, Size, bool], tuple[dict[str, Any], float]] = {}


def _pretrained(base: Any, tokenizer: Any, key: tuple[str, int, Size, bool], data: Path) -> float:
    """Pre-train a base, once for all methods that start from it; its last loss."""
    name, seed, size, multi_task = key
    if key not in _BASES:
        tasks = _prepared(name, seed, size, data)[0]
        learned = pretrain(base, tokenizer, tasks, size.pretrain, seed, multi_task=multi_task)
        _BASES.clear()
        _BASES[key] = copy.deepcopy(base.state_dict()), learned
    state, learned = _BASES[key]
    base.load_state_dict(state)
    return learned


def _base(model: str, words: Sequence[str], size: Size, seed: int) -> tuple[Any, Any]:
    if model == "small":
        return small_model(words, width=size.width, layers=size.layers, seed=seed)
    from agentopt.weights import load

    return load.model(model)


def _cells(place: World, size: Size, seed: int) -> dict[str, list[FoldTask]]:
    """Test tasks: trained depths with every number of distractors, longer ones clean and with all."""
    found: dict[str, list[FoldTask]] = {}
    for name, count in place.distractors().items():
        for depth in place.tested if name in size.tested else ():
            if depth <= place.trained[1] or (size.longer and name in ("clean", "all")):
                try:
                    found[f"{name}|{depth}"] = place.test(size.test, seed, depth, count)
                except UserError as error:
                    print(f"{place.name}: no test of {name} at {depth}: {error}", flush=True)
    return found


def proofwriter(data: Path, size: Size) -> Prepared:
    """Trained on the first thousand of its train file, tested on its dev file; a tenth of the former chooses."""
    train = read_proofwriter(data / "proofwriter" / "logiclm_train_first1000_owa_d5.json")
    test = read_proofwriter(data / "proofwriter" / "logiclm_dev_600_owa_d5.json")[: size.test * 10]
    words = sorted({word for task in [*train, *test] for text in _texts(task) for word in text.split()})
    return train[:900], train[900:], {"all|0": test}, [*words, ".", "?", ":", "so:", "true", "false"]


def _texts(task: FoldTask) -> list[str]:
    return [*task.facts, *(question.text for question in task.questions)]


def _scored(evaluate: Any, tasks: list[FoldTask]) -> list[float | None]:
    """Accuracy, exact recall, questions."""
    found: FoldScores = evaluate(tasks)
    return [found.accuracy, found.recall_exact, len(found)]


def pretrain(
    model: Any, tokenizer: Any, tasks: Sequence[FoldTask], steps: int, seed: int, *, multi_task: bool = True
) -> float:
    """Teach a base the language: single statements, and questions with proof and answer, no facts in front of them.

    It learns how a proof goes on and what answer it has, but nothing that a question could be answered with.
    """
    import torch

    encoder = Encoder(Codec(tokenizer, FORMAT, multi_task=multi_task), 64)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    draw, last = random.Random(seed), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps)
        part = draw.sample(list(tasks), 24)
        asked = encoder.questions([Pick(task, (), tuple(range(len(task.questions)))) for task in part]).rows
        loss = torch.zeros(())
        for rows in (asked, encoder.fold_rows([encoder.facts(task.facts) for task in part])):
            ids, weight = rows.ids.flatten(0, 1), rows.weight.flatten(0, 1)[:, 1:]
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = loss + (nll.view(weight.shape) * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = float(loss.detach())
    return last


FOLD: dict[str, Any] = {
    "adapts": "lora",
    "trains": "all",
    "rank": 16,
    "inner_steps": 3,
    "unroll": 2,
    "lr": 0.07,
    "sum_over": "root",
}
PRETRAINED: dict[str, Any] = {"rank": 16, "inner_steps": 4, "unroll": 2, "layers": 8, "sum_over": "root"}
"""For a base that knows its language: frozen, as in PERK."""


def _fold(
    base: Any, tokenizer: Any, tasks: Any, val: Any, variant: Variant, seed: int, size: Size
) -> tuple[dict[str, Any], Any]:
    folder = Folder(
        base,
        tokenizer,
        format=FORMAT,
        multi_task=variant.multi_task,
        row_tokens=64,
        checkpoint=model_is_large(base),
        seed=seed,
        **variant.fold,
    )
    result = folder.meta_train(
        tasks,
        val=val,
        steps=size.steps,
        lr=variant.lr,
        rates_lr=10 * variant.lr,
        documents=size.documents,
        questions=3,
        warmup=min(30, size.steps // 4),
        eval_every=max(1, size.steps // 4),
        eval_tasks=48,
        seed=seed,
        on_event=_say,
    )
    curve = [[point["step"], point["accuracy"], point["recall_exact"], point["loss"]] for point in result.curve]
    record = {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stop_reason,
        "val": result.validation["accuracy"],
        "val_loss": result.validation["loss"],
        "curve": curve,
    }
    return record, lambda found: folder.evaluate(found, documents=24)


def model_is_large(model: Any) -> bool:
    """Whether inner steps are better computed again than kept."""
    return sum(parameter.numel() for parameter in model.parameters()) > 10_000_000


def _say(event: Any) -> None:
    if type(event).__name__ in ("Validated", "Warned"):
        print(str(event)[:160], flush=True)


def _read(
    base: Any, tokenizer: Any, tasks: Any, val: Any, variant: Variant, seed: int, size: Size
) -> tuple[dict[str, Any], Any]:
    result = train_incontext(
        base,
        tokenizer,
        tasks,
        val=val,
        on_point=lambda point: print(str(point)[:160], flush=True),
        stop=Until(60 * size.minutes * variant.times),
        format=FORMAT,
        multi_task=variant.multi_task,
        steps=size.icr_steps * variant.times,
        lr=variant.lr,
        documents=16,
        questions=2,
        warmup=min(30, size.icr_steps // 4),
        eval_every=min(500, size.icr_steps),
        eval_tasks=48,
        patience=0,
        schedule="linear",
        seed=seed,
    )
    record = {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped": result.stopped,
        "val": result.best.val_accuracy,
        "val_loss": result.best.val_loss,
        "curve": [[one.step, one.val_accuracy, one.val_recall, one.val_loss] for one in result.curve],
    }
    return record, result.reader.evaluate


def smaller(size: Size, **fields: Any) -> Size:
    """The same with other numbers."""
    return replace(size, **fields)
