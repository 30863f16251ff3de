"""What a capsule is judged by: examples, the program that reads the prompt, and a metric.

The program takes the prompt's text in one of two ways: it reads an `ao.prompt`, which a candidate then sets, or it is a
function with an argument for it. Without labels (or without a metric) the gate compares answers with the capsule to
answers with the original; that is agreement, never accuracy.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agentopt.errors import UserError
from agentopt.evaluation import (
    Dataset,
    EvaluationOptions,
    Example,
    Metric,
    MetricSpec,
    Program,
    Source,
    content_hash,
    load_dataset,
    load_program,
    resolve_metric,
)
from agentopt.graph import Candidate, ParameterSpec
from agentopt.models import LM, Capture, ModelsConfig, ModelSpec, current_config, use
from agentopt.store import Store

Kind = Literal["accuracy", "agreement"]
AGREEMENT = "normalized_match"
"""How answers are compared when the task has no metric."""
ARGUMENT = "prompt"
"""The argument that takes the prompt when none is named."""
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class TaskOptions:
    """How a task is read and run.

    Raises:
        UserError: a value outside its range.
    """

    inputs: tuple[str, ...] | None = None
    """Columns that are arguments of the program; None for those with their names."""
    label: str | None = None
    """Column with the expected answer; None for expected, label or answer."""
    output_field: str | None = None
    """Field of the output that the metric reads."""
    cluster: str | Callable[[Example], Hashable] | None = None
    """Column (or function of an example) whose equal values make rows one unit, such as the document they come from.
    Rows with equal inputs are one unit anyway."""
    score_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest score of the metric; the margin is a share of it."""
    select_share: float = 0.3
    """Share of the rows on which candidates are compared; the others gate the winner. One candidate needs none."""
    gated: int = 1
    """How many of the best candidates are gated, with Holm's correction; of the accepted the shortest wins."""
    sequential: bool = False
    """Gate block by block and stop as soon as the bets decide: fewer calls for a clear case, less power otherwise."""
    block: int = 32
    """Rows per block of a sequential gate."""
    concurrency: int = 8
    timeout: float | None = 120.0
    """Seconds for one run of the program."""
    repeats: int = 1
    """Runs per example; scores are means over them."""
    models: Mapping[str, ModelSpec] | None = None
    """Role to model while the program runs, over `ao.configure`."""
    capture: bool = True
    """Serve the loopback endpoint, so that the calls of programs with a client of their own are cached and counted."""

    def __post_init__(self) -> None:
        low, high = self.score_range
        if not low < high:
            raise UserError(f"score_range: found {self.score_range}, expected (lowest, highest).")
        if not 0 < self.select_share < 1:
            raise UserError(f"select_share: found {self.select_share}, expected a number between 0 and 1.")
        for name in ("gated", "block", "concurrency", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least 1.")
        if self.sequential and self.gated > 1:
            raise UserError("sequential: only one candidate can be gated block by block; leave `gated` at 1.")


@dataclass(frozen=True)
class Files:
    """Several files whose rows count together."""

    paths: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Examples, a program that reads the prompt, and a metric.

    Args:
        dataset: a path (JSONL, CSV, Parquet), an iterable of dicts or examples, or a `Dataset`.
        program: `"file.py:function"`, `"package.module:function"`, a function or a `Program`. It reads an `ao.prompt`,
            or takes the prompt as an argument.
        metric: as in `ao.evaluate`; None compares answers with those given to the original.
        prompt: name of the `ao.prompt` or of the argument. None takes the prompt parameter whose default is the text
            being compressed, the only prompt parameter, or the argument `prompt`, whichever is there first.
        options: everything else.
    """

    dataset: Source | Files
    program: str | Callable[..., Any] | Program
    metric: MetricSpec | None = None
    prompt: str | None = None
    options: TaskOptions = field(default_factory=TaskOptions)

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> Task:
        """The task that the settings of `agentopt.toml` describe: target, metric, data and how it is run.

        Rows of `train` and `val` count together; those of `test` only when there are no others. `prompt`, `cluster`
        and `sequential` may be among the settings.

        Raises:
            UserError: no target or no data in them.
        """
        if not settings.get("target"):
            raise UserError("the task names no target; add target = 'file.py:function' to agentopt.toml.")
        paths = [settings[name] for name in PARTS[:2] if settings.get(name)] or [settings.get("test")]
        if paths == [None]:
            raise UserError("the task names no data; add train = 'rows.jsonl' (or val, or test) to agentopt.toml.")
        known = {item.name for item in dataclasses.fields(TaskOptions)}
        chosen = {name: value for name, value in settings.items() if name in known and value is not None}
        if "inputs" in chosen:
            chosen["inputs"] = tuple(chosen["inputs"])
        return cls(
            Files(tuple(paths)),
            settings["target"],
            settings.get("metric"),
            settings.get("prompt"),
            TaskOptions(**chosen),
        )

    def open(self, original: str) -> OpenTask:
        """Load the program, the rows and the metric, and find where the prompt goes.

        Raises:
            UserError: any of them cannot be used; the sentence says what to do.
        """
        program = load_program(self.program)
        parameter, argument = _place(program, self.prompt, original)
        signature = program.signature
        if argument is not None:
            rest = [item for name, item in signature.parameters.items() if name != argument]
            signature = signature.replace(parameters=rest)
        dataset = self._rows(signature)
        if not len(dataset):
            raise UserError(f"{dataset.name}: the task has no rows; a gate needs some.")
        metric = None if self.metric is None else resolve_metric(self.metric, self.options.output_field)
        labelled = any(example.expected is not None for example in dataset)
        agreement = metric is None or (metric.needs_expected and not labelled)
        return OpenTask(
            program=program,
            dataset=dataset,
            metric=metric or resolve_metric(AGREEMENT, self.options.output_field),
            kind="agreement" if agreement else "accuracy",
            parameter=parameter,
            argument=argument,
            options=self.options,
        )

    def _rows(self, signature: inspect.Signature) -> Dataset:
        options = self.options

        def read(source: Source) -> Dataset:
            return load_dataset(source, inputs=options.inputs, label=options.label, signature=signature)

        if not isinstance(self.dataset, Files):
            return read(self.dataset)
        parts = [read(path) for path in self.dataset.paths]
        return Dataset("+".join(part.name for part in parts), [example for part in parts for example in part])


@dataclass(frozen=True)
class OpenTask:
    """A task whose parts are loaded."""

    program: Program
    dataset: Dataset
    metric: Metric
    kind: Kind
    parameter: ParameterSpec | None
    argument: str | None
    options: TaskOptions

    def evaluation(self, seed: int) -> EvaluationOptions:
        """How the evaluator runs the rows; no rollout's trace is needed."""
        low, high = self.options.score_range
        return EvaluationOptions(
            concurrency=self.options.concurrency,
            timeout=self.options.timeout,
            repeats=self.options.repeats,
            seed=seed,
            keep_traces="never",
            min_score=low,
            perfect_score=high,
        )

    def with_prompt(self, text: str, rows: Dataset) -> tuple[Candidate, Dataset]:
        """The candidate and the rows that make the program read `text`."""
        if self.parameter is not None:
            same = text == self.parameter.default
            return Candidate() if same else Candidate({self.parameter.name: text}), rows
        name = self.argument or ARGUMENT
        given = [replace(example, inputs={**example.inputs, name: text}) for example in rows]
        return Candidate(), Dataset(rows.name, given)

    def unit(self, example: Example) -> Hashable:
        """What is resampled as a whole with this example."""
        cluster = self.options.cluster
        if cluster is None:
            return content_hash(example.inputs)
        if callable(cluster):
            return cluster(example)
        for place in (example.meta, example.inputs):
            if cluster in place:
                value = place[cluster]
                return value if isinstance(value, (str, int)) else content_hash(value)
        raise UserError(f"cluster: example {example.id} has no column {cluster!r}; it has {_listed(example)}.")

    @contextmanager
    def surroundings(self, store: Store | str | Path | None) -> Generator[ModelsConfig]:
        """The task's models over the process's, replies kept in the store, and the capture endpoint."""
        if store is not None and not isinstance(store, Store):
            with Store.open(store) as opened, self.surroundings(opened) as config:
                yield config
            return
        with self.models(store) as config:
            if not self.options.capture:
                yield config
                return
            with Capture():
                yield config

    @contextmanager
    def models(self, store: Store | None = None) -> Generator[ModelsConfig]:
        """The task's models over the process's, replies kept in `store` where one is given."""
        base = current_config()
        settings = base.settings if store is None else replace(base.settings, cache=store)
        config = ModelsConfig({**base.models, **(self.options.models or {})}, settings)
        with use(config):
            yield config

    def reader(self) -> str:
        """The models that read the prompt, by role."""
        return content_hash({role: _name(spec) for role, spec in current_config().models.items()})

    def source(self) -> str:
        """The program: its name and, where Python can tell, its code."""
        try:
            code = inspect.getsource(self.program.target)
        except (OSError, TypeError):
            code = ""
        return content_hash([self.program.name, code, self.parameter.name if self.parameter else self.argument])


def _place(program: Program, name: str | None, original: str) -> tuple[ParameterSpec | None, str | None]:
    """The parameter or the argument that takes the prompt; one of them is None."""
    prompts = {key: spec for key, spec in program.parameters.items() if spec.kind == "prompt"}
    arguments = [
        key
        for key, item in program.signature.parameters.items()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY, item.POSITIONAL_ONLY)
    ]
    if name is not None:
        if name in prompts:
            return prompts[name], None
        if name in arguments:
            return None, name
        have = _have(prompts, arguments)
        raise UserError(f"prompt: {program.name} has no prompt parameter and no argument {name!r}; it has {have}.")
    same = [spec for spec in prompts.values() if spec.default == original]
    for found in (same, list(prompts.values())):
        if len(found) == 1:
            return found[0], None
    if not prompts and ARGUMENT in arguments:
        return None, ARGUMENT
    raise UserError(
        f"{program.name}: cannot tell where the prompt goes; it has {_have(prompts, arguments)}. Name the ao.prompt or "
        "the argument with Task(..., prompt='NAME')."
    )


def _have(prompts: Mapping[str, ParameterSpec], arguments: Sequence[str]) -> str:
    parameters = f"prompt parameters {', '.join(prompts)}" if prompts else "no prompt parameter"
    return f"{parameters} and " + (f"arguments {', '.join(arguments)}" if arguments else "no arguments")


def _listed(example: Example) -> str:
    return ", ".join([*example.meta, *example.inputs]) or "none"


def _name(spec: ModelSpec) -> str:
    if isinstance(spec, str):
        return spec
    return spec.client.name if isinstance(spec, LM) else str(getattr(spec, "name", type(spec).__name__))
