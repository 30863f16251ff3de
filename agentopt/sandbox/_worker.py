"""The worker process: reads requests, one a line, from its standard input, and writes replies to its standard output.

Standard library only, started as a script; nothing of agentopt is imported here. A line is the request's number, a
space and JSON; the reply begins with the same number. The first request holds the settings. Then come
`{"op": "define", "id", "name", "source", "uses"}` and `{"op": "call", "id", "args", "kwargs", "seed", "seconds"}`.
Replies are `{"ok": value}` or `{"error": {"type", "message", "line", "source_line", "trace"}}`.
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import builtins
import dataclasses
import importlib
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from typing import Any, cast

_DATACLASS = "$dataclass"
_ESCAPED = "$dict"
_ATOMS = (str, int, float, bool, type(None))


class Refusal(Exception):
    """Something that the reply names by type and message, without a place in the changed code."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


class Worker:
    """The functions defined so far and the dataclasses they may see."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.functions: dict[str, tuple[Any, str]] = {}
        self.classes: dict[str, type] = {}
        self.modules: frozenset[str] = frozenset(settings["modules"])
        self.max_bytes: int = settings["max_bytes"]

    def define(self, request: dict[str, Any]) -> None:
        """Run the definitions in a fresh namespace and keep the named function."""
        name, source = request["name"], request["source"]
        allowed = set(self.modules)
        namespace: dict[str, Any] = {"__name__": "__changed__", "__builtins__": dict(vars(builtins))}
        for use in request["uses"]:
            self._add(use, namespace, allowed)
        namespace["__builtins__"]["__import__"] = _guarded_import(allowed)
        filename = f"<{name}>"
        tree = ast.parse(source, filename)
        _strip(tree, name)
        exec(_compiled(tree, filename), namespace)  # noqa: S102 - running changed code is what this process is for
        function = namespace.get(name)
        if not inspect.isfunction(function):
            raise Refusal("NameError", f"the code does not define the function {name!r}")
        self.functions[request["id"]] = (function, source)

    def _add(self, use: dict[str, Any], namespace: dict[str, Any], allowed: set[str]) -> None:
        name, kind, content = use["name"], use["kind"], use["content"]
        if kind == "module":
            allowed.add(content.partition(".")[0])
            namespace[name] = importlib.import_module(content)
        elif kind == "dataclass":
            namespace[name] = self._class(content)
        elif kind == "function":
            tree = ast.parse(content, f"<{name}>")
            _strip(tree, name, keep_defaults=True)
            exec(_compiled(tree, f"<{name}>"), namespace)  # noqa: S102 - as above
        else:
            namespace[name] = self.decode(content)

    def _class(self, form: dict[str, Any]) -> type:
        cls = self.classes.get(form["id"])
        if cls is None:
            cls = dataclasses.make_dataclass(form["name"], form["fields"])
            self.classes[form["id"]] = cls
        return cls

    def call(self, request: dict[str, Any]) -> Any:
        """Call a defined function; coroutine functions run on a fresh event loop."""
        function, _ = self.functions[request["id"]]
        random.seed(request["seed"])
        args = [self.decode(value) for value in request["args"]]
        kwargs = {key: self.decode(value) for key, value in request["kwargs"].items()}
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        return self.encode(result, 0)

    def decode(self, value: Any) -> Any:
        """Inverse of the parent's encoding."""
        if isinstance(value, list):
            return [self.decode(item) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        data = cast("dict[str, Any]", value)
        if _ESCAPED in data:
            return {key: self.decode(item) for key, item in data[_ESCAPED]}
        if _DATACLASS in data:
            fields = {key: self.decode(item) for key, item in data["fields"].items()}
            form = {"id": data[_DATACLASS], "name": data[_DATACLASS].rpartition(".")[2], "fields": list(fields)}
            return self._class(form)(**fields)
        return {key: self.decode(item) for key, item in data.items()}

    def encode(self, value: Any, depth: int) -> Any:
        """Turn a result into what crosses back."""
        if depth > 64:
            raise Refusal("TypeError", "the result is nested deeper than 64 levels (or contains itself)")
        kind: type[Any] = type(value)  # pyright: ignore[reportUnknownVariableType]
        if kind in _ATOMS:
            return value
        if kind is list or kind is tuple:
            return [self.encode(item, depth + 1) for item in value]
        if isinstance(value, dict):
            data = cast("dict[object, Any]", value)
            if not all(isinstance(key, str) for key in data):
                raise Refusal("TypeError", "the result has a map whose keys are not all strings; it cannot cross back")
            encoded = {str(key): self.encode(item, depth + 1) for key, item in data.items()}
            return {_ESCAPED: list(encoded.items())} if any(key[:1] == "$" for key in encoded) else encoded
        known = next((name for name, cls in self.classes.items() if cls is kind), None)
        if known is not None:
            names = [field.name for field in dataclasses.fields(value)]
            return {_DATACLASS: known, "fields": {name: self.encode(getattr(value, name), depth + 1) for name in names}}
        if isinstance(value, (list, tuple)):
            return [self.encode(item, depth + 1) for item in cast("list[Any]", value)]
        for plain in (str, int, float):
            if isinstance(value, plain):
                return plain(value)
        raise Refusal(
            "TypeError",
            f"the result holds a {kind.__name__}, which cannot cross back; return JSON or a registered dataclass",
        )

    def answer(self, request: dict[str, Any]) -> str:
        """Do one request and return the reply line."""
        source = request.get("source", "")
        if request["op"] == "call":
            source = self.functions[request["id"]][1]
        try:
            if request["op"] == "define":
                self.define(request)
                reply: dict[str, Any] = {"ok": None}
            else:
                reply = {"ok": self.call(request)}
            line = json.dumps(reply)
            if len(line) > self.max_bytes:
                raise Refusal(
                    "ValueError", f"the result has {len(line):,} bytes; at most {self.max_bytes:,} may cross back"
                )
        except BaseException as error:  # noqa: BLE001 - everything the code raises is its outcome, SystemExit too
            line = json.dumps({"error": _described(error, source)})
        return line


def _guarded_import(allowed: set[str]) -> Any:
    def guarded(
        name: str, globals: Any = None, locals: Any = None, fromlist: tuple[str, ...] = (), level: int = 0
    ) -> Any:
        if level or name.partition(".")[0] not in allowed:
            raise ImportError(f"import of {name!r} is not allowed here; list it in uses=(...) of the original function")
        return builtins.__import__(name, globals, locals, fromlist, level)

    return guarded


def _compiled(tree: ast.Module, filename: str) -> Any:
    # Annotations may name types that exist in the parent only: they are not evaluated.
    return compile(tree, filename, "exec", flags=__future__.annotations.compiler_flag)


def _strip(tree: ast.Module, name: str, *, keep_defaults: bool = False) -> None:
    """Drop what is not evaluated here: the named function's decorators and defaults."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            node.decorator_list = []
            if not keep_defaults:
                nothing = ast.Constant(None, lineno=node.lineno, col_offset=node.col_offset)
                node.args.defaults = [nothing for _ in node.args.defaults]
                node.args.kw_defaults = [None if default is None else nothing for default in node.args.kw_defaults]


def _described(error: BaseException, source: str) -> dict[str, Any]:
    if isinstance(error, Refusal):
        return {"type": error.type, "message": str(error), "line": None, "source_line": "", "trace": ""}
    line = None
    lines = source.splitlines()
    if isinstance(error, SyntaxError):
        line = error.lineno
    entries = traceback.extract_tb(error.__traceback__)
    shown = [entry for entry in entries if entry.filename.startswith("<")]
    if shown:
        line = shown[-1].lineno
    try:
        message = (error.msg if isinstance(error, SyntaxError) else str(error))[:10_000]
    except Exception:  # noqa: BLE001 - a broken __str__ of the changed code's own exception
        message = "(its message cannot be shown)"
    trace = "\n".join(f"line {entry.lineno}, in {entry.name}: {_line(lines, entry.lineno)}" for entry in shown[-20:])
    return {
        "type": type(error).__name__,
        "message": message,
        "line": line,
        "source_line": _line(lines, line),
        "trace": trace,
    }


def _line(lines: list[str], number: int | None) -> str:
    return lines[number - 1].strip() if number is not None and 0 < number <= len(lines) else ""


def _limit(settings: dict[str, Any]) -> None:
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, settings["file_bytes"]), (resource.RLIMIT_NOFILE, 64)]
    if hasattr(resource, "RLIMIT_NPROC"):
        limits.append((resource.RLIMIT_NPROC, 0))  # no child processes and no threads (the superuser is exempt)
    if settings["memory_bytes"] and sys.platform == "linux":
        limits.append((resource.RLIMIT_AS, settings["memory_bytes"]))
    for which, value in limits:
        try:
            _, hard = resource.getrlimit(which)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):
            continue  # a platform without this limit


def _take_pipes() -> tuple[Any, Any]:
    """Move the pipes away from the standard streams, which changed code prints to, and close everything else."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(max(requests, replies, null) + 1, 256)
    os.close(null)
    return os.fdopen(requests, "r", encoding="utf-8", newline="\n"), os.fdopen(
        replies, "w", encoding="utf-8", newline="\n"
    )


def main() -> None:
    """Serve requests until the parent closes its end."""
    reader, writer = _take_pipes()
    number, _, text = reader.readline().partition(" ")
    settings = json.loads(text)
    _limit(settings)
    worker = Worker(settings)
    writer.write(f'{number} {{"ok": {os.getpid()}}}\n')
    writer.flush()
    for line in reader:
        number, _, text = line.partition(" ")
        request = json.loads(text)
        # When the parent is gone, nobody kills a call that never ends: the alarm's default action does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5.0)
        reply = worker.answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        writer.write(f"{number} {reply}\n")
        writer.flush()
    if settings["folder"]:
        shutil.rmtree(settings["folder"], ignore_errors=True)  # the parent is gone without having removed it


if __name__ == "__main__":
    main()
