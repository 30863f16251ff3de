"""A pool of warm workers, one per candidate, in the tier that was asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from agentopt.graph import CodeRunner, Used, active_candidate, chosen_code_runner, use_code_runner
from agentopt.sandbox._limits import Limits
from agentopt.sandbox._runner import WorkerRunner
from agentopt.sandbox._tiers import Tier, resolve_tier


class RunnerPool:
    """A `CodeRunner` with one warm worker per candidate, at most `size` of them; the least recently used one is ended.

    This is what `agentopt` uses by default. Candidates never share a worker, so one candidate's code cannot leave
    something behind for another's.

    Args:
        limits: of each call.
        size: workers alive at the same time.
        tier: a name, a tier or "auto"; None for the variable AGENTOPT_SANDBOX, else "auto". It is tried at the first
            call; when it does not work, that call is refused (SandboxUnavailable), never run in a weaker one.
    """

    def __init__(self, limits: Limits | None = None, size: int = 4, *, tier: str | Tier | None = None) -> None:
        self.limits = limits or Limits()
        self.size = size
        self._wanted = tier
        self._tier: Tier | None = None
        self._runners: OrderedDict[str, WorkerRunner] = OrderedDict()
        self._definitions: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @property
    def tier(self) -> Tier:
        """The tier in force, tried on the first use.

        Raises:
            SandboxUnavailable: the tier asked for does not work here.
        """
        if self._tier is None:
            self._tier = resolve_tier(self._wanted)
        return self._tier

    def _runner(self) -> WorkerRunner:
        tier = self.tier
        candidate = active_candidate()
        key = candidate.hash if candidate is not None else ""
        dropped: list[WorkerRunner] = []
        with self._lock:
            runner = self._runners.get(key)
            if runner is None:
                runner = self._runners[key] = WorkerRunner(self.limits, tier=tier, definitions=self._definitions)
            self._runners.move_to_end(key)
            while len(self._runners) > self.size:
                dropped.append(self._runners.popitem(last=False)[1])
        for old in dropped:
            old.close()  # waits for a call that is running; a later call of that candidate starts a new worker
        return runner

    def compile(self, source: str, name: str, uses: Sequence[Used] = ()) -> str:
        """As `WorkerRunner.compile`, in the active candidate's worker."""
        return self._runner().compile(source, name, uses)

    def call(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """As `WorkerRunner.call`, in the active candidate's worker."""
        return self._runner().call(function_id, args, kwargs)

    async def acall(self, function_id: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """As `WorkerRunner.acall`, in the active candidate's worker."""
        return await self._runner().acall(function_id, args, kwargs)

    def close(self) -> None:
        """End every worker."""
        with self._lock:
            runners, self._runners = list(self._runners.values()), OrderedDict()
        for runner in runners:
            runner.close()

    def __enter__(self) -> RunnerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def sandboxed(tier: str | Tier | None = "auto", *, needed: bool = False) -> Generator[CodeRunner]:
    """Run changed code in a tier inside the block, with a pool that is closed at its end.

    A `use_code_runner` block around it stays in force as long as "auto" (or nothing) is asked for here; so does the
    variable AGENTOPT_SANDBOX.

    Args:
        tier: a name, a tier or "auto".
        needed: changed code will run for sure: refuse now, not at the first call.

    Raises:
        SandboxUnavailable: `needed`, and the tier asked for does not work here.
    """
    wanted = None if tier in ("auto", "") else tier
    chosen = chosen_code_runner()
    if chosen is not None and wanted is None:
        if needed and isinstance(chosen, RunnerPool):
            _ = chosen.tier
        yield chosen
        return
    with RunnerPool(tier=wanted) as pool:
        if needed:
            _ = pool.tier
        with use_code_runner(pool):
            yield pool
