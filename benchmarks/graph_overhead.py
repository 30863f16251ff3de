"""What recording costs: time and memory per traced operation, and how backward grows. trace-opt and textgrad beside it.

    python benchmarks/graph_overhead.py [--quick] [--seeds N]

Every library runs in a process of its own, one after the other; no language model is called. Times are wall-clock.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _report import ROOT, Row, arguments, exponent, middle, peer_python, write_results

TRACE = "trace-opt==0.1.3.8"
TEXTGRAD = "textgrad==0.1.8"
# Their declared dependencies include xgboost, scikit-learn and datasets, which the graph never imports.
TRACE_NEEDS = ("graphviz", "litellm", "black")
TEXTGRAD_NEEDS = tuple(
    [
        "openai",
        "tenacity",
        "python-dotenv",
        "platformdirs",
        "diskcache",
        "pillow",
        "httpx",
        "pandas",
        "litellm",
        "graphviz",
    ]
)

Result = dict[str, list[Any]]


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call, with the garbage collector in its usual state."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def per_call(work: Callable[[], Any], number: int) -> float:
    """Microseconds per call in a tight loop, the loop's own cost included."""
    repeat = range(number)
    gc.collect()
    start = time.perf_counter()
    for _ in repeat:
        work()
    return (time.perf_counter() - start) / number * 1e6


def add(result: Result, name: str, value: Any) -> None:
    result.setdefault(name, []).append(value)


# --- agentopt --------------------------------------------------------------------------------------------------------


def ours(quick: bool, seeds: int) -> Result:
    start = time.process_time()
    import agentopt.graph as ao

    result: Result = {"import CPU s": [time.process_time() - start]}
    long = 20_000 if quick else 100_000
    sizes = [1_000, 3_000, 10_000, 20_000] if quick else [1_000, 3_000, 10_000, 30_000, 100_000]

    def chain(length: int) -> Any:
        y: Any = ao.node(0, trainable=True)
        for _ in range(length):
            y = y + 1
        return y

    def plain(x: int) -> int:
        return x

    step, bundled = ao.step(plain), ao.bundle(plain)

    @ao.bundle(trainable=True)
    def trained(x: int) -> int:
        return x

    @ao.bundle
    def total(items: list[int]) -> int:
        return sum(items)

    one, other = ao.node(1), ao.node(2)
    path = ROOT / "build" / "graph_overhead.trace.jsonl"
    for _ in range(seeds):
        add(result, "y + 1 us", timed(lambda: chain(10_000)) / 10_000 * 1e6)
        with ao.record():
            add(result, "y + 1 recorded us", timed(lambda: chain(10_000)) / 10_000 * 1e6)
        add(result, "node + node us", per_call(lambda: one + other, 20_000))
        add(result, "bundle us", per_call(lambda: bundled(one), 5_000))
        add(result, "trainable bundle us", per_call(lambda: trained(one), 5_000))
        with ao.stop_tracing():
            add(result, "bundle stopped us", per_call(lambda: bundled(one), 20_000))
        add(result, "step outside us", per_call(lambda: step(1), 100_000))
        add(result, "bundle outside us", per_call(lambda: bundled(1), 100_000))
        add(result, "plain us", per_call(lambda: plain(1), 100_000))
        with ao.record():
            add(result, "step recorded us", per_call(lambda: step(1), 2_000))
        add(result, "bytes per op", memory(chain, long))
        for size in sizes:
            add(result, f"backward {size}", timed(backward(chain(size))))
        for size in (100, 300) if quick else (100, 300, 1_000):
            y: Any = ao.node(1, trainable=True)
            for _ in range(size):
                y = (y + 1) + (y + 2)
            add(result, f"diamond {size}", timed(backward(y)))
        for size in (100, 300, 1_000) if quick else (100, 300, 1_000, 3_000):
            leaves = [ao.node(place, trainable=True, name=f"leaf{place}") for place in range(size)]
            output = total(leaves)
            add(result, f"fan-in step {size}", timed(lambda leaves=leaves, output=output: our_step(leaves, output)))
        trace = chain(long).trace
        add(result, "save s", timed(lambda trace=trace: trace.save(path)))
        add(result, "load s", timed(lambda: ao.Trace.load(path)))
        path.unlink()
    return result


