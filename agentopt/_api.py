"""The public functions, wired from the rooms: `tune`, `evaluate` and `capsule`, as coroutines and as plain calls.

This file knows how the rooms fit together (paths into datasets, a store file, models into roles, the capture endpoint,
the files a run leaves) and nothing of how they work.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentopt import _FOLD_FORM, _folder_lm
from agentopt.errors import RunError
from agentopt.evaluation import (
    Dataset,
    EvaluationOptions,
    EvaluationResult,
    Evaluator,
    MetricSpec,
    Program,
    Source,
    Work,
    check_executor,
    load_dataset,
    load_program,
    open_executor,
    resolve_metric,
)
from agentopt.graph import Candidate, checked_knowledge
from agentopt.models import LM, ModelsConfig, ModelSpec, add_scheme, current_config, use
from agentopt.store import Store

if TYPE_CHECKING:
    from agentopt.capsules import Capsule, CapsuleOptions, Mode, Task, TokenBudget
    from agentopt.capsules import Source as CapsuleSource
    from agentopt.evaluation import EvaluationRow
    from agentopt.optimizers import Optimizer
    from agentopt.search import Budget, Driver, Event, Planner, TuneOptions, TuneResult

T = TypeVar("T")
add_scheme("fold", _folder_lm, _FOLD_FORM)  # programs and command lines that never touch a name of `agentopt.models`
Target = str | Callable[..., Any] | Program
Data = Source | Dataset


async def atune(
    program: Target,
    *,
    train: Data,
    val: Data | None = None,
    test: Data | None = None,
    metric: MetricSpec,
    optimizer: str | Optimizer = "auto",
    driver: str | Driver | Planner = "auto",
    budget: Budget | None = None,
    seed: int = 0,
    resume: str | None = None,
    on_event: Callable[[Event], None] | None = None,
    options: TuneOptions | None = None,
    models: Mapping[str, ModelSpec] | None = None,
    store: Store | str | Path | None = None,
    output_field: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> TuneResult:
    """Tune a program on data; keep only edits that are measured to help; claim once, on the test set.

    Args:
        program: a decorated function, `"file.py:function"`, `"package.module:function"` or a `Program`.
        train: a path (JSONL, CSV, Parquet), `captured[:MODEL]`, an iterable of dicts, or a `Dataset`; proposals are
            made from it. Without `val` it is split 50/25/25 by a seeded content hash.
        val: rows that decide what is kept.
        test: rows for the one claim; looked at once.
        metric: a name (`"exact_match"`, ...), `"module:function"`, a callable or a metric; larger is better.
        optimizer: `"auto"`, a name, names joined by `+`, or an object with `propose(context)`.
        driver: `"auto"`, `"greedy"` or an object with `next(state)`.
        budget: bounds for the whole run, the final test included; None for a default of rollouts.
        seed: every random draw follows from it.
        resume: id of a stored run to continue; nothing already paid for is repeated.
        on_event: called with every typed event, in order.
        options: everything else, see `TuneOptions`.
        models: role to model for this run, over `ao.configure`.
        store: an open store or its path; default `.agentopt/agentopt.db`.
        output_field: the field of the output that the metric reads.
        origin: JSON values kept with the run (the CLI keeps its settings there).

    Raises:
        UserError: bad input, or a budget too small for one proposal.
        RunError: the program fails on every row, or too many iterations in a row failed.
    """
    from agentopt.search import TuneOptions as Options
    from agentopt.search import tune_program

    target = _program(program)
    parts = {
        name: _dataset(data, name, target, store)
        for name, data in (("train", train), ("val", val), ("test", test))
        if data is not None
    }
    options = options or Options()
    resolve_metric(metric, output_field)  # a mistake in it is told before anything is written
    with _opened(store) as opened, _surroundings(opened, models, capture=options.capture) as config:
        result = await tune_program(
            target,
            parts["train"],
            parts.get("val"),
            parts.get("test"),
            metric,
            optimizer=optimizer,
            driver=driver,
            budget=budget,
            seed=seed,
            store=opened,
            resume=resume,
            models=config,
            options=options,
            on_event=on_event,
            output_field=output_field,
            config={"origin": dict(origin or {}), "models": _model_names(config)},
        )
        write_exports(opened, result, parts.get("test"))
        return result


async def aevaluate(
    program: Target,
    dataset: Data,
    metric: MetricSpec,
    *,
    candidate: Candidate | None = None,
    options: EvaluationOptions | None = None,
    models: Mapping[str, ModelSpec] | None = None,
    store: Store | str | Path | None = None,
    output_field: str | None = None,
    capture: bool = True,
    on_row: Callable[[EvaluationRow], None] | None = None,
    executor: str = "local",
    workers: int | None = None,
) -> EvaluationResult:
    """Run a program over a data set and score it.

    Args:
        program: as in `tune`.
        dataset: as `train` in `tune`; used whole.
        metric: as in `tune`.
        candidate: parameter values to use; None for the declared ones.
        options: concurrency, timeout, repeats, seed.
        models: role to model for this evaluation.
        store: where LM replies are cached; default `.agentopt/agentopt.db`.
        output_field: the field of the output that the metric reads.
        capture: serve the loopback endpoint for programs that bring their own client.
        on_row: called with every row as it is done.
        executor: `local`, `ray` or `ray://HOST:PORT`.
        workers: processes of the ray executor; one per CPU of the cluster when None.

    Raises:
        UserError: bad input.
    """
    target = _program(program)
    data = _dataset(dataset, "data", target, store)
    scorer = resolve_metric(metric, output_field)
    check_executor(executor, workers)
    for name, spec in target.parameters.items():
        if spec.kind == "knowledge" and candidate is not None and name in candidate:
            checked_knowledge(spec, candidate[name])  # of other documents: said once, not in every row
    with _opened(store) as opened, _surroundings(opened, models, capture=capture) as config, use(config):
        options = options or EvaluationOptions()
        async with open_executor(executor, workers, Work(target, metric, options, output_field)) as chosen:
            evaluator = Evaluator(target, scorer, options, executor=chosen)
            return await evaluator.evaluate(candidate or Candidate({}), data, on_row=on_row)


def tune(program: Target, **arguments: Any) -> TuneResult:
    """`atune` as a plain call; also works while an event loop is running (then in a worker thread). See `atune`."""
    return _run(lambda: atune(program, **arguments))


def evaluate(program: Target, dataset: Data, metric: MetricSpec, **arguments: Any) -> EvaluationResult:
    """`aevaluate` as a plain call; also works while an event loop is running. See `aevaluate`."""
    return _run(lambda: aevaluate(program, dataset, metric, **arguments))


async def acapsule(
    source: CapsuleSource,
    *,
    budget: TokenBudget,
    keep: Sequence[str] = (),
    task: Task | None = None,
    mode: Mode = "auto",
    query: str | None = None,
    lm: ModelSpec | None = None,
    options: CapsuleOptions | None = None,
) -> Capsule:
    """Make a text or a request shorter, under a hard token budget, with protected spans and a measured gate.

    Args:
        source: the text, or chat messages in OpenAI form (the last user turn stays as it is).
        budget: at most so many tokens of a named tokenizer.
        keep: regular expressions; what they match is never dropped, like template slots, schemas and output formats.
        task: rows, program and metric on which the capsule must be shown not to harm before it is recommended.
        mode: `auto`, `extract`, `rewrite` (needs `lm`) or `trained` (needs `options.trained`).
        query: what the reader will be asked; units that answer it are worth more.
        lm: the model that rewrites: a spec, a client or an LM. With it or a task, replies are cached in the store.
        options: everything else, see `CapsuleOptions`.

    Raises:
        BudgetInfeasible: what must stay is longer than the budget; a budget of its `minimum` works.
        UserError: bad input.
    """
    from agentopt.capsules import CapsuleOptions as Options
    from agentopt.capsules import make_capsule
    from agentopt.models import as_lm

    options = options or Options()
    arguments: dict[str, Any] = {"budget": budget, "keep": keep, "mode": mode, "query": query}
    if lm is None and task is None and options.store is None:
        return await make_capsule(source, options=options, **arguments)
    with _opened(options.store) as opened, _surroundings(opened, None, capture=task is not None) as config, use(config):
        writer = None if lm is None else as_lm(lm, "capsule")
        options = replace(options, store=opened)
        return await make_capsule(source, options=options, task=task, lm=writer, **arguments)


def capsule(source: CapsuleSource, **arguments: Any) -> Capsule:
    """`acapsule` as a plain call; also works while an event loop is running. See `acapsule`."""
    return _run(lambda: acapsule(source, **arguments))


def write_exports(store: Store, result: TuneResult, test: Dataset | None = None) -> Path | None:
    """Write `config.json`, `best.json` and `report.html` of a finished run; None for a store in memory.

    Raises:
        RunError: the folder cannot be written; the run itself is safe in the store.
    """
    from agentopt.observe import write_report

    folder = run_folder(store, result.run_id)
    if folder is None:
        return None
    run = store.run(result.run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result.best.save(folder / "best.json")
        config = json.dumps(run.config if run else {}, indent=2, ensure_ascii=False, default=str)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        write_report(store, result.run_id, folder / "report.html", test=test)
    except OSError as error:
        raise RunError(
            f"{folder}: the run is finished and in the store, but its files could not be written ({error}); "
            f"`agentopt export {result.run_id}` writes the candidate elsewhere."
        ) from error
    return folder


def run_folder(store: Store, run_id: str) -> Path | None:
    """Where a run's exports lie: `runs/<run>/` beside the store's file."""
    return None if store.path == ":memory:" else Path(store.path).parent / "runs" / run_id


def _program(program: Target) -> Program:
    return program if isinstance(program, Program) else load_program(program)


def _dataset(data: Data, name: str, program: Program, store: Store | str | Path | None) -> Dataset:
    if isinstance(data, Dataset):
        return data
    return load_dataset(data, name=name, signature=program.signature, store=store)


@contextmanager
def _opened(store: Store | str | Path | None) -> Generator[Store]:
    if isinstance(store, Store):
        yield store
        return
    with Store.open(store) as opened:
        yield opened


@contextmanager
def _surroundings(store: Store, models: Mapping[str, ModelSpec] | None, *, capture: bool) -> Generator[ModelsConfig]:
    """The models of this run over the process's, replies cached in the store, and the capture endpoint."""
    base = current_config()
    config = ModelsConfig({**base.models, **(models or {})}, replace(base.settings, cache=store))
    if not capture:
        yield config
        return
    from agentopt.models import Capture

    with use(config), Capture():
        yield config


def _model_names(config: ModelsConfig) -> dict[str, str]:
    names: dict[str, str] = {}
    for role, spec in config.models.items():
        if isinstance(spec, str):
            names[role] = spec
        else:
            names[role] = spec.client.name if isinstance(spec, LM) else str(getattr(spec, "name", type(spec).__name__))
    return names or {"agent": "embedded/smollm2-135m-instruct"}


def _run(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end: in this thread, or in a worker thread with this context when a loop runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(start())
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(asyncio.run(start()))
        except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
            failed.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), name="agentopt-run")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
