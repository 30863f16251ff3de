"""Metrics: how good an output is and, in words an optimizer can use, why it is not better.

A user's metric is `f(output, expected, example) -> float | (float, feedback) | dict[str, float]`, with an optional
`trace=` keyword, sync or async. The named ones are in `NAMES`; an option follows a colon (`numeric:0.01`).
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from agentopt.errors import UserError
from agentopt.evaluation._data import Example
from agentopt.evaluation._loading import import_target
from agentopt.evaluation._rows import Score
from agentopt.evaluation._text import last_number, normalize, token_f1
from agentopt.evaluation._threads import Threads, is_async

if TYPE_CHECKING:
    from agentopt.graph import Trace

_SHOWN = 300  # characters of an output in default feedback
_SCORE_KEYS = ("score", "value")


@runtime_checkable
class Metric(Protocol):
    """Anything with a name that scores one output. `needs_trace = False` saves building the trace."""

    @property
    def name(self) -> str:
        """Shown in reports and errors."""
        ...

    @property
    def needs_expected(self) -> bool:
        """True when an example without an expected answer cannot be scored."""
        ...

    async def __call__(self, output: Any, expected: Any, example: Example, trace: Trace | None) -> Score:
        """The score of `output`; larger is better."""
        ...


MetricSpec = str | Metric | Callable[..., Any]
Measure = Callable[[Any, Any], Score]


@dataclass(frozen=True)
class NamedMetric:
    """A metric of output and expected answer alone."""

    name: str
    measure: Measure
    output_field: str | None = None
    needs_expected: bool = True
    needs_trace: bool = False

    async def __call__(self, output: Any, expected: Any, example: Example, trace: Trace | None) -> Score:
        """The score; never raises for an output of the wrong shape, that is a score of 0 with the reason."""
        found, problem = pick(output, self.output_field)
        return Score(0.0, problem) if problem else self.measure(found, expected)


@dataclass(frozen=True)
class FunctionMetric:
    """A user's function."""

    name: str
    function: Callable[..., Any]
    output_field: str | None = None
    needs_expected: bool = False
    needs_trace: bool = False
    threads: Threads = field(default_factory=Threads, repr=False, compare=False)

    async def __call__(self, output: Any, expected: Any, example: Example, trace: Trace | None) -> Score:
        """The function's score.

        Raises:
            UserError: it returned something that is no score.
        """
        found, problem = pick(output, self.output_field)
        if problem:
            return Score(0.0, problem)
        keywords = {"trace": trace} if self.needs_trace else {}
        if is_async(self.function):
            result = self.function(found, expected, example, **keywords)
        else:  # it may call a model or hang: off the loop, like a program
            result = await self.threads.run(lambda: self.function(found, expected, example, **keywords))
        if inspect.isawaitable(result):
            result = await result
        return as_score(result, self.name)


def pick(output: Any, field: str | None) -> tuple[Any, str | None]:
    """The field of a dict, pydantic or plain object output, or why there is none."""
    if field is None:
        return output, None
    if isinstance(output, Mapping):
        values = cast("Mapping[str, Any]", output)
        if field in values:
            return values[field], None
        return None, f"The output has no field {field!r}; it has {', '.join(map(repr, values)) or 'no fields'}."
    if not isinstance(output, (str, int, float, list, tuple, type(None))) and hasattr(output, field):
        return getattr(output, field), None
    return None, f"The output is {shown(output)}, expected an object with the field {field!r}."


def as_score(result: Any, name: str) -> Score:
    """What a metric returned, as a Score.

    Raises:
        UserError: it is neither a number, (number, feedback), a dict of numbers nor a Score, or not finite.
    """
    if isinstance(result, Score):
        score = result
    elif isinstance(result, Mapping):
        score = _from_mapping(cast("Mapping[str, Any]", result), name)
    elif isinstance(result, tuple) and len(cast("tuple[Any, ...]", result)) == 2:
        value, feedback = cast("tuple[Any, Any]", result)
        score = Score(_number(value, name), None if feedback is None or feedback == "" else str(feedback))
    else:
        score = Score(_number(result, name))
    if not math.isfinite(score.value):
        raise UserError(f"metric {name!r} returned {score.value}; scores are finite numbers, larger is better.")
    return score