def memory(chain: Callable[[int], Any], length: int) -> float:
    """Bytes that one `y + 1` of a live chain holds, its constant included."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = chain(length)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del kept
    return used / length


def backward(output: Any) -> Callable[[], None]:
    """Feedback backward, then the whole subgraph of every parameter read."""

    def work() -> None:
        for sub in output.backward("too small").values():
            _ = len(sub.ops), len(sub.inputs)

    return work


def our_step(leaves: list[Any], output: Any) -> None:
    """Backward, one joined subgraph for all parameters, a candidate with a new value for each, and the values set."""
    from agentopt.graph import Candidate

    first, *others = output.backward("too small").values()
    union = first.union(*others)
    _ = union.ops, union.inputs
    values = {name: found.value + 1 for name, found in union.parameters.items()}
    candidate = Candidate(values)
    chosen = candidate.values
    for leaf in leaves:
        leaf.value = chosen[leaf.name]


# --- peers -----------------------------------------------------------------------------------------------------------


def trace_opt(quick: bool, seeds: int) -> Result:  # noqa: C901 - one list of measurements
    start = time.process_time()
    from opto.trace import bundle, node, stop_tracing
    from opto.trace.nodes import GRAPH
    from opto.trace.propagators import GraphPropagator
    from opto.trace.utils import sum_feedback

    result: Result = {"import CPU s": [time.process_time() - start]}

    def chain(length: int) -> Any:
        y = node(0, trainable=True)
        for _ in range(length):
            y = y + 1
        return y

    @bundle()
    def bundled(x):
        return x

    @bundle(trainable=True)
    def trained(x):
        return x

    @bundle()
    def total(*items):
        return sum(items)

    def go_back(output: Any) -> Callable[[], None]:
        return lambda: output.backward("too small", propagator=GraphPropagator(), retain_graph=False)

    for seed in range(seeds):
        GRAPH.clear()
        one, other = node(1), node(2)
        add(result, "y + 1 us", timed(lambda: chain(2_000)) / 2_000 * 1e6)
        add(result, "node + node us", per_call(lambda one=one, other=other: one + other, 1_000))
        add(result, "bundle us", per_call(lambda one=one: bundled(one), 1_000))
        add(result, "trainable bundle us", per_call(lambda one=one: trained(one), 500))
        with stop_tracing():
            add(result, "bundle stopped us", per_call(lambda one=one: bundled(one), 1_000))
        GRAPH.clear()
        add(result, "bytes per op", memory(chain, 2_000))
        for size in (100, 300, 1_000) if quick or seed else (100, 300, 1_000, 3_000, 10_000):
            GRAPH.clear()
            add(result, f"backward {size}", timed(go_back(chain(size))))
        for size in (100,) if quick else (100, 300):
            GRAPH.clear()
            y = node(1, trainable=True)
            for _ in range(size):
                y = (y + 1) + (y + 2)
            add(result, f"diamond {size}", timed(go_back(y)))
        for size in (100, 300) if quick or seed else (100, 300, 1_000):
            GRAPH.clear()
            leaves = [node(place, trainable=True) for place in range(size)]
            output = total(*leaves)

            def step(leaves: list[Any] = leaves, output: Any = output) -> None:
                go_back(output)()
                sum_feedback(leaves)  # what Optimizer.step joins before it asks the model
                for leaf in leaves:
                    leaf._data = leaf._data + 1

            add(result, f"fan-in step {size}", timed(step))
    return result


def textgrad(quick: bool, seeds: int) -> Result:
    start = time.process_time()
    import textgrad as tg
    from textgrad.engine import EngineLM

    result: Result = {"import CPU s": [time.process_time() - start]}

    class Fake(EngineLM):
        model_string = "fake"

        def generate(self, prompt: Any, system_prompt: Any = None, **options: Any) -> str:
            return "fb"

        def __call__(self, prompt: Any, **options: Any) -> str:
            return "fb"

    engine = Fake()

    def chain(length: int) -> Any:
        y = tg.Variable("", role_description="")
        for _ in range(length):
            y = y + tg.Variable("", role_description="")
        return y

    for seed in range(seeds):
        add(result, "y + 1 us", timed(lambda: chain(1_000)) / 1_000 * 1e6)
        add(result, "bytes per op", memory(chain, 1_000))
        for size in (10, 12, 14) if quick or seed else (10, 12, 14, 16, 18, 20):
            y = chain(size)
            y.gradients.add(tg.Variable("too small", role_description="feedback"))
            add(result, f"backward {size}", timed(lambda y=y: y.backward(engine)))
    return result


# --- the report ------------------------------------------------------------------------------------------------------

WORKERS = {"ours": ours, "trace": trace_opt, "textgrad": textgrad}


def run_worker(python: str, name: str, quick: bool, seeds: int) -> tuple[Result | None, str]:
    """Run one library's measurements in its own process."""
    command = [python, __file__, "--worker", name, "1" if quick else "0", str(seeds)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore"}
    if name == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=ROOT)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return json.loads(done.stdout.splitlines()[-1]), ""


