"""The file that lists which adapters were added while a server ran, so that they are there after its next start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from agentopt.errors import RunError, UserError


@dataclass(frozen=True, slots=True)
class Kept:
    """Names and folders in a JSON file."""

    path: Path

    def read(self) -> dict[str, str]:
        """What it lists; nothing when it is not there.

        Raises:
            UserError: it cannot be read.
        """
        if not self.path.is_file():
            return {}
        try:
            found: Any = json.loads(self.path.read_text(encoding="utf-8"))["adapters"]
            return {str(name): str(folder) for name, folder in cast("dict[str, Any]", found).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); remove it and add the adapters again.") from None

    def write(self, adapters: Mapping[str, Path]) -> None:
        """List these and no others; the file is replaced as a whole.

        Raises:
            RunError: it cannot be written.
        """
        kept = {name: str(folder) for name, folder in adapters.items()}
        try:
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps({"version": 1, "adapters": kept}, indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, self.path)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror or error}).") from error
