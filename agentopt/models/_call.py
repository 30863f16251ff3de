"""One call under way: what surrounds it, what it has spent, and its tries."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from agentopt import graph
from agentopt.graph import Usage
from agentopt.models._errors import LMError, LMRateLimit
from agentopt.models._messages import Prompt
from agentopt.models._prices import PriceTable, default_prices
from agentopt.models._protocol import LMOptions, Reply, ReplyCache, Request
from agentopt.models._retry import Clock, RetryPolicy, SystemClock
from agentopt.models._structured import Output
from agentopt.models._throttle import ThrottleTable

spend_guard: ContextVar[Callable[[Request], None] | None] = ContextVar("agentopt_spend_guard", default=None)
"""Called before each try that is sent to a client (never for cached replies); raises BudgetExhausted to forbid it."""

reply_watch: ContextVar[Callable[[Request, Reply], None] | None] = ContextVar("agentopt_reply_watch", default=None)
"""Called after each reply, cached ones included (they carry `saved_usage` and `saved_cost`)."""


@dataclass(slots=True)
class Call:
    """One `complete` under way."""

    request: Request
    prompt: Prompt
    output: Output | None
    usage: Usage = field(default_factory=Usage)
    cost: float | None = 0.0

    def add(self, usage: Usage, cost: float | None) -> None:
        """Count towards this call's record and, at once, towards every meter of the context."""
        self.usage = self.usage + usage
        self.cost = None if cost is None or self.cost is None else self.cost + cost
        graph.meter_add(usage, cost)


@dataclass(frozen=True, slots=True)
class LMSettings:
    """What surrounds a client; None means the process's shared or default one."""

    cache: ReplyCache | None = None
    options: LMOptions = field(default_factory=LMOptions)
    """Used by calls that give none."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    throttle: ThrottleTable | None = None
    prices: PriceTable | None = None
    clock: Clock | None = None


class Attempts:
    """The tries of one request: guard before, count after, pause between."""

    def __init__(self, settings: LMSettings, call: Call, request: Request) -> None:
        self._settings = settings
        self._call = call
        self._request = request
        self._tries = 0
        self._failures = 0
        self._waited = 0.0

    def begin(self) -> None:
        """Ask the spend guard, count the try."""
        guard = spend_guard.get()
        if guard is not None:
            guard(self._request)
        self._tries += 1

    async def failed(self, error: LMError) -> None:
        """Wait until the next try, or raise `error` when there is none."""
        self._call.add(Usage(tries=1), 0.0)
        self._failures += not isinstance(error, LMRateLimit)
        pause = self._settings.retry.pause(
            error, failures=self._failures, tries=self._tries, waited=self._waited, key=self._request.key()
        )
        if pause is None:
            error.tries = self._tries
            if self._tries > 1:
                error.args = (f"{error} (after {self._tries} tries and {self._waited:.0f} s of waiting)",)
            raise error
        self._waited += pause
        await (self._settings.clock or SystemClock()).sleep(pause)

    def succeeded(self, reply: Reply) -> Reply:
        """The reply with its price, counted."""
        cost = reply.cost
        if cost is None:
            cost = (self._settings.prices or default_prices()).cost(self._request.model, reply.usage)
            reply = replace(reply, cost=cost)
        self._call.add(reply.usage, cost)
        return reply
