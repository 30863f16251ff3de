"""`tune_program`: wires a program, data, optimizer and store into one search, resumable at every moment."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError, UserError
from agentopt.evaluation import (
    Dataset,
    EvaluationOptions,
    Evaluator,
    Metric,
    Program,
    Work,
    open_executor,
    resolve_metric,
)
from agentopt.graph import Candidate, ParameterSpec, allow_effects
from agentopt.models import LM, ModelsConfig, UnknownModel, resolve, use
from agentopt.optimizers import Optimizer, is_weak, resolve_optimizer
from agentopt.sandbox import sandboxed
from agentopt.search._auto_driver import Facts
from agentopt.search._board import Split
from agentopt.search._budget import Budget
from agentopt.search._data import check_splits, make_splits
from agentopt.search._driver import Driver, Planner, resolve_driver
from agentopt.search._events import Event, RunFinished
from agentopt.search._loop import Search, Setup
from agentopt.search._observed import Observed
from agentopt.search._options import TuneOptions
from agentopt.search._plan import Sizes, default_budget
from agentopt.search._remote import RemoteOptimizer
from agentopt.search._result import TuneResult, make_result
from agentopt.search._resume import EventLog, Replay, check_same
from agentopt.store import Store

DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"


def new_run_id() -> str:
    """A sortable id: date, time, four random hex characters."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


async def tune_program(
    program: Program,
    train: Dataset,
    val: Dataset | None,
    test: Dataset | None,
    metric: Metric | str | Callable[..., Any],
    *,
    optimizer: str | Optimizer = "auto",
    driver: str | Driver | Planner = "auto",
    budget: Budget | None = None,
    seed: int = 0,
    store: Store | None = None,
    run_id: str | None = None,
    resume: str | None = None,
    models: ModelsConfig | None = None,
    options: TuneOptions | None = None,
    on_event: Callable[[Event], None] | None = None,
    config: Mapping[str, Any] | None = None,
    output_field: str | None = None,
) -> TuneResult:
    """Tune a program: search on train and validation, claim on test.

    Args:
        program: what is tuned.
        train: rows that proposals are made and screened on; split into three when `val` is None.
        val: rows that decide.
        test: rows for the one claim.
        metric: larger is better; a name, a callable or a metric.
        optimizer: a name or an object with `propose`.
        driver: "auto", a name of `DRIVER_NAMES`, or an object with `run(lab)` or `next(state)`.
        budget: bounds for the whole run, the final test included; None for a default of rollouts.
        seed: every draw of the run follows from it.
        store: where rows, replies and events go; None for a store in memory, from which nothing can be resumed.
        run_id: the id of a new run; None for a fresh one.
        resume: the id (or a unique beginning) of a stored run to go on with; same program, data, seed and budget.
        models: language models for this run.
        options: further settings.
        on_event: called with every event, in order.
        config: JSON values to keep with the run for whoever shows it later.
        output_field: the field of the output that a metric given by name or as a function reads.

    Raises:
        UserError: bad input, or a budget too small for one proposal.
        RunError: the program fails on every row, or too many iterations in a row failed.
    """
    options = options or TuneOptions()
    chosen = resolve_optimizer(optimizer, template=options.template)
    measure = resolve_metric(metric, output_field)
    splits = make_splits(train, val, test, seed)
    specs = program.tunable(options.tune, options.freeze)
    bound = budget or default_budget(_sizes(splits, options))
    steering, reason = resolve_driver(driver, _facts(specs, _sizes(splits, options), bound, models, options))
    own_store = store is None
    kept = store if store is not None else Store.open(":memory:")
    try:
        baseline = Candidate({name: spec.default for name, spec in specs.items()})
        identity = _identity(program, splits, measure, chosen, steering, bound, seed, options, _start(baseline, specs))
        run = _open_run(kept, run_id, resume, {**(config or {}), **identity})
        if run.finished is not None:
            return run.finished
        events = kept.events(run.id)
        log = EventLog(lambda kind, payload: kept.append_event(run.id, kind, payload), on_event, events)
        async with AsyncExitStack() as stack:
            if models is not None:
                stack.enter_context(use(models))
            if options.allow_effects:
                stack.enter_context(allow_effects())
            stack.enter_context(sandboxed(options.sandbox, needed=_generates_code(specs)))
            lm = _optimizer_lm()
            how = _evaluation_options(options, seed)
            work = Work(program, metric, how, output_field, options.allow_effects, options.sandbox)
            executor = await stack.enter_async_context(open_executor(options.executor, options.workers, work))
            if executor is not None and isinstance(optimizer, str):
                chosen = RemoteOptimizer(optimizer, options.template, chosen, executor)
            evaluator = Evaluator(program, measure, how, store=kept, run_id=run.id, executor=executor)
            search = Search(
                Setup(
                    run_id=run.id,
                    program_name=program.name,
                    specs=specs,
                    source=evaluator if on_event is None else Observed(evaluator, on_event),
                    optimizer=chosen,
                    driver=steering,
                    driver_reason=reason,
                    splits=splits,
                    budget=bound,
                    emit=log.emit,
                    options=options,
                    seed=seed,
                    replay=Replay(events, retry_failures=run.status == FAILED),
                    on_candidate=_candidate_writer(kept, run.id),
                    lm=lm,
                    optimizer_model=_model_name(lm),
                    program_summary=_summary(program),
                    metric_name=measure.name,
                    files="" if kept.path == ":memory:" else str(Path(kept.path).resolve().parent),
                    notices=check_splits(splits),
                )
            )
            return await _finish(search, kept, run.id, program.name, log, options.objectives)
    finally:
        if own_store:
            kept.close()


