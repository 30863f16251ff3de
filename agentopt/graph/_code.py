"""Code as a parameter: what of a function may be changed, what a changed body may see, and who runs it.

The user's own body runs in this process. A changed body runs through a `CodeRunner`, which by default is a worker
process (`agentopt.sandbox`). It sees the builtins, the modules of an allow-list and the names in `uses=(...)`.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import symtable
import sys
import textwrap
import threading
import types
import typing
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from types import FrameType
from typing import Any, Literal, Protocol, cast, runtime_checkable

from agentopt.errors import RunError, UserError
from agentopt.graph._crossing import annotation_problem, dataclass_form, encode_crossing, is_registered
from agentopt.graph._parameters import ParameterSpec, declare

# fmt: off
ALLOWED_MODULES = frozenset((
    "abc", "array", "base64", "bisect", "calendar", "cmath", "collections", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "html", "io",
    "itertools", "json", "keyword", "math", "numbers", "operator", "random", "re", "statistics", "string",
    "textwrap", "time", "types", "typing", "unicodedata", "urllib", "uuid", "zoneinfo", "__future__",
))
# fmt: on
"""Standard modules that changed code may import; others must stand in `uses`."""


class CodeError(RunError):
    """Changed code did not compile, raised, ran too long or took its worker down.

    `type` and `detail` are the exception's class name and message, `line` (1-based) and `source_line` the place in the
    changed source. An instance is also an instance of the built-in exception class that the code raised, so
    `except ValueError` around a tool works for a changed body too.
    """

    def __init__(
        self, function: str, type: str, detail: str, *, line: int | None = None, source_line: str = "", trace: str = ""
    ) -> None:
        self.function = function
        self.type = type
        self.detail = detail
        self.line = line
        self.source_line = source_line
        self.trace = trace
        place = f" at line {line} of the changed code" if line is not None else ""
        shown = f": `{source_line}`" if source_line else ""
        super().__init__(
            f"{function}: {type}: {detail}{place}{shown}" if detail else f"{function}: {type}{place}{shown}"
        )


class CodeTimeout(CodeError):
    """Changed code ran longer than its limit and was killed."""


class WorkerDied(CodeError):
    """The worker process ended during the call (memory limit, crash, killed); the next call starts another one."""


@dataclass(frozen=True, slots=True)
class Used:
    """One name that changed code may see.

    `content` is the module's name, the JSON form of the value, the source of the function, or the dataclass's shape.
    """

    name: str
    kind: Literal["module", "value", "function", "dataclass"]
    content: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"name": self.name, "kind": self.kind, "content": self.content}


@runtime_checkable
class CodeRunner(Protocol):
    """Runs changed code. Values are JSON values and registered dataclasses."""

    def compile(self, source: str, name: str, uses: Sequence[Used] = ()) -> str:
        """Check that `source` defines the function `name` and return an id for `call`; CodeError when it does not."""
        ...

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """Call the function and wait; CodeError when it raises, runs too long or takes the worker down."""
        ...

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """Like `call`, without blocking the event loop."""
        ...


# --- which runner ----------------------------------------------------------------------------------------------------

_runner: ContextVar[CodeRunner | None] = ContextVar("agentopt_code_runner", default=None)
_default_factory: Callable[[], CodeRunner] | None = None
_default: CodeRunner | None = None
_default_lock = threading.Lock()


@contextmanager
def use_code_runner(runner: CodeRunner) -> Generator[CodeRunner]:
    """Run changed code through `runner` inside the block, in this thread or task."""
    token = _runner.set(runner)
    try:
        yield runner
    finally:
        _runner.reset(token)


def chosen_code_runner() -> CodeRunner | None:
    """Return the runner of the innermost `use_code_runner` block around the caller; None when there is none."""
    return _runner.get()


def set_default_code_runner(factory: Callable[[], CodeRunner] | None) -> None:
    """Say who runs changed code outside `use_code_runner` blocks; called once, at the first changed call."""
    global _default_factory, _default
    with _default_lock:
        _default_factory = factory
        _default = None


def code_runner() -> CodeRunner:
    """Return the runner that is in force here.

    Raises:
        RunError: none was set, which happens when only `agentopt.graph` was imported.
    """
    global _default
    runner = _runner.get()
    if runner is not None:
        return runner
    with _default_lock:
        if _default is None:
            if _default_factory is None:
                raise RunError(
                    "changed code needs a sandbox and none is set up; "
                    "call agentopt.graph.set_default_code_runner(agentopt.sandbox.RunnerPool)"
                )
            _default = _default_factory()
        return _default


# --- what may be changed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """A function whose body may be changed: its source without decorators, its signature and what it may see."""

    name: str
    source: str
    signature: inspect.Signature
    uses: tuple[Used, ...]
    is_async: bool
    file: str
    line: int

    def problems(self, source: str) -> list[str]:
        """Return what is wrong with `source` as a new body for this function; an empty list when nothing is."""
        return _source_problems(self, source)

    def run(self, source: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the changed function and wait; CodeError when it fails, TypeError when the arguments do not fit."""
        runner = code_runner()
        positional, named = self._bound(args, kwargs)
        return runner.call(runner.compile(source, self.name, self.uses), positional, named)

    async def arun(self, source: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Like `run`, without blocking the event loop."""
        runner = code_runner()
        positional, named = self._bound(args, kwargs)
        return await runner.acall(runner.compile(source, self.name, self.uses), positional, named)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Defaults are values of this process: they are passed along, the worker never evaluates their expressions.
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs


_sources: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()


def describe_code(fn: Callable[..., Any], uses: Sequence[object] = ()) -> CodeUnit:
    """Return what is needed to change the body of `fn`; called at decoration, so that nothing fails at call time.

    Args:
        fn: a plain function or coroutine function, no generator, no method.
        uses: names (or modules, functions and registered dataclasses themselves) that a changed body may see. A name is
            looked up in the function's module and closure; its value must be a module, a function with source, a
            registered dataclass or a JSON value.

    Raises:
        UserError: the source is not available, the function is of another kind, or an argument, the result or one of
            `uses` cannot cross.
    """
    where = f"{fn.__qualname__} ({fn.__code__.co_filename}:{fn.__code__.co_firstlineno})"
    node, source = _definition(fn, where)
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise UserError(f"{where}: the code of a generator cannot be tuned: its results cannot cross one by one.")
    owner = fn.__qualname__.rpartition(".")[0]
    first = next(iter(inspect.signature(fn).parameters), "")
    if owner and not owner.endswith("<locals>") and first in ("self", "cls"):
        raise UserError(f"{where}: the code of a method cannot be tuned, because {first} cannot cross; use a function.")
    for name, annotation in _annotations(fn).items():
        problem = annotation_problem(annotation)
        if problem:
            what = "its result" if name == "return" else f"its argument {name!r}"
            raise UserError(f"{where}: {what} cannot cross into the sandbox: {problem}.")
    return CodeUnit(
        name=node.name,
        source=source,
        signature=inspect.signature(fn),
        uses=tuple(_used(use, fn, where) for use in uses),
        is_async=isinstance(node, ast.AsyncFunctionDef),
        file=fn.__code__.co_filename,
        line=fn.__code__.co_firstlineno,
    )


def declare_code(unit: CodeUnit, name: str, *, frozen: bool = True, frame: FrameType | None = None) -> ParameterSpec:
    """Declare the code of a function as the parameter `name` (say "lookup_order.code") and return its spec."""
    spec = ParameterSpec(
        name,
        "code",
        unit.source,
        constraint_text=f"define {unit.name}{unit.signature}; visible names: {', '.join(_visible(unit)) or 'none'}",
        frozen=frozen,
        check_code=unit.problems,
    )
    return declare(spec, frame if frame is not None else sys._getframe(1))


def code_unit(spec: ParameterSpec) -> CodeUnit | None:
    """The function whose body the parameter `spec` is; None when it is no code parameter."""
    unit = getattr(spec.check_code, "__self__", None)
    return unit if isinstance(unit, CodeUnit) else None


def _annotations(fn: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(fn)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return {}  # names that do not exist yet; values are checked when they cross


def _definition(fn: Callable[..., Any], where: str) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]:
    """Return the `def` and its source, without decorators and indentation."""
    source = _sources.get(fn.__code__)
    if source is None:
        try:
            source = textwrap.dedent(inspect.getsource(fn))
        except (OSError, TypeError):
            raise UserError(f"{where}: its source is not available, so its code cannot be tuned.") from None
        _sources[fn.__code__] = source
    try:
        tree = ast.parse(source)
    except SyntaxError:
        raise UserError(f"{where}: its source cannot be read by itself, so its code cannot be tuned.") from None
    node = tree.body[0] if tree.body else None
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise UserError(f"{where}: only the code of a `def` function can be tuned.")
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return node, "\n".join(lines)


def _used(use: object, fn: Callable[..., Any], where: str) -> Used:
    if isinstance(use, str):
        return describe_use(use, _look_up(use, fn, where), where)
    return describe_use(str(getattr(use, "__name__", "")), use, where)


def describe_use(name: str, value: object, where: str) -> Used:
    """What changed code gets to see under `name`.

    Raises:
        UserError: there is no name, or the value cannot cross; the message begins with `where`.
    """
    if not name:
        raise UserError(
            f"{where}: uses holds a {type(value).__qualname__} without a name; list values by their variable's name."
        )
    name = name.rpartition(".")[2]
    if isinstance(value, types.ModuleType):
        return Used(name, "module", value.__name__)
    if isinstance(value, type) and is_dataclass(value):
        if not is_registered(value):
            raise UserError(f"{where}: uses {name!r}, a dataclass that is not registered; add @ao.register_dataclass.")
        return Used(name, "dataclass", dataclass_form(value))
    plain: Any = cast("object", value)
    inner: Any = inspect.unwrap(plain) if callable(plain) else None
    if isinstance(inner, types.FunctionType):
        return Used(name, "function", _definition(inner, f"{where}: uses {name!r}")[1])
    return Used(name, "value", encode_crossing(plain, f"{where}: uses {name!r}, which"))


def _look_up(name: str, fn: Callable[..., Any], where: str) -> object:
    variables = inspect.getclosurevars(fn)
    namespace = fn.__globals__
    for scope in (variables.nonlocals, namespace):
        if name in scope:
            return scope[name]
    if name in ALLOWED_MODULES or name in sys.modules:
        return sys.modules.get(name) or __import__(name)
    raise UserError(f"{where}: uses names {name!r}, which is not defined there yet; define it above the function.")


def _visible(unit: CodeUnit) -> list[str]:
    return [used.name for used in unit.uses]


def _source_problems(unit: CodeUnit, source: str) -> list[str]:
    try:
        tree = ast.parse(source)
        table = symtable.symtable(source, "<changed code>", "exec")
    except SyntaxError as error:
        shown = f": `{error.text.strip()}`" if error.text else ""
        return [f"line {error.lineno}: {error.msg}{shown}"]
    except (ValueError, RecursionError, MemoryError) as error:
        return [f"is not readable as Python: {error}"]
    defined = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    target = next((node for node in reversed(defined) if node.name == unit.name), None)
    if target is None:
        found = ", ".join(node.name for node in defined) or "no function"
        return [f"must define the function {unit.name!r}; it defines {found}"]
    problems: list[str] = []
    if isinstance(target, ast.AsyncFunctionDef) != unit.is_async:
        problems.append(f"{unit.name} must stay {'async' if unit.is_async else 'a plain def'}")
    if _shape_of_node(target.args) != _shape_of_signature(unit.signature):
        problems.append(f"the signature must stay {unit.name}{unit.signature}")
    if _yields(target):
        problems.append(f"{unit.name} must return its result; it yields")
    problems.extend(_import_problems(tree, unit))
    problems.extend(_name_problems(tree, table, unit, target))
    return problems


def _shape_of_node(arguments: ast.arguments) -> list[tuple[str, str]]:
    shape = [("positional", argument.arg) for argument in arguments.posonlyargs]
    shape += [("either", argument.arg) for argument in arguments.args]
    if arguments.vararg is not None:
        shape.append(("*", arguments.vararg.arg))
    shape += [("keyword", argument.arg) for argument in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        shape.append(("**", arguments.kwarg.arg))
    return shape


def _shape_of_signature(signature: inspect.Signature) -> list[tuple[str, str]]:
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: "positional",
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "either",
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return [(kinds[parameter.kind], parameter.name) for parameter in signature.parameters.values()]


def _yields(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(node))
    return False


def _import_problems(tree: ast.AST, unit: CodeUnit) -> list[str]:
    allowed = ALLOWED_MODULES | {str(used.content).partition(".")[0] for used in unit.uses if used.kind == "module"}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [
            f"line {node.lineno}: imports {name!r}, which is not allowed; list it in uses=(...) of the original"
            for name in names
            if name.partition(".")[0] not in allowed
        ]
    return found


def _name_problems(
    tree: ast.Module,
    table: symtable.SymbolTable,
    unit: CodeUnit,
    target: ast.FunctionDef | ast.AsyncFunctionDef,
) -> list[str]:
    """Return the names that nothing in the worker defines; annotations are left out, they are never evaluated."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known = own | set(_visible(unit)) | set(dir(builtins)) | {"__name__", "__doc__"}
    referenced = _loaded_outside_annotations(tree, target)
    missing: dict[str, None] = {}

    def visit(scope: symtable.SymbolTable) -> None:
        for symbol in scope.get_symbols():
            name = symbol.get_name()
            is_global = scope.get_type() == "module" or symbol.is_global()
            if is_global and symbol.is_referenced() and name not in known and name in referenced:
                missing[name] = None
        for child in scope.get_children():
            visit(child)

    visit(table)
    visible = ", ".join(_visible(unit)) or "none besides the builtins"
    return [f"uses {name!r}, which changed code cannot see; visible: {visible}" for name in missing]


def _loaded_outside_annotations(tree: ast.AST, target: ast.AST) -> set[str]:
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns") or (node is target and field == "decorator_list"):
                continue
            if isinstance(node, ast.arguments) and field in ("defaults", "kw_defaults"):
                continue  # the defaults of the original are passed along
            children = cast("list[object]", value) if isinstance(value, list) else [value]
            pending.extend(child for child in children if isinstance(child, ast.AST))
    return found
