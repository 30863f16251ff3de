"""Whether a folded adapter's base is the served one: by the hash that the fold recorded.

    hashes = BaseHashes(base, Path(".agentopt/serve/8000"))
    hashes.find("3f2a...")          # which model has this hash; None where none of the known ones

A folder that was prepared here has its hashes written down beside it (`_prepared`). Other weights are hashed only when
the first folded adapter comes, in a process of its own (it needs torch), and what was found is kept in a file: they are
not read again while their files are the same. An adapter belongs to the base when its hash is that of the served
weights in one of the number types in which they can be loaded, or that of a model which the served folder was made
from. That it was, is checked: a quantized folder records what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from agentopt.serving.adapters import _prepared
from agentopt.serving.adapters._base import BaseFacts

RECORD = "base_hashes.json"
"""As `base_hash` writes it."""


class BaseHashes:
    """Hashes of a base and of what it was made from; safe to use from several threads.

    Args:
        base: the served model.
        cache: folder in which they are kept.
        python: an interpreter that has torch, when this one has not.
    """

    def __init__(self, base: BaseFacts, cache: Path, *, python: str | None = None) -> None:
        self.base, self.cache, self.python = base, cache, python or sys.executable
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self._failed: dict[str, str] = {}
        self.reasons: list[str] = []
        """Why some hash is not known."""

    def find(self, wanted: str) -> str | None:
        """Which model has this hash: the served folder's name or an origin's; None where none of the known ones."""
        with self._lock:
            self.reasons = []
            if wanted in self._recorded():
                return f"what {self.base.folder.name} was made from"
            for model in self._models():
                if wanted in self._known(model).values() or self._compute(model, wanted):
                    return model
        return None

    @property
    def sure(self) -> bool:
        """Whether the last `find` that gave None had all hashes of the served folder to compare with."""
        return bool(self._known(str(self.base.folder)))

    def known(self) -> list[str]:
        """All hashes of the served folder that were computed so far."""
        return list(self._known(str(self.base.folder)).values())

    def close(self) -> None:
        """Stop a computation that is running; `find` then gives None."""
        self._closed = True
        running = self._process
        if running is not None:
            running.kill()

    def _models(self) -> list[str]:
        """The served folder and what it may have been made from, each once whatever it is called."""
        found: dict[str, str] = {}
        for model in (str(self.base.folder), *self.base.origins):
            about = _prepared.marks(model)
            found.setdefault(json.dumps(about) if about else model, model)
        return list(found.values())

    def _recorded(self) -> list[str]:
        """Hashes of the model that the folder was made from, as the one who made it or somebody else wrote there."""
        kept = _prepared.read(self.base.folder)
        return [*(kept.made_from.values() if kept is not None else ()), *_carried(self.base.folder)]

    # --- the file ----------------------------------------------------------------------------------------------------

    def _file(self, model: str) -> Path:
        made = "" if model == str(self.base.folder) else _identity(str(self.base.folder))
        key = hashlib.sha256(f"{_identity(model)}\n{made}".encode()).hexdigest()[:24]
        return self.cache / f"base-{key}.json"

    def _known(self, model: str) -> dict[str, str]:
        kept = _prepared.read(self.base.folder)
        if kept is not None and model == str(self.base.folder):
            return dict(kept.own)
        if kept is not None and kept.made_from and kept.files == _prepared.marks(model):
            return dict(kept.made_from)
        try:
            found: Any = json.loads(self._file(model).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {str(kind): str(one) for kind, one in cast("dict[str, Any]", found).items()}

    def _keep(self, model: str, found: dict[str, str]) -> None:
        file = self._file(model)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(found), encoding="utf-8")
            os.replace(fresh, file)
        except OSError as error:
            self.reasons.append(f"{file} cannot be written ({error.strerror or error})")

    # --- the process -------------------------------------------------------------------------------------------------

    def _compute(self, model: str, wanted: str) -> bool:
        """Compute what is not known of a model until the wanted hash is there."""
        found = self._known(model)
        if len(found) > 2:
            return False
        if model not in self._failed:
            for line in self._lines(model, wanted):
                if "hash" in line:
                    found[line["dtype"]] = line["hash"]
                else:
                    self._failed[model] = line.get("why", "")
        self.reasons += [self._failed[model]] if model in self._failed else []
        if found:
            self._keep(model, found)
        return wanted in found.values()

    def _lines(self, model: str, wanted: str) -> Generator[dict[str, str]]:
        if self._closed:
            return
        command = [self.python, "-m", "agentopt.serving.adapters.base_hash", model, "--wanted", wanted]
        if model != str(self.base.folder):
            command += ["--made", str(self.base.folder)]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet
        ) as running:
            self._process = running
            try:
                out, err = running.communicate()
            except BaseException:
                running.kill()
                raise
            finally:
                self._process = None
        lines: list[dict[str, str]] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        yield from lines
        if running.returncode and not self._closed:
            yield {"why": (err.strip().splitlines() or ["the process that hashes the base failed"])[-1]}


def _carried(folder: Path) -> list[str]:
    """Hashes of the model that the folder was made from, which somebody wrote into it."""
    try:
        found: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return [str(one) for one in found["hashes"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _identity(model: str) -> str:
    """Changes when the weights may have changed; cheap."""
    return "\n".join([model, *(f"{name} {size} {changed}" for name, size, changed in _prepared.marks(model))])