async def _finish(
    search: Search, store: Store, run_id: str, program: str, log: EventLog, objectives: Sequence[str]
) -> TuneResult:
    status = INTERRUPTED
    try:
        outcome = await search.run()
        result = make_result(outcome, search.board, run_id, program, objectives)
        log.emit(RunFinished(status=outcome.claim.status, stop_reason=outcome.stop_reason, best=outcome.best.hash))
        store.update_run(run_id, status=DONE, summary=result.to_dict())
        status = DONE
        return result
    except AgentoptError as error:
        status = FAILED
        store.update_run(run_id, summary={**_so_far(search), "error": str(error)})
        raise
    except Exception:
        status = FAILED
        raise
    finally:
        if status != DONE:  # also when cancelled or interrupted: the run stays resumable
            store.update_run(run_id, status=status, summary=None if status == FAILED else _so_far(search))
            store.flush()


def _so_far(search: Search) -> dict[str, Any]:
    if len(search.pool) == 0:
        return {}
    best = search.pool.best
    return {
        "best": best.candidate.to_dict(),
        "baseline": search.baseline.to_dict(),
        "validation": {"best": best.score, "baseline": search.board.mean(search.baseline, "validation")},
        "cost": search.ledger.to_dict(),
    }


def _generates_code(specs: Mapping[str, ParameterSpec]) -> bool:
    """Whether optimizers may write code: then the sandbox must hold before anything is paid for."""
    return any(spec.kind in ("code", "tools") for spec in specs.values())


def _sizes(splits: Mapping[Split, Dataset], options: TuneOptions) -> Sizes:
    test = splits.get("test")
    return Sizes(
        train=len(splits["train"]),
        validation=len(splits["validation"]),
        test=0 if test is None else len(test),
        screen=options.screen_size,
        repeats=options.repeats,
    )


def _facts(
    specs: Mapping[str, ParameterSpec], sizes: Sizes, budget: Budget, models: ModelsConfig | None, options: TuneOptions
) -> Facts:
    with use(models) if models is not None else nullcontext():
        lm = _optimizer_lm()
    fixed = sizes.baseline + sizes.claim
    return Facts(
        specs=specs,
        train=sizes.train,
        validation=sizes.validation,
        search=None if budget.rollouts is None else max(0, budget.rollouts - fixed),
        strong=lm is not None and not is_weak(_model_name(lm)),
        objectives=options.objectives,
    )


def _evaluation_options(options: TuneOptions, seed: int) -> EvaluationOptions:
    return EvaluationOptions(
        concurrency=options.concurrency,
        timeout=options.timeout,
        repeats=options.repeats,
        seed=seed,
        keep_traces="never",
        perfect_score=options.perfect_score,
    )


def _identity(
    program: Program,
    splits: Mapping[Split, Dataset],
    metric: Metric,
    optimizer: Optimizer,
    driver: Driver | Planner,
    budget: Budget,
    seed: int,
    options: TuneOptions,
    start: str,
) -> dict[str, Any]:
    given = options.to_dict()
    return {
        "program": program.name,
        "metric": metric.name,
        "optimizer": optimizer.name,
        "driver": driver.name,
        "seed": seed,
        "budget": budget.to_dict(),
        "data": {name: {"name": d.name, "id": d.id, "rows": len(d)} for name, d in splits.items()},
        "options": {name: given[name] for name in TuneOptions.deciding()},
        "baseline": start,
    }


def _start(baseline: Candidate, specs: Mapping[str, ParameterSpec]) -> str:
    """What the run starts from: the declared values, and the documents that are no part of a value."""
    documents = {name: spec.knowledge.hash for name, spec in specs.items() if spec.knowledge is not None}
    return baseline.hash if not documents else Candidate({"": [baseline.hash, documents]}).hash


class _Run:
    """A run row, new or found again."""

    def __init__(self, run_id: str, status: str, finished: TuneResult | None) -> None:
        self.id = run_id
        self.status = status
        self.finished = finished


def _open_run(store: Store, run_id: str | None, resume: str | None, config: dict[str, Any]) -> _Run:
    if resume is None:
        name = run_id or new_run_id()
        store.create_run(name, config)
        return _Run(name, "running", None)
    row = store.run(resume)
    if row is None:
        raise UserError(f"there is no run {resume!r} in {store.path}; `agentopt runs ls` lists the runs")
    names = ("program", "metric", "optimizer", "driver", "seed", "budget", "data", "options", "baseline")
    check_same(row.config, {name: config[name] for name in names}, row.id)
    if row.status == DONE:
        return _Run(row.id, row.status, TuneResult.from_dict(row.summary))
    store.update_run(row.id, status="running")
    return _Run(row.id, row.status, None)


def _candidate_writer(store: Store, run_id: str) -> Callable[[Candidate], None]:
    written: set[str] = set()

    def write(candidate: Candidate) -> None:
        if candidate.hash not in written:
            written.add(candidate.hash)
            store.put_candidate(run_id, candidate.hash, candidate.to_dict())

    return write


def _optimizer_lm() -> LM | None:
    try:
        return resolve("optimizer")
    except UnknownModel:
        raise
    except UserError:
        return None  # LM-free optimizers need none; those that do say so themselves


def _model_name(lm: LM | None) -> str:
    return "" if lm is None else str(getattr(getattr(lm, "client", lm), "name", ""))


def _summary(program: Program) -> str:
    return (getattr(program.target, "__doc__", None) or "").strip()
