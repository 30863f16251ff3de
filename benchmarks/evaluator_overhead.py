"""What an evaluation costs beside the model's own time: 1,000 calls, 64 at a time, a server that waits and answers.

    python benchmarks/evaluator_overhead.py [--quick] [--seeds N]

Four processes, one at a time against a fresh server process: agentopt's evaluator (recording, store and cache on), the
same with every trace kept, `dspy.Evaluate` (cache on, its default), and a bare httpx client without any of it. "Ideal"
is the number of rounds (1,000 / 64, rounded up) times the server's latency. CPU is the worker's own process time, all
threads, for the measured evaluation only (imports and 128 warm-up calls are before it).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONCURRENCY = 64
WARM_UP = 128
DSPY = "dspy==3.4.1"
# Readable for dspy's ChatAdapter; agentopt and httpx take it as any text.
ANSWER = "[[ ## answer ## ]]\nok\n\n[[ ## completed ## ]]"


# --- the server: its own process --------------------------------------------------------------


class Server(asyncio.Protocol):
    """HTTP/1.1 keep-alive, one answer per POST after `latency` seconds; counts nothing, parses little."""

    def __init__(self, latency: float, reply: bytes) -> None:
        self.latency = latency
        self.reply = reply
        self.buffer = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.latency, self.answer)

    def answer(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(self.reply)


async def serve(latency: float) -> None:
    body = json.dumps(
        {
            "id": "x", "object": "chat.completion", "created": 1, "model": "fake",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29},
        }
    ).encode()  # fmt: skip
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(latency, head + body), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends when the parent closes our stdin
    server.close()


@contextlib.contextmanager
def server(latency: float) -> Any:
    command = [sys.executable, __file__, "--worker", "serve", "--latency", str(latency)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
        finally:
            process.stdin.close()
            process.wait(10)


# --- the workers: each prints {"wall": s, "cpu": s, "ok": n} ----------------------------------


def question(number: int) -> str:
    return f"Ticket {number}: I was charged twice for order {number * 7919 % 10007}, what now?"


def measured(wall: float, cpu: float, ok: int) -> None:
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "ok": ok}))


def run_agentopt(url: str, calls: int, keep: str) -> None:
    import agentopt as ao
    from agentopt.evaluation import EvaluationOptions, Evaluator, load_dataset, load_program, resolve_metric
    from agentopt.store import Store

    instruction = ao.prompt("Answer the customer in one word.", name="bench.instruction")

    @ao.agent
    async def answer(ticket: str) -> str:
        reply = await ao.lm("agent").complete(system=instruction, user=ticket)
        return reply.text

    async def main(store: Store) -> None:
        program = load_program(answer)
        options = EvaluationOptions(concurrency=CONCURRENCY, keep_traces=keep)  # type: ignore[arg-type]
        store.create_run("bench", {})
        evaluator = Evaluator(program, resolve_metric("contains"), options, store=store, run_id="bench")
        rows = [{"ticket": question(number), "expected": "ok"} for number in range(calls + WARM_UP)]
        data = load_dataset(rows, signature=program.signature)
        await evaluator.evaluate(ao.Candidate({}), data[:WARM_UP])
        wall, cpu = time.perf_counter(), time.process_time()
        result = await evaluator.evaluate(ao.Candidate({}), data[WARM_UP:])
        store.flush()
        measured(wall, cpu, sum(row.score == 1.0 for row in result.rows))

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "bench.db") as store:
        ao.configure(models={"agent": f"openai-compatible:{url}#fake"}, cache=store)
        if "PROFILE" in os.environ:
            import cProfile

            profile = cProfile.Profile()
            profile.runcall(asyncio.run, main(store))
            profile.dump_stats(os.environ["PROFILE"])
        else:
            asyncio.run(main(store))


def run_httpx(url: str, calls: int) -> None:
    import httpx

    async def main() -> None:
        limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:

            async def one(number: int) -> int:
                messages = [
                    {"role": "system", "content": "Answer the customer in one word."},
                    {"role": "user", "content": question(number)},
                ]
                reply = await client.post(f"{url}/chat/completions", json={"model": "fake", "messages": messages})
                return int("ok" in reply.json()["choices"][0]["message"]["content"])

            async def many(numbers: range) -> int:
                waiting, done = iter(numbers), 0

                async def worker() -> None:
                    nonlocal done
                    for number in waiting:
                        right = await one(number)
                        done += right

                async with asyncio.TaskGroup() as group:
                    for _ in range(CONCURRENCY):
                        group.create_task(worker())
                return done

            await many(range(WARM_UP))
            wall, cpu = time.perf_counter(), time.process_time()
            measured(wall, cpu, await many(range(WARM_UP, WARM_UP + calls)))

    asyncio.run(main())


def run_dspy(url: str, calls: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSPY_CACHEDIR"] = folder
        import dspy

        dspy.configure(lm=dspy.LM("openai/fake", api_base=url, api_key="none"))
        program = dspy.Predict("ticket -> answer")
        rows = [
            dspy.Example(ticket=question(number), answer="ok").with_inputs("ticket")
            for number in range(calls + WARM_UP)
        ]

        def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
            return example.answer in prediction.answer

        def evaluate(part: list[Any]) -> Any:
            return dspy.Evaluate(devset=part, metric=metric, num_threads=CONCURRENCY, display_progress=False)(program)

        evaluate(rows[:WARM_UP])
        wall, cpu = time.perf_counter(), time.process_time()
        result = evaluate(rows[WARM_UP:])
        measured(wall, cpu, round(float(getattr(result, "score", result)) * calls / 100))


def worker(python: str, kind: str, url: str, calls: int) -> dict[str, float]:
    command = [python, __file__, "--worker", kind, "--url", url, "--calls", str(calls)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=280, env=env)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if result["ok"] != calls:
        raise RuntimeError(f"{kind}: {result['ok']} of {calls} answers were right\n{done.stderr[-1000:]}")
    return result


# --- the comparison ---------------------------------------------------------------------------


def compare(quick: bool, seeds: int) -> None:
    from _report import Row, middle, peer_python, write_results

    calls = 256 if quick else 1000
    peer, problem = peer_python(DSPY)
    if peer is None:
        print(f"{DSPY} could not be installed ({problem}); its columns stay empty", file=sys.stderr)
    rows: list[Row] = []
    for latency, wall_goal in ((0.5, "<= 1.05"), (0.05, "<= 2.5")):
        ideal = math.ceil(calls / CONCURRENCY) * latency
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(1 if quick else seeds):
            for kind in ("agentopt", "agentopt-all", "httpx", "dspy"):
                python = sys.executable if kind != "dspy" else peer
                if python is not None:
                    with server(latency) as url:
                        found.setdefault(kind, []).append(worker(python, kind, url, calls))
        label = f"{latency * 1000:.0f} ms"

        def value(kind: str, field: str, divisor: float, found: Any = found) -> tuple[float, tuple[float, float]]:
            return middle([item[field] / divisor for item in found[kind]])

        def theirs(field: str, divisor: float, found: Any = found, value: Any = value) -> float | None:
            return value("dspy", field, divisor)[0] if "dspy" in found else None

        name = "dspy 3.4.1" if "dspy" in found else None
        per_call = calls / 1000
        wall, cpu = value("agentopt", "wall", ideal), value("agentopt", "cpu", per_call)
        note = f"{calls} calls, {CONCURRENCY} at a time, ideal {ideal:g} s"
        rows += [
            Row(f"{label}: wall / ideal", *_unit(wall, "x"), goal=wall_goal, peer=name,
                peer_value=theirs("wall", ideal), note=note),
            Row(f"{label}: CPU per call", *_unit(cpu, "ms"), goal="<= 2" if latency == 0.5 else None, peer=name,
                peer_value=theirs("cpu", per_call), note="recording, store and reply cache on"),
            Row(f"{label}: wall / ideal, every trace kept", *_unit(value("agentopt-all", "wall", ideal), "x")),
            Row(f"{label}: CPU per call, every trace kept", *_unit(value("agentopt-all", "cpu", per_call), "ms")),
            Row(f"{label}: CPU per call, bare httpx client", *_unit(value("httpx", "cpu", per_call), "ms"),
                note="no recording, store, cache, retries or throttle"),
            Row(f"{label}: wall / ideal, bare httpx client", *_unit(value("httpx", "wall", ideal), "x")),
        ]  # fmt: skip
    write_results("evaluator_overhead", rows, quick=quick)


def _unit(measure: tuple[float, tuple[float, float]], unit: str) -> tuple[float, str, tuple[float, float]]:
    return measure[0], unit, measure[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 calls, one repeat")
    parser.add_argument("--seeds", type=int, default=3, help="repeats")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=1000, help=argparse.SUPPRESS)
    parser.add_argument("--latency", type=float, default=0.5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    match args.worker:
        case "serve":
            asyncio.run(serve(args.latency))
        case "agentopt":
            run_agentopt(args.url, args.calls, "failures")
        case "agentopt-all":
            run_agentopt(args.url, args.calls, "all")
        case "httpx":
            run_httpx(args.url, args.calls)
        case "dspy":
            run_dspy(args.url, args.calls)
        case _:
            compare(args.quick, args.seeds)


if __name__ == "__main__":
    main()
