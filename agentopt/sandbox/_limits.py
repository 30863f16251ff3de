"""What one call of changed code may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from agentopt.errors import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use: wall-clock seconds, and bytes of memory, result, file written and temporary folder.

    The process tier cannot bound the folder as a whole, only each file.
    """

    seconds: float = 5.0
    memory_bytes: int = 1 << 30
    result_bytes: int = 4 << 20
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not value > 0:
                raise UserError(f"sandbox limit {limit.name!r}: found {value!r}; expected a number above 0.")
