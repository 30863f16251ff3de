"""Getting hold of Ray: import it, reach or start a cluster quietly, and leave it as it was found.

A local cluster listens on the loopback address only, sends no usage statistics and has no dashboard. A cluster that
somebody else started (RAY_ADDRESS, ray://host:port, an earlier `ray.init` of this process) is only joined.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import anyio.to_thread

from agentopt.errors import RunError, UserError

_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 60.0
_STORE_BYTES = 128 << 20  # jobs and rows are a few kilobytes; Ray would take 30 % of the machine's memory
_log = logging.getLogger("agentopt.executor")


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray; `ours` when it ends with us."""

    ray: Any
    cpus: int
    ours: bool

    def close(self) -> None:
        """Disconnect, and stop the cluster if it was started here."""
        if self.ours:
            self.ray.shutdown()


async def join(executor: str, workers: int | None) -> Cluster:
    """The cluster that `executor` means; `ray` without RAY_ADDRESS starts one on this machine.

    Raises:
        UserError: Ray is not installed, or the address cannot be reached within a few seconds.
        RunError: a local cluster does not start.
    """
    ray = _import()
    if ray.is_initialized():
        return Cluster(ray, _cpus(ray), ours=False)
    address = executor if executor.startswith("ray://") else os.environ.get("RAY_ADDRESS") or None
    if address is not None:
        await anyio.to_thread.run_sync(_reachable, address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "agentopt"}
    if address is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {
            "address": "local",
            "num_cpus": workers or cores,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = address
    found: list[BaseException | None] = []
    start = _Start(ray, options)
    try:
        with anyio.move_on_after(_JOIN_SECONDS):
            found.append(await anyio.to_thread.run_sync(start.run, abandon_on_cancel=True))
    finally:
        if not found:
            start.abandon()
    if not found:
        raise RunError(f"executor: {address or 'a local Ray'} did not answer within {_JOIN_SECONDS:.0f} s")
    if found[0] is not None:
        what = f"cannot join the Ray cluster at {address}" if address else "Ray does not start on this machine"
        text = " ".join(str(found[0]).split())[:300] or type(found[0]).__name__
        raise (UserError if address else RunError)(f"executor: {what}: {text}")
    return Cluster(ray, _cpus(ray), ours=True)


class _Start:
    """`ray.init`, which cannot be interrupted: a start that nobody waits for any more is undone when it is through."""

    def __init__(self, ray: Any, options: dict[str, Any]) -> None:
        self._ray = ray
        self._options = options
        self._lock = threading.Lock()
        self._started = False
        self._abandoned = False

    def run(self) -> BaseException | None:
        try:
            self._ray.init(**self._options)
        except BaseException as error:  # noqa: BLE001  (told in one sentence by the caller, whatever Ray raises)
            return error
        with self._lock:
            self._started = not self._abandoned
        if not self._started:
            self._ray.shutdown()
        return None

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
        if self._started:
            self._ray.shutdown()


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray hides the accelerators of workers that ask for none, and warns that this will change; keep them visible.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "executor: Ray is not installed; install it with `pip install 'agentopt[ray]'`, or use the local executor."
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    _hush()
    return ray


def _hush() -> None:
    """Ray prints a paragraph to stdout when a worker dies; `--json` promises one object there, so it goes to the log.

    The function has no setting and no public name; where a version of Ray has none of this name, nothing is changed.
    """
    try:
        from ray._private import worker
    except ImportError:
        return
    if hasattr(worker, "print_to_stdstream"):

        def to_log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
            _log.info("%s: %s", data.get("pid"), "\n".join(map(str, data.get("lines", ()))))

        worker.print_to_stdstream = to_log


def _reachable(address: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        UserError: nothing listens there, or the address has no host and port.
    """
    place = address.partition("://")[2] or address
    host, colon, port = place.partition("/")[0].rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not host or not port.isdigit():
        raise UserError(f"executor: found the address {address!r}; expected ray://HOST:PORT (10001 unless changed)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"executor: no Ray cluster answers at {address} ({error.strerror or error}); start one there with "
            "`ray start --head --ray-client-server-port=10001`, or give --executor ray for one on this machine."
        ) from None


def _cpus(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