def _from_mapping(values: Mapping[str, Any], name: str) -> Score:
    feedback = values.get("feedback")
    numbers = {str(key): _number(value, name) for key, value in values.items() if key != "feedback"}
    if not numbers:
        raise UserError(f"metric {name!r} returned a dict without numbers; expected for example {{'score': 0.5}}.")
    key = next((key for key in _SCORE_KEYS if key in numbers), None)
    value = numbers.pop(key) if key else sum(numbers.values()) / len(numbers)
    return Score(value, None if feedback is None else str(feedback), numbers)


def _number(value: Any, name: str) -> float:
    if isinstance(value, (bool, int, float)):
        return float(value)
    item = getattr(value, "item", None)  # numpy scalars
    if callable(item) and getattr(value, "shape", None) == ():
        return float(cast("Any", item()))
    raise UserError(
        f"metric {name!r} returned {shown(value)}; expected a number, (number, feedback text) or a dict of numbers."
    )


def shown(value: Any) -> str:
    """A value in feedback, cut to a readable length."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"
    return repr(text) if isinstance(value, str) else text


# ---- the named metrics


def _same(output: Any, expected: Any) -> bool:
    if isinstance(output, str) or isinstance(expected, str):
        return _text(output).strip() == _text(expected).strip()
    return bool(output == expected)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return str(value)


def _verdict(right: bool, output: Any, expected: Any, what: str = "") -> Score:
    if right:
        return Score(1.0)
    return Score(0.0, f"Expected {shown(expected)}, but the output is {shown(output)}.{what}")


def _exact(output: Any, expected: Any) -> Score:
    right = _same(output, expected)
    near = not right and isinstance(output, str) and normalize(output) == normalize(_text(expected))
    return _verdict(right, output, expected, " Only the form differs: case, punctuation or articles." if near else "")


def _normalized(output: Any, expected: Any) -> Score:
    return _verdict(normalize(_text(output)) == normalize(_text(expected)), output, expected)


def _contains(output: Any, expected: Any) -> Score:
    wanted = cast("list[Any]", expected) if isinstance(expected, (list, tuple)) else [expected]
    text = normalize(_text(output))
    missing = [item for item in wanted if normalize(_text(item)) not in text]
    if not missing:
        return Score(1.0)
    names = ", ".join(shown(item) for item in missing)
    return Score(0.0, f"The output must contain {names}, but it is {shown(output)}.")


def _f1(output: Any, expected: Any) -> Score:
    value = token_f1(_text(output), _text(expected))
    if value == 1.0:
        return Score(1.0)
    wanted, found = normalize(_text(expected)).split(), normalize(_text(output)).split()
    missing = [word for word in wanted if word not in found]
    extra = [word for word in found if word not in wanted]
    parts = [f"Expected {shown(expected)}, but the output is {shown(output)}."]
    if missing:
        parts.append(f"Missing words: {', '.join(missing[:12])}.")
    if extra:
        parts.append(f"Words too many: {', '.join(extra[:12])}.")
    return Score(value, " ".join(parts))


def _numeric(option: str | None) -> Measure:
    try:
        tolerance = 1e-6 if option is None else float(option)
    except ValueError:
        raise UserError(f"metric 'numeric:{option}': the tolerance is a number, for example numeric:0.01.") from None

    def measure(output: Any, expected: Any) -> Score:
        wanted, found = _as_number(expected), _as_number(output)
        if wanted is None:
            raise UserError(f"metric 'numeric': the expected answer {shown(expected)} holds no number.")
        if found is None:
            return Score(0.0, f"Expected the number {wanted:g}, but the output {shown(output)} holds no number.")
        relative = 1e-6 * abs(wanted) if option is None else 0.0
        if abs(found - wanted) <= max(tolerance, relative):
            return Score(1.0)
        return Score(0.0, f"Expected {wanted:g} (tolerance {tolerance:g}), but the output's number is {found:g}.")

    return measure


def _as_number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    return last_number(_text(value))


def _regex(option: str | None) -> Measure:
    fixed = None if option is None else _pattern(option)

    def measure(output: Any, expected: Any) -> Score:
        pattern = fixed or _pattern(_text(expected))
        if pattern.search(_text(output)):
            return Score(1.0)
        return Score(0.0, f"The output must match the pattern {pattern.pattern!r}, but it is {shown(output)}.")

    return measure


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"metric 'regex': {text!r} is no regular expression ({error}).") from None


def _json_schema(option: str | None) -> Measure:
    try:
        import jsonschema
    except ImportError as error:
        raise UserError(
            "metric 'json_schema' needs jsonschema; install it with `pip install 'agentopt[jsonschema]'`."
        ) from error
    fixed = None if option is None else _schema_file(Path(option))

    def measure(output: Any, expected: Any) -> Score:
        schema = fixed if fixed is not None else expected
        if isinstance(schema, str):
            schema = json.loads(schema)
        value, problem = _json_value(output)
        if problem:
            return Score(0.0, problem)
        try:
            kind = cast("Any", jsonschema).validators.validator_for(schema)
            errors = sorted(kind(schema).iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
        except jsonschema.SchemaError as error:
            raise UserError(f"metric 'json_schema': the schema itself is invalid ({error.message}).") from None
        if not errors:
            return Score(1.0)
        lines = [f"{'/'.join(map(str, error.absolute_path)) or 'the output'}: {error.message}" for error in errors[:5]]
        return Score(0.0, "The output does not fit the schema. " + "; ".join(lines))

    return measure


def _schema_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"metric 'json_schema:{path}': the schema cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"metric 'json_schema:{path}': the schema is no JSON ({error}).") from error


def _json_value(output: Any) -> tuple[Any, str | None]:
    if not isinstance(output, str):
        dump = getattr(output, "model_dump", None)
        return (dump(mode="json") if callable(dump) else output), None
    text = output.strip()
    if text.startswith("```"):  # a fenced block is how models like to answer
        text = text.strip("`").removeprefix("json").strip()
    try:
        return json.loads(text), None
    except ValueError as error:
        return None, f"The output is no JSON ({error}): {shown(output)}."


def _plain(measure: Measure) -> Callable[[str | None], Measure]:
    return lambda option: measure


NAMES: Mapping[str, Callable[[str | None], Measure]] = {
    "exact_match": _plain(_exact),
    "normalized_match": _plain(_normalized),
    "contains": _plain(_contains),
    "f1": _plain(_f1),
    "numeric": _numeric,
    "regex": _regex,
    "json_schema": _json_schema,
}
"""Name to a function that takes the option after the colon."""
_WITH_OPTION = {"numeric": "TOLERANCE", "regex": "PATTERN", "json_schema": "FILE"}


def resolve_metric(spec: MetricSpec, output_field: str | None = None) -> Metric:
    """The metric that `spec` means.

    Args:
        spec: a name (`exact_match`, `normalized_match`, `contains`, `f1`, `numeric[:TOLERANCE]`, `regex[:PATTERN]`,
            `json_schema[:FILE]`), `module:function`, `file.py:function`, a function, a `Judge` or any `Metric`.
        output_field: score this field of dict or object outputs.

    Raises:
        UserError: no such metric (known ones and the closest are named), or a bad option.
    """
    if isinstance(spec, str):
        name, colon, option = spec.partition(":")
        if name in NAMES and (not colon or name in _WITH_OPTION):
            measure = NAMES[name](option if colon else None)
            needs = not (colon and name in ("regex", "json_schema"))
            return NamedMetric(spec, measure, output_field, needs_expected=needs)
        if not colon or name in NAMES:
            raise UserError(_unknown(spec))
        found, shown_name = import_target(spec)
        if not callable(found):
            raise UserError(f"metric {spec!r} is a {type(found).__name__}, expected a function.")
        return _from_object(cast("Callable[..., Any]", found), shown_name, output_field)
    if callable(spec):
        return _from_object(spec, getattr(spec, "__name__", type(spec).__name__), output_field)
    raise UserError(f"metric: found {type(spec).__name__}, expected a name, module:function, a function or a Judge.")


def _from_object(target: Callable[..., Any], name: str, output_field: str | None) -> Metric:
    if hasattr(target, "needs_expected") and hasattr(target, "name"):
        return cast("Metric", target)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return FunctionMetric(name, target, output_field)
    parameters = signature.parameters.values()
    takes_trace = any(item.name == "trace" or item.kind is item.VAR_KEYWORD for item in parameters)
    try:
        signature.bind(None, None, None, **({"trace": None} if takes_trace else {}))
    except TypeError as error:
        raise UserError(
            f"metric {name!r} takes {signature}, expected (output, expected, example), optionally with trace=None "
            f"({error})."
        ) from None
    return FunctionMetric(name, target, output_field, needs_trace=takes_trace)


def _unknown(spec: str) -> str:
    close = difflib.get_close_matches(spec.partition(":")[0], NAMES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown metric {spec!r}; known are {', '.join(NAMES)}, or module:function or file.py:function.{hint}"
