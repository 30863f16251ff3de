"""Programs: what is run, with which arguments, and which parameters it is made of.

A program is a target (function, callable object, Module) plus the parameters declared by its module and by the modules
beside it that it uses. It is never copied: candidates are values that its parameters read while it runs.
"""

from __future__ import annotations

import fnmatch
import inspect
import os
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.evaluation._data import Example
from agentopt.evaluation._loading import absolute_reference, import_target
from agentopt.evaluation._threads import Threads, is_async
from agentopt.graph import Handle, Module, Node, Parameter, ParameterSpec, declared_parameters
from agentopt.models._patience import patient


@dataclass
class Program:
    """A target and what is known of it.

    `parameters` are all that the program declares, by name, frozen ones included; `module` is the target's module name.
    """

    target: Callable[..., Any]
    name: str
    parameters: Mapping[str, ParameterSpec]
    signature: inspect.Signature
    module: str
    is_async: bool = False
    """The target is a coroutine function or an async generator function and runs on the event loop."""
    threads: Threads = field(default_factory=Threads, repr=False)
    reference: str | None = None
    """What another process can load it by; None for a program that was given as an object."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter name to declared default."""
        return {name: spec.default for name, spec in self.parameters.items()}

    def tunable(self, tune: Sequence[str] = (), freeze: Sequence[str] = ()) -> dict[str, ParameterSpec]:
        """The parameters an optimizer may change.

        Without `tune`: all that are not frozen (tool text and code are frozen by default). With `tune`: exactly those
        whose name matches one of its globs, frozen or not. `freeze` then takes away.

        Raises:
            UserError: a glob that matches no parameter, no parameter at all, or none left.
        """
        if not self.parameters:
            raise UserError(
                f"{self.name} declares no parameters, so there is nothing to tune; declare one at module level, for "
                "example instruction = ao.prompt('...', name='agent.instruction'), and read it in the program."
            )
        for glob in (*tune, *freeze):
            if not fnmatch.filter(self.parameters, glob):
                raise UserError(f"no parameter matches {glob!r}; {self.name} declares {', '.join(self.parameters)}.")
        chosen = {
            name: spec
            for name, spec in self.parameters.items()
            if (_matches(name, tune) if tune else not spec.frozen) and not _matches(name, freeze)
        }
        if not chosen:
            raise UserError(
                f"nothing is left to tune: {self.name} declares {', '.join(self.parameters)}, all of them frozen; "
                "name some with --tune GLOB or drop a --freeze."
            )
        return chosen

    async def run(self, example: Example, timeout: float | None = None) -> Any:
        """Run the target on one example and return its plain output.

        Coroutines run on the loop, sync functions in a worker thread that carries this context. Generators are
        consumed: pieces of text are joined, other items become a list, and a generator's own return value wins.

        Args:
            example: its inputs are the keyword arguments.
            timeout: seconds. A sync function that is over it cannot be stopped: its thread is left behind
                (`threads.abandoned`) and what it returns is ignored.

        Raises:
            TimeoutError: `timeout` is over.
        """
        with patient(timeout):
            args, kwargs = self._arguments(example)
            if self.is_async:
                result = self.target(*args, **kwargs)
            else:
                result = await self.threads.run(lambda: _consumed(self.target(*args, **kwargs)))
            return _plain(await _awaited(result))
        raise TimeoutError

    def _arguments(self, example: Example) -> tuple[list[Any], dict[str, Any]]:
        kwargs = dict(example.inputs)
        args: list[Any] = []
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY or name not in kwargs:
                break
            args.append(kwargs.pop(name))
        return args, kwargs


def load_program(target: str | Callable[..., Any] | Module | Program) -> Program:
    """Load `file.py:func`, `pkg.mod:func` (also `file.py:obj.method`), a callable or a Module instance.

    Raises:
        UserError: no such file, module or name (close matches are listed), an import that raises (the user's own line
            is shown), or something that cannot be called.
    """
    if isinstance(target, Program):
        return target
    if isinstance(target, str):
        found, name = import_target(target)
    else:
        found, name = target, ""
    if inspect.isclass(found) or not callable(found):
        what = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise UserError(
            f"{name or 'the target'} is {what}, expected a function or a callable object; name a function, or make an "
            "instance at module level and name that."
        )
    function = cast("Callable[..., Any]", found)
    module = _module_of(function)
    if not name:
        name = getattr(function, "__qualname__", None) or type(function).__name__
        name = f"{module}:{name.rpartition('<locals>.')[2]}" if module else name
    specs = _parameters_of(function, module)
    reference = absolute_reference(target) if isinstance(target, str) else None
    return Program(function, name, specs, _signature(function), module, is_async(function), reference=reference)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _module_of(target: object) -> str:
    handle = getattr(target, "__self__", target)
    if isinstance(handle, Handle):  # a pipeline: its class is ours, the module that declares it is the user's
        return handle.spec.module
    owner = target if isinstance(target, (types.FunctionType, types.MethodType)) else None
    if owner is None and hasattr(target, "func"):  # functools.partial
        return _module_of(cast("Any", target).func)
    return getattr(owner if owner is not None else type(target), "__module__", "") or ""


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # some callables in C have none
        return inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_KEYWORD)])


def _parameters_of(target: object, module: str) -> dict[str, ParameterSpec]:
    modules = _modules_used(module)
    names = set(cast("Any", target).parameters()) if isinstance(target, Module) else set[str]()
    found = {name: spec for used in modules for name, spec in declared_parameters(used).items()}
    return {name: spec for name, spec in declared_parameters().items() if name in found or name in names}


def _modules_used(start: str) -> list[str]:
    """The target's module and, through its globals, the modules of the same folder or package that it uses."""
    root = _root(start)
    seen: dict[str, None] = {start: None}
    queue = [start]
    while queue:
        module = sys.modules.get(queue.pop())
        for value in list(vars(module).values()) if module is not None else []:
            name = _origin(value)
            if name and name not in seen and _inside(name, root):
                seen[name] = None
                queue.append(name)
    return list(seen)


def _origin(value: object) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, (Handle, Parameter)):
        return value.spec.module
    if isinstance(value, (types.FunctionType, type)):
        return value.__module__ or ""
    return ""


def _root(module: str) -> str:
    found = sys.modules.get(module.partition(".")[0])
    file = getattr(found, "__file__", None)
    return os.path.dirname(os.path.abspath(file)) + os.sep if file else ""


def _inside(module: str, root: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    if not root or not file:
        return False
    inner = os.path.abspath(file).removeprefix(root)
    return inner != os.path.abspath(file) and "site-packages" not in inner and not module.startswith("agentopt.")


# ---- what a target returns


def _consumed(result: Any) -> Any:
    """Take everything out of a sync generator, in the thread that made it."""
    if not hasattr(result, "__next__") or not hasattr(result, "close"):
        return result
    items: list[Any] = []
    with closing(result):
        while True:
            try:
                items.append(next(result))
            except StopIteration as stop:
                return stop.value if stop.value is not None else _joined(items)


async def _awaited(result: Any) -> Any:
    if hasattr(result, "__anext__"):
        items: list[Any] = []
        async for item in cast("AsyncIterator[Any]", result):
            items.append(item)
        return _joined(items)
    if inspect.isawaitable(result):
        return _consumed(await result)
    return result


def _joined(items: Iterable[Any]) -> Any:
    values = list(items)
    return "".join(values) if values and all(isinstance(item, str) for item in values) else values


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Node) else value
