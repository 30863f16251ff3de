"""The copies that the engine reads: exactly the bytes that were checked, with nothing beside them.

The engine never gets the user's folder: it could change between the check and the loading, or later, when an engine
reads an adapter again that it had put aside. A copy's name is its content's hash, so that changed weights come from
another path (vLLM keeps what it computed with a path's weights).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from agentopt.errors import RunError, UserError
from agentopt.serving.adapters._check import AdapterFacts
from agentopt.serving.adapters._config import CONFIG, LARGEST_CONFIG, WEIGHTS
from agentopt.serving.adapters._contents import read_small

_CHUNK = 1 << 20
_COPY = re.compile(r"\.?[0-9a-f]{32}")


class Staging:
    """A folder of copies; those that lie in it from an earlier server are removed.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            if folder.is_dir():
                for old in folder.iterdir():
                    if _COPY.fullmatch(old.name):  # a run folder may hold a user's own folder of this name
                        shutil.rmtree(old, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror or error}); give another --run-dir.") from None

    def path(self, facts: AdapterFacts) -> Path:
        """Where the copy of an adapter is."""
        return self.folder / facts.digest[:32]

    def put(self, facts: AdapterFacts) -> Path:
        """Copy an adapter that was checked.

        Raises:
            UserError: it is not what was checked any more.
            RunError: it cannot be written.
        """
        path = self.path(facts)
        if (path / CONFIG).is_file():
            return path
        fresh = self.folder / f".{facts.digest[:32]}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            self._copy(facts, fresh)
            os.replace(fresh, path)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise RunError(f"{fresh}: the adapter cannot be copied ({error.strerror or error}).") from error
        except UserError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return path

    def drop(self, facts: AdapterFacts) -> None:
        """Remove a copy."""
        shutil.rmtree(self.path(facts), ignore_errors=True)

    def _copy(self, facts: AdapterFacts, out: Path) -> None:
        text = read_small(facts.folder, CONFIG, LARGEST_CONFIG)
        digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
        with (facts.folder / WEIGHTS).open("rb") as source, (out / WEIGHTS).open("xb") as target:
            while part := source.read(_CHUNK):
                digest.update(part)
                target.write(part)
        if digest.hexdigest() != facts.digest:
            raise UserError(f"adapter {str(facts.folder)!r}: it changed while it was copied.")
        config = facts.config.to_dict(list(facts.layers))
        (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