def slope(result: Result, prefix: str, least: int) -> tuple[float, str]:
    """Exponent of the time over the size, for sizes from `least` on."""
    points = {
        int(key.removeprefix(prefix)): statistics.median(values)
        for key, values in result.items()
        if key.startswith(prefix) and int(key.removeprefix(prefix)) >= least
    }
    sizes = sorted(points)
    return exponent(sizes, [points[size] for size in sizes]), f"{sizes[0]:,} to {sizes[-1]:,}"


def row(name: str, mine: Result, key: str, unit: str, **fields: Any) -> Row:
    """One row from our measurements, with the peer's median where it has the same measurement."""
    value, interval = middle(mine[key])
    peer, label, peer_key = fields.pop("peer", None), fields.pop("label", None), fields.pop("peer_key", key)
    theirs = statistics.median(peer[peer_key]) if peer and peer_key in peer else None
    return Row(name, value, unit, interval, peer=label if theirs is not None else None, peer_value=theirs, **fields)


def report(mine: Result, trace: Result | None, grad: Result | None, quick: bool) -> list[Row]:
    """All rows; peers that could not be run are left out of them."""
    both: dict[str, Any] = {"peer": trace, "label": TRACE}
    tg: dict[str, Any] = {"peer": grad, "label": TEXTGRAD}
    longest = max(int(key.split()[1]) for key in mine if key.startswith("backward "))
    rows = [
        row("traced op, y + 1", mine, "y + 1 us", "us", goal="<= 15", **both),
        row("traced op, y + 1", mine, "y + 1 us", "us", goal="<= 15", **tg),
        row("traced op inside a recording, y + 1", mine, "y + 1 recorded us", "us", goal="<= 15"),
        row("traced op, node + node", mine, "node + node us", "us", goal="<= 15", **both),
        row("traced op, user bundle", mine, "bundle us", "us", goal="<= 15", **both),
        row("traced op, trainable bundle", mine, "trainable bundle us", "us", goal="<= 15", **both),
        row("bundle under stop_tracing", mine, "bundle stopped us", "us", **both),
        row("@step outside a recording, whole call", mine, "step outside us", "us", goal="<= 1"),
        row("@bundle on plain values outside a recording, whole call", mine, "bundle outside us", "us", goal="<= 1"),
        row("the same function undecorated", mine, "plain us", "us"),
        row("@step inside a recording", mine, "step recorded us", "us"),
        row("memory per op, y + 1 with its constant", mine, "bytes per op", "B", goal="<= 600", **both),
        row("memory per op, y + 1 with its constant", mine, "bytes per op", "B", goal="<= 600", **tg),
        row(f"backward + subgraph, chain of {longest:,}", mine, f"backward {longest}", "s", goal="<= 2"),
        row("backward, chain of 1,000", mine, "backward 1000", "s", **both),
    ]
    if trace and "backward 10000" in trace:
        rows.append(row("backward, chain of 10,000", mine, "backward 10000", "s", **both))
    value, sizes = slope(mine, "backward ", 1_000)
    peer_slope = slope(trace, "backward ", 300) if trace else (None, "")
    rows.append(
        Row("backward, scaling exponent", value, "", goal="<= 1.2", peer=TRACE if trace else None,
            peer_value=peer_slope[0], note=f"ours from {sizes}, trace-opt from {peer_slope[1]}")
    )  # fmt: skip
    if grad:
        deepest = max(int(key.split()[1]) for key in grad if key.startswith("backward "))
        note = f"ours at depth 1,000, textgrad at depth {deepest}; its gradient text doubles with every level"
        rows.append(row("backward, deepest chain textgrad was given", mine, "backward 1000", "s",
                        peer_key=f"backward {deepest}", note=note, **tg))  # fmt: skip
    rows.append(row("backward, diamond of 300", mine, "diamond 300", "s", **both))
    rows.append(row("step over 1,000 trainable leaves", mine, "fan-in step 1000", "s", goal="<= 0.05", **both))
    if trace and "fan-in step 1000" not in trace:
        rows.append(row("step over 300 trainable leaves", mine, "fan-in step 300", "s", **both))
    value, sizes = slope(mine, "fan-in step ", 100)
    peer_slope = slope(trace, "fan-in step ", 100) if trace else (None, "")
    rows.append(
        Row("step, scaling exponent", value, "", goal="<= 1.2", peer=TRACE if trace else None,
            peer_value=peer_slope[0], note=f"ours from {sizes} leaves, trace-opt from {peer_slope[1]}")
    )  # fmt: skip
    rows += [
        row(f"save a trace of {longest:,}", mine, "save s", "s"),
        row(f"load a trace of {longest:,}", mine, "load s", "s"),
        row("import, CPU", mine, "import CPU s", "s", goal="<= 0.3", **both),
        row("import, CPU", mine, "import CPU s", "s", goal="<= 0.3", **tg),
    ]
    return [item for item in rows if quick or not (item.peer is None and "peer" in item.name)]


def main() -> int:
    """Measure, print, write."""
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        print(json.dumps(WORKERS[sys.argv[2]](sys.argv[3] == "1", int(sys.argv[4]))))
        return 0
    options = arguments(__doc__ or "", seeds=5)
    (ROOT / "build").mkdir(exist_ok=True)
    seeds = min(options.seeds, 3) if options.quick else options.seeds
    mine, problem = run_worker(sys.executable, "ours", options.quick, seeds)
    if mine is None:
        print(f"agentopt could not be measured: {problem}", file=sys.stderr)
        return 1
    peers: dict[str, Result | None] = {}
    for name, pinned, needs in (("trace", TRACE, TRACE_NEEDS), ("textgrad", TEXTGRAD, TEXTGRAD_NEEDS)):
        python, problem = peer_python(pinned, extra_args=["--no-deps"])
        if python is not None:
            python, problem = peer_python(*needs)
        peers[name] = None
        if python is not None:
            peers[name], problem = run_worker(python, name, options.quick, seeds)
        if problem:
            print(f"{pinned} is left out: {problem}")
    write_results("graph_overhead", report(mine, peers["trace"], peers["textgrad"], options.quick), quick=options.quick,
                  extra={"agentopt": mine, **peers})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
