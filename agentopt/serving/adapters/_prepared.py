"""Hashes that were written down when a model was prepared: beside its folder, believed while its files are the same.

Whoever converts or quantizes a model has all weights at hand, so the first folded adapter need not wait until a process
has read them again. The file says which files it is about, by name, size and time of change. No torch here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentopt.models._embedded_files import packaged_file

_VERSION = 1
"""Changes when the hashes are computed otherwise: files of another version are not believed."""

Marks = list[list[Any]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a prepared folder. Hashes are by number type.

    Attributes:
        own: of the folder's weights.
        source: what it was made from, as it was called.
        made_from: hashes of that; empty where they were not computed.
        files: `marks` of that.
    """

    own: Mapping[str, str]
    source: str = ""
    made_from: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Marks = field(default_factory=list[list[Any]])


def marks(model: str) -> Marks:
    """Name, size and time of change of a model's files; they change when the weights may have changed. Cheap."""
    path = (packaged_file() if model.startswith("embedded") else None) or Path(model).expanduser()
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    found: Marks = []
    for file in files:
        try:
            about = file.stat()
        except OSError:
            continue
        found.append([file.name, about.st_size, about.st_mtime_ns])
    return found


def read(folder: Path) -> Prepared | None:
    """What was written down of a folder; None where nothing was, or of other files."""
    try:
        found: Any = json.loads(_path(folder).read_text(encoding="utf-8"))
        if found["version"] != _VERSION or found["files"] != marks(str(folder)):
            return None
        made = found["made_from"]
        return Prepared(_hashes(found["hashes"]), str(made["model"]), _hashes(made["hashes"]), made["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write(folder: Path, files: Marks, known: Prepared) -> None:
    """Write it down, in one step.

    Args:
        folder: that was prepared.
        files: its `marks` from before its weights were hashed.
        known: the hashes.

    Raises:
        OSError: it cannot be written.
    """
    made = {"model": known.source, "files": known.files, "hashes": dict(known.made_from)}
    text = json.dumps({"version": _VERSION, "files": files, "hashes": dict(known.own), "made_from": made}, indent=1)
    path = _path(folder)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        fresh.write_text(text + "\n", encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.hashes.json")


def _hashes(found: Any) -> dict[str, str]:
    return {str(kind): str(one) for kind, one in found.items()}
