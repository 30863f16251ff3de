"""Data-parallel workers as actors of a Ray cluster: functions and exchange as in `_executor`, on more machines."""

from __future__ import annotations

import importlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import anyio.to_thread

from agentopt.errors import UserError
from agentopt.evaluation._ray_cluster import Cluster, join
from agentopt.models._background import submit
from agentopt.weights.zeroth import _worker
from agentopt.weights.zeroth._executor import GRACE_SECONDS, WorkerResult, check, import_path, results

_POLL_SECONDS = 0.5


class Actor:
    """One worker; rank 0 listens for the others on its node's address."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, world: int) -> str:
        """Open a port here: `HOST:PORT`."""
        ray: Any = importlib.import_module("ray")
        host = str(ray.util.get_node_ip_address())
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=world + 16)
        port = self._listener.getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def run(self, job: str) -> str:
        """Do the job; result or error as JSON."""
        return json.dumps(_worker.run(json.loads(job), self._listener))


def run_ray(
    target: str,
    spec: Mapping[str, Any],
    world: int,
    *,
    executor: str = "ray",
    gpus: float = 0.0,
    timeout: float = 600.0,
) -> list[WorkerResult]:
    """Run `target(spec, exchange)` in `world` Ray actors; the results in the order of ranks.

    Losses go over TCP between the actors' nodes, unencrypted: use a network that you trust.

    Args:
        target: `module:function`, importable on the nodes.
        spec: what the function is given, the same for all; JSON.
        world: number of workers, one CPU each.
        executor: `"ray"` for RAY_ADDRESS or a cluster on this machine, or `"ray://HOST:PORT"`.
        gpus: GPUs per worker.
        timeout: seconds by which one worker may lag behind another before the run counts as hung.

    Raises:
        UserError: Ray is not installed or not reachable, the cluster is too small, or a worker raised one.
        RunError: a worker failed, died or hung; the message names it.
    """
    check(target, spec, world)
    with _joined(executor, world) as cluster:
        return _run(cluster, target, spec, world, gpus, timeout)


@contextmanager
def _joined(executor: str, world: int) -> Generator[Cluster]:
    """A cluster for the length of the block.

    Ray's own processes end with the thread that started them, and the event loop's threads end with their task: so the
    task that joins stays until the block ends, its thread waiting.
    """
    release, ready = threading.Event(), Future[Cluster]()

    async def hold() -> None:
        try:
            cluster = await join(executor, world)
        except BaseException as error:
            ready.set_exception(error)
            raise
        ready.set_result(cluster)
        await anyio.to_thread.run_sync(release.wait)
        await anyio.to_thread.run_sync(cluster.close)

    held = submit(hold)
    try:
        yield ready.result()
    finally:
        release.set()
        if not ready.done():  # interrupted while it joined
            held.cancel()
        elif ready.exception() is None:
            held.result()


def _run(
    cluster: Cluster, target: str, spec: Mapping[str, Any], world: int, gpus: float, timeout: float
) -> list[WorkerResult]:
    actors: list[Any] = []
    try:
        if world > cluster.cpus:
            raise UserError(f"world: found {world} workers, expected at most {cluster.cpus}, the cluster's CPUs.")
        make = cluster.ray.remote(Actor).options(num_cpus=1, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        actors += [make.remote() for _ in range(world)]
        job = {
            "target": target,
            "spec": dict(spec),
            "world": world,
            "address": "" if world == 1 else cluster.ray.get(actors[0].listen.remote(world), timeout=timeout),
            "token": secrets.token_hex(16),
            "timeout": timeout,
            "path": import_path(),
        }
        running = {actor.run.remote(json.dumps({**job, "rank": rank})): rank for rank, actor in enumerate(actors)}
        return results(_collect(cluster, running), world)
    finally:  # also when interrupted
        for actor in actors:
            cluster.ray.kill(actor)


def _collect(cluster: Cluster, running: Mapping[Any, int]) -> dict[int, dict[str, Any]]:
    """Wait for all; at the first failure the others get a moment to end by themselves."""
    answers: dict[int, dict[str, Any]] = {}
    pending, deadline = list(running), float("inf")
    while pending and time.monotonic() < deadline:
        ready, pending = cluster.ray.wait(pending, num_returns=1, timeout=_POLL_SECONDS)
        for reference in ready:
            try:
                answer = json.loads(cluster.ray.get(reference))
            except cluster.ray.exceptions.RayError as error:
                first = " ".join(str(error).split())[:300]
                answer = {"error": {"text": f"its process or node died: {first}", "exit_code": 1, "lost": None}}
            answers[running[reference]] = answer
            if "error" in answer:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return answers
