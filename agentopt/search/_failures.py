"""Iterations that fail in a row: waited out when the cause is transient, else a clear error (gepa#281, gepa#13)."""

from __future__ import annotations

from agentopt.errors import RunError


class Failures:
    """The current streak. A transient failure (rate limit, transport) waits 2, 4, 8 … 60 s, `max_wait` in total."""

    def __init__(self, limit: int, max_wait: float, run_id: str) -> None:
        self._limit = limit
        self._max_wait = max_wait
        self._run_id = run_id
        self._hard = 0
        self._transient = 0
        self._waited = 0.0
        self.replayed = False
        """Whether the latest failure was read back from the store: then there is nothing to wait for."""

    def failed(self, detail: str, *, transient: bool = False) -> float:
        """Count one failed iteration; returns the seconds to wait before the next.

        Raises:
            RunError: the limit is reached.
        """
        if transient:
            self._transient += 1
            pause = min(60.0, 2.0**self._transient)
            if self._waited + pause > self._max_wait:
                raise RunError(
                    f"The optimizer's model did not answer in {self._transient} tries over {self._waited:.0f} s: "
                    f"{detail}. What was found so far is kept; go on later with --resume {self._run_id}."
                )
            self._waited += pause
            return pause
        self._hard += 1
        if self._hard >= self._limit:
            raise RunError(
                f"{self._hard} iterations in a row failed; the last one: {detail}. "
                f"What was found so far is kept; mend the cause and go on with --resume {self._run_id}."
            )
        return 0.0

    def clear(self) -> None:
        """An iteration worked."""
        self._hard = self._transient = 0
        self._waited = 0.0
