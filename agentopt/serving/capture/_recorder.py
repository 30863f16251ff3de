"""The recorder: the gateway's observer that captures traffic. What it does on the event loop is to put into a queue.

Capture is opt-in, a client may opt out (`exchange.capture`), and of all sessions a share may be captured. An exchange
that does not fit the queue is dropped and counted: a slow disk never slows a request down.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.serving._types import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Exchange
from agentopt.serving.capture._keeper import Keeper
from agentopt.serving.capture._redact import Redaction
from agentopt.serving.capture._sessions import Capturing
from agentopt.store import DEFAULT_PATH, Store

ROUTES = frozenset({CHAT, COMPLETIONS, RESPONSES, MESSAGES})
"""Embeddings and counts of tokens have no reply that one could learn from."""


@dataclass(slots=True)
class Seen:
    """What is remembered of a recent exchange, so that feedback on it can be taken."""

    key: str | None
    asked: str
    """The model name that the client gave; the engine's where it gave none."""
    model: str
    variant: str | None
    stored: bool = False
    """The exchange is in the store, or was until it was deleted."""


def _silent(_: str) -> None:
    pass


class Recorder:
    """Captures exchanges into the store, as traces of one run per server start."""

    def __init__(
        self,
        store: str | Path | None = None,
        *,
        model: str = "",
        redact: Redaction | None = None,
        sample: float = 1.0,
        days: float | None = None,
        limits: Capturing | None = None,
        about: Mapping[str, Any] | None = None,
        on_warning: Callable[[str], None] = _silent,
        on_news: Callable[[str], None] = _silent,
        opener: Callable[[], Store] | None = None,
    ) -> None:
        """A recorder that is not started yet.

        Args:
            store: the store's file; None for AGENTOPT_DB or the default.
            model: what is served; shown in lists of runs.
            redact: what is taken out; None for the defaults.
            sample: the share of sessions (and of exchanges without one) that is captured, above 0 up to 1.
            days: what was captured so long ago is deleted, when it starts and every hour; None: it is kept.
            limits: bounds.
            about: further JSON facts for the run's row.
            on_warning: called, from another thread, with a sentence when the store fails.
            on_news: called, from another thread, when it works again.
            opener: gives the open store; for stores that are not opened by a path.

        Raises:
            UserError: `sample` is no share, or `days` is no time.
        """
        if not 0 < sample <= 1:
            raise UserError(f"the share of traffic to capture is {sample:g}; expected more than 0 and at most 1.")
        if days is not None and not (days > 0 and math.isfinite(days)):
            raise UserError(f"captured exchanges are to be kept for {days:g} days; expected a number above 0.")
        self.limits = limits or Capturing()
        self.redaction = redact or Redaction()
        self.store_path = str(store or os.environ.get("AGENTOPT_DB") or DEFAULT_PATH)
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        self.sample = sample
        self.days = days
        config = {**(about or {}), "kind": "serve", "program": f"serve {model}".strip(), "model": model}
        config |= {"sample": sample, "redacted": self.redaction.names}
        if days is not None:
            config["days"] = days
        self._keeper = Keeper(
            opener or (lambda: Store.open(self.store_path)),
            self.run_id,
            config,
            self.redaction,
            self.limits,
            days=days,
            stored=self._stored,
            warn=on_warning,
            news=on_news,
        )
        self._put_bytes = 0
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    # ---- what the gateway calls

    def wants_reply(self, exchange: Exchange) -> bool:
        """Whether this exchange is captured."""
        if not exchange.capture or exchange.route not in ROUTES:
            return False
        key = None if exchange.key is None else exchange.key.id
        self._seen[exchange.id] = Seen(key, exchange.asked or exchange.model, exchange.model, exchange.variant)
        if len(self._seen) > self.limits.remembered:
            self._seen.popitem(last=False)
        return self._sampled(exchange)

    def ended(self, exchange: Exchange, reply: bytes | None) -> None:
        """Queue it, or drop it and count."""
        if not exchange.capture or exchange.route not in ROUTES or not exchange.sent or not self._sampled(exchange):
            return
        size = exchange.bytes_in + len(reply or b"")
        if size > self.limits.exchange_bytes:
            self._keeper.drop("too large")
        elif (
            self._keeper.queued >= self.limits.queue
            or self._put_bytes - self._keeper.taken_bytes + size > self.limits.queue_bytes
        ):
            self._keeper.drop("queue full")
        else:
            self._put_bytes += size
            self._keeper.put(exchange, reply, size)

    def _sampled(self, exchange: Exchange) -> bool:
        """A session is captured whole or not at all."""
        if self.sample >= 1:
            return True
        of = exchange.id if exchange.session is None else f"{exchange.session}"
        return int.from_bytes(hashlib.sha256(of.encode()).digest()[:6]) < self.sample * 2**48

    def _stored(self, exchange_ids: Sequence[str]) -> None:
        """From the writing thread: these are durable."""
        for exchange_id in exchange_ids:
            seen = self._seen.get(exchange_id)
            if seen is not None:
                seen.stored = True

    # ---- what the server calls

    def start(self) -> None:
        """Open the store and begin.

        Raises:
            UserError: the file is no store of ours, is damaged or cannot be written, or its folder cannot be made. A
                store that is full or locked only warns: it is tried again.
        """
        self._keeper.start()

    def close(self, seconds: float = 10.0) -> int:
        """Write what is queued, for at most so many seconds; gives the number of exchanges that were lost."""
        return self._keeper.close(seconds)

    async def aclose(self, seconds: float = 10.0) -> int:
        """`close`, while the event loop goes on."""
        return await asyncio.to_thread(self.close, seconds)

    async def settled(self, seconds: float = 30.0) -> bool:
        """Wait until everything that came so far is stored; False when it was not in so many seconds."""
        deadline = time.monotonic() + seconds
        while self._keeper.waiting:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    # ---- what others look at

    def seen(self, request_id: str) -> Seen | None:
        """A recent exchange, stored or not; None for one whose client opted out."""
        return self._seen.get(request_id)

    @property
    def store(self) -> Store | None:
        """The open store; None while it fails."""
        return self._keeper.store

    @property
    def captured(self) -> int:
        """Exchanges that are durably stored."""
        return self._keeper.captured

    @property
    def drops(self) -> dict[str, int]:
        """Exchanges that were not captured, by reason: too large, queue full, unreadable."""
        return dict(self._keeper.drops)

    @property
    def dropped(self) -> int:
        """Of all reasons together."""
        return sum(self.drops.values())

    @property
    def queued(self) -> int:
        """Exchanges that are not stored yet."""
        return self._keeper.waiting

    @property
    def trouble(self) -> str | None:
        """Why nothing is stored at the moment; None when all is well."""
        return self._keeper.trouble

    def status(self) -> dict[str, Any]:
        """For the admin side, as JSON."""
        return {
            "run_id": self.run_id,
            "store": self.store_path,
            "captured": self.captured,
            "dropped": self.dropped,
            "drops": self.drops,
            "queued": self.queued,
            "sessions": self._keeper.sessions,
            "sample": self.sample,
            "days": self.days,
            "forgotten": self._keeper.forgotten,
            "redacted": self.redaction.names,
            "trouble": self.trouble,
        }
