"""One SQLite file that holds everything a run leaves; the only source of truth."""

from __future__ import annotations

from agentopt.store._errors import StoreError
from agentopt.store._forgetting import Forgotten
from agentopt.store._store import DEFAULT_PATH, EventRow, RunRow, Store

__all__ = ["DEFAULT_PATH", "EventRow", "Forgotten", "RunRow", "Store", "StoreError"]
