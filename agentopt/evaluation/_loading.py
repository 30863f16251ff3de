"""Imports a target by name as Python would: its folder on `sys.path`, its module importable under its own name.

What a user's module does wrong while it is imported becomes one sentence with the user's own line.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import linecache
import os
import sys
import traceback
import types
from collections.abc import Iterable
from pathlib import Path

from agentopt.errors import UserError

FORMS = "file.py:function or package.module:function"


def import_target(target: str) -> tuple[object, str]:
    """The object that `file.py:name` or `pkg.mod:name` means, and a short name for it.

    Raises:
        UserError: see `load_program`.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"target {target!r}: expected {FORMS}{_offer(target)}")
    is_file = place.endswith(".py") or os.sep in place
    found: object = _from_file(Path(place)) if is_file else _from_name(place)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UserError(_not_found(place, part, found)) from None
    return found, f"{Path(place).name if place.endswith('.py') else place}:{name}"


def absolute_reference(target: str) -> str:
    """`target` with the path of its file made absolute, so that it means the same from any folder."""
    place, _, name = target.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") or os.sep in place else target


def _offer(target: str) -> str:
    path = Path(target)
    return f"; for example {path.name}:main." if path.suffix == ".py" else "."


def _not_found(place: str, name: str, owner: object) -> str:
    names = sorted(
        key for key, value in vars(owner).items() if not key.startswith("_") and callable(value) and _own(value, owner)
    )
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"{place} has no {name!r}; did you mean {' or '.join(repr(item) for item in close)}?"
    listed = f"it has {', '.join(names[:12])}" if names else "it defines no function"
    return f"{place} has no {name!r}; {listed}."


def _own(value: object, owner: object) -> bool:
    return getattr(value, "__module__", None) == getattr(owner, "__name__", None)


def _from_file(path: Path) -> types.ModuleType:
    if not path.is_file():
        folder = path.parent
        names = [entry.name for entry in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=3)
        hint = f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else "; check the path."
        raise UserError(f"{path}: no such file{hint}")
    full = path.resolve()
    _on_path(str(full.parent))
    name = full.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(full):
        return known
    if known is not None or not name.isidentifier() or name in sys.stdlib_module_names:
        # Another module has the name: the file gets one of its own, which is the same in every process.
        name = f"{name}_{hashlib.sha256(str(full).encode()).hexdigest()[:8]}"
        known = sys.modules.get(name)
        if known is not None:
            return known
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; expected {FORMS}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, (Exception, SystemExit)):
            raise UserError(import_error(str(path), error, str(full.parent))) from error
        raise
    return module


def _from_name(name: str) -> types.ModuleType:
    _on_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (name == error.name or name.startswith(error.name + "."))
        ):
            hint = (
                f" (there is a file {name}.py here: its folder is on the path)" if Path(f"{name}.py").exists() else ""
            )
            raise UserError(
                f"module {name!r} was not found{hint}; expected {FORMS}, seen from {os.getcwd()}."
            ) from None
        raise UserError(import_error(name, error, os.getcwd())) from error


def _on_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_error(what: str, error: BaseException, folder: str) -> str:
    """One sentence for an import that raised, with the last line of the user's own code that took part."""
    if isinstance(error, SyntaxError):
        where, line, source = error.filename or what, error.lineno or 0, (error.text or "").strip()
        return f"{where}:{line}: {type(error).__name__}: {error.msg}{f' in `{source}`' if source else ''}."
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SystemExit):
        text = f"it calls sys.exit({error.code!r}) when imported; put that under `if __name__ == '__main__':`"
    place = user_line(error, folder)
    return f"{what} cannot be imported: {text.rstrip('.')}{f' at {place}' if place else ''}."


def user_line(error: BaseException, folder: str = "") -> str:
    """`file:line: source` of the innermost frame of the user's code in the traceback, or an empty text."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(frame.filename, folder)]
    if not own:
        return ""
    last = own[-1]
    line = last.lineno or 0
    return f"{last.filename}:{line}: {(last.line or linecache.getline(last.filename, line)).strip()}"


_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


def _is_own(file: str, folder: str) -> bool:
    if folder and os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep):
        return "site-packages" not in file
    outside: Iterable[str] = ("site-packages", f"{os.sep}lib{os.sep}python", "<frozen")
    return not file.startswith(_PACKAGE) and not any(part in file for part in outside)
