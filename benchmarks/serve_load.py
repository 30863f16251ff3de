"""Claim: streams go through the gateway as fast as past it, and what it adds to a chunk is too little to notice.

    python benchmarks/serve_load.py [--quick] [--repeats 5] [--requests 100000] [--no-peer]

A fake engine (`agentopt.serving.fake_engine`, asyncio's transports), `agentopt serve --engine fake` and a client of raw
sockets, each a process of its own, on loopback. 200 streams of 64 chunks at 10 chunks a second each; they begin one
after another over the first 100 ms, or all at once ("burst"). Each chunk is the time at which the engine sent it: its
age on arrival is known. Runs with and without the gateway take turns; a figure is the median of the pairs, its interval
their range. The first byte is that of the reply's body, which the engine sends at once.

The gateway is the command's: uvloop, keys on, access log and metrics on. LiteLLM's proxy (pinned, in .venv-peers, one
worker, a master key, no database) gets the same load. "Highest rate": streams are made faster step by step, until in
the best of three pairs less than 0.97 of what comes past the gateway comes through it. All processes share the machine,
so there is more in it where the client and the engine have cores of their own. A step's streams take 4 s, for LiteLLM
30 s, so that the time to the first byte weighs less.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _report import Row, middle, peer_python, write_results

HERE = Path(__file__).resolve().parent
LITELLM = "litellm[proxy]==1.106.2"
STREAMS, CHUNKS, RATE = 200, 64, 10.0
HELD = 0.97
MASTER = "sk-load"


@dataclass
class Target:
    """Something that answers, and the processes whose CPU time counts as its."""

    name: str
    port: int
    engine: int | str
    """Port or socket of its engine, which is told there what to do."""
    process: int = 0
    key: str = "none"
    model: str = "fake"


@dataclass
class Pair:
    """One run without and one with something in between."""

    bare: dict[str, Any]
    through: dict[str, Any]
    cpu: float

    @property
    def ratio(self) -> float:
        """Chunks per second, with over without."""
        return (self.through["chunks"] / self.through["seconds"]) / (self.bare["chunks"] / self.bare["seconds"])

    def added(self, what: str) -> float:
        """Milliseconds."""
        return self.through[what] - self.bare[what]


@dataclass
class Series:
    """The pairs of one setting."""

    pairs: list[Pair] = field(default_factory=list)

    def over(self, take: Callable[[Pair], float]) -> tuple[float, tuple[float, float]]:
        """Median and range."""
        return middle([take(pair) for pair in self.pairs])

    @property
    def lost(self) -> int:
        """Streams that did not get their whole reply, with something in between."""
        return sum(pair.through["failed"] for pair in self.pairs)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(argv: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is ended with the block, its group too."""
    with log.open("wb") as out:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)} | environment
        child = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def wait_for(url: str, child: subprocess.Popen[bytes], log: Path, seconds: float = 120.0) -> None:
    """Until it answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"{url} did not come up:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def control(where: int | str, **script: Any) -> None:
    """What the engine at a port or a socket does from now on."""
    to = _Unix(where) if isinstance(where, str) else http.client.HTTPConnection("127.0.0.1", where, timeout=30)
    with contextlib.closing(to):
        to.request("POST", "/control", json.dumps({"fake": script}))
        to.getresponse().read()


def client(target: Target, **job: Any) -> dict[str, Any]:
    """One run of the client process."""
    told = {"port": target.port, "key": target.key, "model": target.model} | job
    argv = [sys.executable, str(HERE / "_serve_client.py")]
    done = subprocess.run(argv, input=json.dumps(told).encode(), capture_output=True, check=True)
    return json.loads(done.stdout)


def pair(bare: Target, through: Target, *, rate: float = RATE, chunks: int = CHUNKS, burst: bool = False) -> Pair:
    """The same load past the gateway and through it, in an order drawn by lot."""
    found: dict[str, dict[str, Any]] = {}
    cpu = 0.0
    for target in random.sample([bare, through], 2):
        control(target.engine, chunks=chunks, rate=rate, stamp=True)
        before = cpu_seconds(through.process)
        spread = 0.0 if burst else 1.0 / rate
        found[target.name] = client(target, streams=STREAMS, spread=spread, limit=60.0 + 4 * chunks / rate)
        if target is through:
            cpu = cpu_seconds(through.process) - before
    return Pair(found[bare.name], found[through.name], cpu / max(1, found[through.name]["chunks"]))


def pairs(bare: Target, through: Target, repeats: int, **load: Any) -> Series:
    """Several, after one that does not count."""
    pair(bare, through, chunks=8, rate=20.0)
    return Series([pair(bare, through, **load) for _ in range(repeats)])


def standard_rows(name: str, found: Series, goals: bool) -> list[Row]:
    """Throughput, latencies and CPU of one series at the standard load."""
    label = f"{name}: " if name else ""
    value, spread = found.over(lambda pair: pair.ratio)
    rows = [Row(f"{label}throughput, with over without", value, "x", spread, f">= {HELD}" if goals else None)]
    for what, text, goal in (
        ("age_p50", "added to a chunk, median", "<= 5"),
        ("age_p99", "added to a chunk, 99th percentile", None),
        ("first_p50", "added to the first byte, median", None),
        ("first_p99", "added to the first byte, 99th percentile", None),
    ):
        value, spread = found.over(lambda pair, what=what: pair.added(what))
        rows.append(Row(f"{label}{text}", value, "ms", spread, goal if goals else None))
    value, spread = found.over(lambda pair: 1e6 * pair.cpu)
    rows.append(Row(f"{label}CPU per chunk", value, "us", spread))
    rows.append(Row(f"{label}streams that broke", float(found.lost), "streams", goal="<= 0" if goals else None))
    return rows


def highest(bare: Target, through: Target, rates: list[float], seconds: float) -> tuple[float, float, list[Any]]:
    """(highest chunks per second that held, CPU per chunk there, every step): the best of up to three pairs decides."""
    held, cpu, steps = 0.0, math.nan, list[Any]()
    for rate in rates:
        chunks = max(8, int(rate * seconds))
        found: list[Pair] = []
        while len(found) < 3 and not any(one.ratio >= HELD and not one.through["failed"] for one in found):
            found.append(pair(bare, through, rate=rate, chunks=chunks))
        ratio = max(one.ratio for one in found)
        lost = min(one.through["failed"] for one in found)
        alone = statistics.median(one.bare["chunks"] / one.bare["seconds"] for one in found)
        steps.append(
            {"chunks_per_second": STREAMS * rate, "ratio": round(ratio, 4), "lost": lost, "bare": round(alone)}
        )
        print(f"  {through.name}: {STREAMS * rate:.0f} chunks/s: {ratio:.3f}", flush=True)
        if ratio < HELD or lost:
            break
        held, cpu = STREAMS * rate, min(one.cpu for one in found)
    return held, cpu, steps


def memory(through: Target, requests: int) -> tuple[list[Row], Any]:
    """Resident memory over many short requests; the slope is that after the first fifth."""
    control(through.engine, chunks=3)
    before = cpu_seconds(through.process)
    every = max(100, requests // 100)
    found = client(through, requests=requests, watch=through.process, every=every, limit=900.0)
    cpu = (cpu_seconds(through.process) - before) / requests
    points = [(count, size) for count, size in found["memory"] if count > requests / 5]
    slope, spread = line(points)
    rows = [
        Row("requests that failed", float(found["failed"]), "requests", goal="<= 0"),
        Row("memory per request, slope", slope, "bytes", spread, "<= 10"),
        Row("memory after all requests", found["memory"][-1][1] / 2**20, "MiB"),
        Row("short requests per second", requests / found["seconds"], "requests/s"),
        Row("CPU per short request", 1e6 * cpu, "us"),
    ]
    return rows, found["memory"][:: max(1, len(found["memory"]) // 20)]


def line(points: list[tuple[int, int]], draws: int = 1000) -> tuple[float, tuple[float, float]]:
    """Slope by least squares; 95 % interval by drawing blocks of residuals, which depend on their neighbours."""
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    fit = statistics.linear_regression(xs, ys)
    rest = [y - fit.intercept - fit.slope * x for x, y in points]
    dice, block, found = random.Random(0), max(2, len(rest) // 8), list[float]()
    for _ in range(draws):
        drawn: list[float] = []
        while len(drawn) < len(rest):
            start = dice.randrange(len(rest) - block + 1)
            drawn += rest[start : start + block]
        made = [fit.intercept + fit.slope * x + r for x, r in zip(xs, drawn, strict=False)]
        found.append(statistics.linear_regression(xs, made).slope)
    found.sort()
    return fit.slope, (found[int(0.025 * draws)], found[int(0.975 * draws)])


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[int]:
    """A fake engine: its port."""
    port, log = free_port(), folder / "engine.log"
    argv = [sys.executable, "-m", "agentopt.serving.fake_engine", "--control", "--model", "fake", "--port", str(port)]
    with process(argv, log) as child:
        wait_for(f"http://127.0.0.1:{port}/health", child, log)
        yield port


@contextlib.contextmanager
def ours(folder: Path, capture: bool = False) -> Iterator[Target]:
    """`agentopt serve` with a fake engine of its own, behind a Unix socket, and a key."""
    port, place = free_port(), folder / ("capture" if capture else "plain")
    place.mkdir()
    log, keys, run = place / "out.log", str(place / "keys.db"), place / "run"
    agentopt = [sys.executable, "-m", "agentopt", "serve"]
    told = {"env": os.environ | {"PYTHONPATH": str(HERE.parent)}, "cwd": place, "check": True}
    made = subprocess.run([*agentopt, "keys", "create", "load", "--json", "--keys", keys], capture_output=True, **told)
    argv = [*agentopt, "fake", "--engine", "fake", "--quiet", "--admin-port", "0", "--keys", keys, "--port", str(port)]
    argv += ["--run-dir", str(run), *(["--capture", "--store", str(place / "store.db")] if capture else [])]
    with process([*argv, "--", "--control"], log) as child:
        wait_for(f"http://127.0.0.1:{port}/ready", child, log)
        server = json.loads((run / "server.json").read_text(encoding="utf-8"))
        socket_of = str(next(run.glob("engine-*.sock")))
        secret = json.loads(made.stdout)["key"]
        yield Target("capture on" if capture else "gateway", port, socket_of, int(server["pid"]), secret)


@contextlib.contextmanager
def in_uvicorn(folder: Path, engine_port: int) -> Iterator[Target]:
    """The same application in uvicorn (httptools, uvloop, no access log of its own)."""
    port, place = free_port(), folder / "uvicorn"
    place.mkdir()
    log = place / "out.log"
    argv = [sys.executable, str(HERE / "_serve_uvicorn.py"), str(port), str(engine_port), str(place)]
    with process(argv, log) as child:
        wait_for(f"http://127.0.0.1:{port}/ready", child, log)
        secret = (place / "secret").read_text(encoding="utf-8")
        yield Target("in uvicorn", port, engine_port, child.pid, secret)


@contextlib.contextmanager
def litellm(folder: Path, engine_port: int) -> Iterator[Target | None]:
    """LiteLLM's proxy in front of an engine; None where it cannot be installed."""
    python, why = peer_python(LITELLM, "uvloop")
    if python is None:
        print(f"LiteLLM is left out: {why}")
        yield None
        return
    port, log, config = free_port(), folder / "litellm.log", folder / "litellm.yaml"
    base = f"http://127.0.0.1:{engine_port}/v1"
    config.write_text(
        "model_list:\n"
        "  - model_name: fake\n"
        f"    litellm_params: {{model: openai/fake, api_base: '{base}', api_key: inside}}\n"
        f"general_settings: {{master_key: {MASTER}}}\n"
        "litellm_settings: {telemetry: false, drop_params: true}\n",
        encoding="utf-8",
    )
    argv = [str(Path(python).with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    told = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_PROXY": "127.0.0.1"}
    with process([*argv, "--num_workers", "1"], log, **told) as child:
        wait_for(f"http://127.0.0.1:{port}/health/liveliness", child, log)
        yield Target("litellm", port, engine_port, child.pid, MASTER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short repeat of each, without LiteLLM")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--requests", type=int, default=100_000, help="short requests of the memory test")
    parser.add_argument("--no-peer", action="store_true", help="leave LiteLLM out")
    given = parser.parse_args()
    repeats, requests = (1, 3_000) if given.quick else (given.repeats, given.requests)
    rates = (
        [20.0, 40.0]
        if given.quick
        else [15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 50.0, 60.0, 70.0, 80.0, 100.0, 125.0, 150.0]
    )
    load: dict[str, Any] = {"chunks": 20} if given.quick else {}
    seconds = 1.0 if given.quick else 4.0
    rows: list[Row] = []
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        port = stack.enter_context(engine(folder))
        bare = Target("engine", port, port)
        with ours(folder) as gateway:
            rows += standard_rows("", pairs(bare, gateway, repeats, **load), goals=True)
            burst = pairs(bare, gateway, repeats, burst=True, **load)
            rows += [
                Row("burst: " + row.name, row.value, row.unit, row.interval)
                for row in standard_rows("", burst, goals=False)[:3]
            ]
            held, cpu, extra["steps"] = highest(bare, gateway, rates, seconds)
            rows.append(
                Row(f"highest rate that holds {HELD}", held, "chunks/s", note="tried in steps: see extra.steps")
            )
            rows.append(Row("CPU per chunk at that rate", 1e6 * cpu, "us"))
            found, extra["memory"] = memory(gateway, requests)
            rows += found
        with ours(folder, capture=True) as gateway:
            rows += standard_rows("capture on", pairs(bare, gateway, repeats, **load), goals=False)
            held, cpu, extra["steps, capture on"] = highest(bare, gateway, rates[:1] if given.quick else rates, seconds)
            rows.append(Row(f"capture on: highest rate that holds {HELD}", held, "chunks/s"))
        rows += other_server(rows, folder, bare, repeats, requests, load)
        if not given.quick and not given.no_peer:
            rows = beside(rows, folder, bare, repeats, extra)
    write_results("serve_load", rows, quick=given.quick, extra=extra)


def other_server(
    rows: list[Row], folder: Path, bare: Target, repeats: int, requests: int, load: dict[str, Any]
) -> list[Row]:
    """What the application costs in another server."""
    ours_by_name = {row.name: row.value for row in rows}
    with in_uvicorn(folder, bare.port) as other:
        found = standard_rows("", pairs(bare, other, repeats, **load), goals=False)
        found += memory(other, min(requests, 20_000))[0]
    wanted = ("throughput, with over without", "added to a chunk, median", "CPU per chunk", "CPU per short request")
    return [
        Row(f"in uvicorn: {row.name}", row.value, row.unit, row.interval, None, "our server", ours_by_name[row.name])
        for row in found
        if row.name in wanted
    ]


def beside(rows: list[Row], folder: Path, bare: Target, repeats: int, extra: dict[str, Any]) -> list[Row]:
    """The rows at the standard load with LiteLLM's figures beside them, and LiteLLM's own highest rate."""
    with litellm(folder, bare.port) as proxy:
        if proxy is None:
            return rows
        theirs = {row.name: row.value for row in standard_rows("", pairs(bare, proxy, repeats), goals=False)}
        held, cpu, extra["steps, litellm"] = highest(bare, proxy, [0.5, 1.0, 2.0, 4.0], 30.0)
        theirs[f"highest rate that holds {HELD}"] = held
        theirs["CPU per chunk at that rate"] = 1e6 * cpu
    name = LITELLM.replace("[proxy]==", " ") + " proxy"
    return [
        Row(row.name, row.value, row.unit, row.interval, row.goal, name, theirs[row.name], row.note)
        if row.name in theirs
        else row
        for row in rows
    ]


if __name__ == "__main__":
    main()
