"""Workers that hold the same weights and exchange nothing but losses: `Alone`, or a star of TCP lines through rank 0.

Every worker measures its own examples at the same variants of the weights and applies the same update, so a step costs
the network two numbers per worker (mean losses) or two per example, whatever the size of the model (the idea of
data-parallel MeZO, arXiv 2305.17333; FedKSeed, arXiv 2312.06353). Rank 0 collects the numbers and sends all of them,
as the same bytes, to everybody: weights stay equal bit for bit, whatever the network does.

    host = SocketExchange.host(world=2, token="...")             # rank 0
    mine = SocketExchange.join(host.address, rank=1, world=2, token="...")

A worker that dies, hangs or reports a failure ends all of them with a `WorkerLost` that names it. The token keeps
strangers out of a run, not eavesdroppers: nothing is encrypted, so across machines use a network that you trust.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _frames as frames
from agentopt.weights.zeroth._frames import Gone, Line
from agentopt.weights.zeroth._types import Exchange

if TYPE_CHECKING:
    from agentopt.weights.zeroth._exchange_host import HostExchange
    from agentopt.weights.zeroth._exchange_member import MemberExchange


class WorkerLost(RunError):
    """A worker of a data-parallel run died, hung or failed; `rank` is its number."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Alone:
    """The exchange of a single worker."""

    rank, world, sent_bytes, received_bytes = 0, 1, 0, 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Its own values."""
        return [[float(value) for value in values]]

    def abort(self, reason: str) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to close."""


class SocketExchange(ABC):
    """One worker of several.

    Attributes:
        rank: this worker's number; rank 0 is the one that the others connect to.
        world: number of workers.
        rounds: exchanges so far.
        address: `HOST:PORT` of rank 0; where it listens on every address, with its machine's name.
    """

    def __init__(self, rank: int, world: int, address: str, timeout: float) -> None:
        self.rank = rank
        self.world = world
        self.address = address
        self.rounds: int = 0
        self._timeout = timeout
        self._closed = False

    @staticmethod
    def host(
        world: int,
        port: int = 0,
        *,
        token: str = "",
        bind: str = "127.0.0.1",
        timeout: float = 600.0,
        listener: socket.socket | None = None,
    ) -> HostExchange:
        """Rank 0: listens at once, takes the others in at the first exchange.

        Args:
            world: number of workers, this one included.
            port: where to listen; 0 takes a free one, see `address`.
            token: what workers must know; one is drawn when it is empty, see `token` of the result.
            bind: address to listen on; the default takes in workers of this machine only.
            timeout: seconds that a worker may take longer than this one for a step, or to join.
            listener: a socket that listens already.

        Raises:
            UserError: `world` is below 2, or nothing can listen there.
        """
        if world < 2:
            raise UserError(f"world: found {world}, expected at least 2 workers; a single one exchanges by Alone().")
        if not 0 <= port <= 65535:
            raise UserError(f"port: found {port}, expected 0 to 65535.")
        if listener is None:
            try:
                family = socket.AF_INET6 if ":" in bind else socket.AF_INET
                listener = socket.create_server((bind, port), family=family, backlog=world + 16)
            except OSError as error:
                raise UserError(f"exchange: cannot listen on {bind}:{port}: {error}.") from error
        from agentopt.weights.zeroth._exchange_host import HostExchange

        return HostExchange(world, listener, token or secrets.token_hex(16), timeout)

    @staticmethod
    def join(address: str, rank: int, token: str, *, world: int, timeout: float = 600.0) -> MemberExchange:
        """Another rank: connects to rank 0, and waits for it where it has not started yet.

        Args:
            address: `HOST:PORT` of rank 0.
            rank: this worker's number, from 1.
            token: as rank 0 has it.
            world: number of workers, rank 0 included.
            timeout: as rank 0 has it.

        Raises:
            UserError: the address is none, or rank 0 refuses this worker: wrong token, rank or world.
            RunError: nobody answers there.
        """
        from agentopt.weights.zeroth._exchange_member import join

        return join(address, rank, token, world, timeout)

    @property
    @abstractmethod
    def sent_bytes(self) -> int:
        """Bytes that this worker has sent, without the network's own headers."""

    @property
    @abstractmethod
    def received_bytes(self) -> int:
        """Bytes that this worker has received."""

    @abstractmethod
    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's float64 values, in the order of ranks; the same on every worker.

        Raises:
            WorkerLost: a worker died, hung or failed.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell the others why this worker ends, and hang up."""

    @abstractmethod
    def close(self) -> None:
        """Hang up."""


def verify(exchange: Exchange, fingerprint: str) -> None:
    """Make sure that all workers hold the same weights; costs 24 bytes up and as much per worker down.

    Raises:
        RunError: a worker's weights differ from those of worker 0.
    """
    digest = blake2b(fingerprint.encode(), digest_size=12).digest()
    halves = [float(int.from_bytes(digest[place : place + 6], "little")) for place in (0, 6)]
    everyone = exchange.gather(halves)  # 48 bits each: exact in float64
    odd = [rank for rank, values in enumerate(everyone) if values != everyone[0]]
    if odd:
        raise RunError(
            f"{workers(odd)}: weights differ from those of worker 0. Workers must begin with the same base, settings, "
            "data order and agentopt, and resume from logs of the same length."
        )


def tell(line: Line, rank: int, text: str) -> None:
    """Say on one connection that worker `rank` failed, if it still listens."""
    with contextlib.suppress(Gone):
        line.send(frames.FAILED, frames.pack_failure(rank, text), 1.0)


def check_open(closed: bool) -> None:
    """Raise RunError when it is closed."""
    if closed:
        raise RunError("exchange: it was closed; make a new one.")


def lost(text: str, rank: int) -> WorkerLost:
    """The error that ends a worker."""
    return WorkerLost(f"{text}; no worker went on (resume from the log).", rank)


def workers(ranks: Sequence[int]) -> str:
    """How a message names them."""
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
