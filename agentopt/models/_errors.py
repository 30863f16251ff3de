"""What can go wrong between a request and its reply; every error says who failed, what was found and what to do."""

from __future__ import annotations

from agentopt.errors import RunError, UserError


class LMError(RunError):
    """A language model call that could not be completed.

    `status` is the HTTP status where there was one; `retryable` tells whether the same request may succeed later
    (transport failure, timeout, 429, 5xx); `retry_after` is in seconds; `tries` counts what was spent.
    """

    def __init__(
        self, message: str, *, status: int | None = None, retryable: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable
        self.retry_after = retry_after
        self.tries = 1


class LMTimeout(LMError):
    """No reply within `LMOptions.timeout` seconds."""


class LMRateLimit(LMError):
    """The provider said 429 and went on saying so until the bounded wait was over."""


class LMUnavailable(LMError):
    """The server could not be reached, broke the connection, or answered 5xx."""


class LMRefused(LMError):
    """The provider rejected the request itself (400, 401, 403, 404, content filter): the same request fails again."""


class LMBadReply(LMError):
    """The reply is not what was asked for: no JSON, another shape than `output=`, none of `choices=`."""


class BudgetExhausted(RunError):
    """Raised by a spend guard before a call that the budget no longer covers."""


class UnknownModel(UserError):
    """A model spec that names no reachable model: what was found, the forms that work, what to do."""
