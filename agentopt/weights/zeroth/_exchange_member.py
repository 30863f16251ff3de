"""The other ranks of workers that exchange losses: one line each, to rank 0."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from agentopt.errors import RunError, UserError
from agentopt.weights.zeroth import _frames as frames
from agentopt.weights.zeroth._exchange import SocketExchange, WorkerLost, check_open, lost, tell
from agentopt.weights.zeroth._frames import Garbage, Gone, Line

_GRACE_SECONDS = 5.0


class MemberExchange(SocketExchange):
    """A rank other than 0."""

    def __init__(self, rank: int, world: int, address: str, line: Line, timeout: float) -> None:
        """Use `SocketExchange.join`."""
        super().__init__(rank, world, address, timeout)
        self._line = line

    @property
    def sent_bytes(self) -> int:
        """Bytes that this worker has sent, without the network's own headers."""
        return self._line.sent

    @property
    def received_bytes(self) -> int:
        """Bytes that this worker has received."""
        return self._line.received

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's float64 values, in the order of ranks; the same on every worker.

        Raises:
            WorkerLost: a worker died, hung or failed.
        """
        check_open(self._closed)
        self.rounds += 1
        gone = f"worker 0 hung up in exchange {self.rounds}: its process ended"
        # Rank 0 may compute for as long as a worker may, then waits that long for the others, and says who was missing.
        patience = 2 * self._timeout + _GRACE_SECONDS
        try:
            try:
                self._line.send(frames.VALUES, frames.pack_values(self.rounds, values), self._timeout)
            except Gone:
                patience = 1.0  # it may have said why before it hung up
            kind, payload = self._line.wait(patience)
            if kind == frames.FAILED:
                rank, text = frames.unpack_failure(payload)
                raise lost(text, rank)
            if kind != frames.ALL:
                raise Garbage(f"kind {kind}")
            number, everyone = frames.unpack_all(payload, self.world)
            if number != self.rounds:
                raise Garbage(f"exchange {number}")
        except Gone as error:
            raise self._end(gone) from error
        except TimeoutError as error:
            text = f"worker 0 gave no answer within {patience:g} s in exchange {self.rounds}"
            raise self._end(gone if patience == 1.0 else text) from error
        except Garbage as error:
            raise self._end(f"worker 0 sent what does not belong to exchange {self.rounds} ({error})") from error
        except WorkerLost:
            self.close()
            raise
        return everyone

    def _end(self, text: str) -> WorkerLost:
        self.close()
        return lost(text, 0)

    def abort(self, reason: str) -> None:
        """Tell the others why this worker ends, and hang up."""
        if not self._closed:
            tell(self._line, self.rank, reason)
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._closed = True
        self._line.close()


def join(address: str, rank: int, token: str, world: int, timeout: float) -> MemberExchange:
    """See `SocketExchange.join`."""
    if not 1 <= rank < world:
        raise UserError(f"rank: found {rank}, expected 1 to {world - 1} in a world of {world} (rank 0 is the host).")
    line = Line(_connect(address, timeout))
    try:
        line.send(frames.HELLO, frames.pack_greeting(rank, world, token), timeout)
        kind, payload = line.wait(timeout)  # rank 0 listens from its start, and takes workers in once it is ready
    except (Gone, Garbage, TimeoutError) as error:
        line.close()
        raise RunError(f"exchange: what listens at {address} does not answer as rank 0 of a run.") from error
    if kind != frames.WELCOME:
        line.close()
        raise UserError(f"exchange: rank 0 at {address} refused worker {rank}: {payload.decode(errors='replace')}.")
    line.trust()
    return MemberExchange(rank, world, address, line, timeout)


def _connect(address: str, timeout: float) -> socket.socket:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"exchange: found the address {address!r}, expected HOST:PORT of rank 0.")
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            return socket.create_connection((host.strip("[]"), int(port)), timeout=left)
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() + 0.2 > deadline:
                raise RunError(f"exchange: rank 0 does not answer at {address}: {error.strerror or error}.") from error
        time.sleep(0.1)
