"""The content of a model as one hash. Files are hashed once and remembered by size and time of change."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_CHUNK = 1 << 20
_COUNTED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")


def digest(path: Path, memory: Path, tell: Callable[[str, int, int], None]) -> str:
    """Hash of a file, or of all files of a model folder that say something about the model.

    Args:
        path: file or folder.
        memory: folder for what was hashed before.
        tell: called with what is hashed, bytes done, bytes in all.

    Raises:
        OSError: a file cannot be read.
    """
    if path.is_file():
        return _file(path, memory, tell)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if file.is_file() and file.suffix in _COUNTED and not inner.parts[0].startswith("."):
            found.update(f"{inner.as_posix()} {_file(file, memory, tell)}\n".encode())
    return found.hexdigest()


def _file(path: Path, memory: Path, tell: Callable[[str, int, int], None]) -> str:
    stat = path.stat()
    place = str(path.resolve())
    about = {"path": place, "size": stat.st_size, "time": stat.st_mtime_ns, "inode": stat.st_ino}
    kept = memory / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(kept.read_text(encoding="utf-8"))
        if {name: saved[name] for name in about} == about:
            return str(saved["sha256"])
    found, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            found.update(data)
            done += len(data)
            tell(path.name, done, stat.st_size)
    if stat.st_size > _CHUNK:  # a small one is hashed again as quickly as it is looked up
        _keep(kept, json.dumps({**about, "sha256": found.hexdigest()}))
    return found.hexdigest()


def _keep(path: Path, text: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
