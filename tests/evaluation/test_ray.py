"""`--executor ray`: the same result as local, worker loss, budget, and what is refused. One cluster for the file."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt import graph
from agentopt.errors import UserError
from agentopt.evaluation import EvaluationOptions, EvaluationResult, EvaluationRow, check_executor
from agentopt.evaluation._ray import _with_lost
from agentopt.graph import Meter, Usage
from agentopt.models import Request
from agentopt.search import Budget, TuneOptions, TuneResult
from agentopt.store import Store

pytestmark = pytest.mark.ray

PROGRAM = Path(__file__).with_name("ray_program.py")
WORKERS = 2


def test_local_mode_never_imports_ray() -> None:
    script = f"""
import sys
import agentopt as ao
from agentopt import graph
rows = [{{"text": str(i), "expected": "x"}} for i in range(4)]
ao.evaluate({f"{PROGRAM}:shout"!r}, rows, "exact_match", store=":memory:")
import agentopt.cli, agentopt.evaluation._executors, agentopt.search._remote
print("ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_what_no_executor_understands_is_refused() -> None:
    for executor, workers, text in (
        ("spark", None, r"found 'spark'; expected local, ray, or ray://HOST:PORT"),
        ("ray://", None, "found 'ray://'"),
        ("local", 2, "workers are processes of the ray executor"),
        ("ray", 0, "at least 1"),
    ):
        with pytest.raises(UserError, match=text):
            check_executor(executor, workers)
    with pytest.raises(UserError, match="found 'spark'"):
        TuneOptions(executor="spark")
    assert {"executor", "workers"}.isdisjoint(TuneOptions.deciding())


def test_objects_cannot_cross_and_the_fix_is_told() -> None:
    @ao.agent
    def here(text: str) -> str:
        return text

    rows = [{"text": "a", "expected": "a"}]
    with pytest.raises(UserError, match=r"here was given as an object.*give its path"):
        ao.evaluate(here, rows, "exact_match", executor="ray", store=":memory:")

    def mine(output: Any, expected: Any, example: Any) -> float:
        return 1.0

    with pytest.raises(UserError, match=r"the metric mine was given as an object.*metric='agent.py:score'"):
        ao.evaluate(f"{PROGRAM}:shout", rows, mine, executor="ray", store=":memory:")


def test_without_ray_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; install it with `pip install 'agentopt\[ray\]'`"):
        ao.evaluate(f"{PROGRAM}:shout", [{"text": "a"}], f"{PROGRAM}:length", executor="ray", store=":memory:")


@pytest.fixture(autouse=True)
def fresh_module() -> None:
    """Each test has its own declarations, so each imports the program anew."""
    sys.modules.pop(PROGRAM.stem, None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two CPUs on this machine; the executors join it and leave it running."""
    ray = pytest.importorskip("ray")
    from agentopt.evaluation._ray_cluster import _import

    _import()  # the same quiet settings as the executor's own cluster
    ray.init(
        address="local",
        num_cpus=WORKERS,
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"text": f"item {i}", "expected": "yes" if i % 2 else "no"} for i in range(24)]


class Counting:
    """A pure function of the request that remembers what was paid, and kills a worker at one of the calls."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.paid: Counter[str] = Counter()
        self.kill_at = kill_at
        self.killed = 0

    async def __call__(self, request: Request) -> str:
        self.paid[request.key()] += 1
        if self.paid.total() == self.kill_at:
            self.killed = next(pid for pid in worker_processes() if pid != os.getpid())
            os.kill(self.killed, signal.SIGKILL)
        await asyncio.sleep(0.005)
        prompt = str(request.messages[-1]["content"])
        item = re.search(r"item (?:\w+ )?(\d+)", prompt)
        assert item is not None
        skill = 0.3 + 0.6 * number(prompt.replace(item[0], ""))
        return "yes" if (number(prompt) < skill) == (int(item[1]) % 2 == 1) else "no"


def number(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def worker_processes() -> list[int]:
    """The processes that ran the program here, those that still live."""
    found = [int(path.name.partition("-")[2]) for path in Path().glob("worker-*")]
    return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def evaluated(executor: str, rows: list[dict[str, Any]], agent: Any, target: str = "ask", **more: Any) -> Any:
    options = EvaluationOptions(concurrency=8, keep_traces="all", seed=3)
    return ao.evaluate(
        f"{PROGRAM}:{target}",
        rows,
        more.pop("metric", "exact_match"),
        models={"agent": ao.FunctionLM(agent, name="counting")},
        executor=executor,
        workers=WORKERS if executor == "ray" else None,
        store=more.pop("store", ":memory:"),
        options=options,
        **more,
    )


def test_a_row_made_again_counts_each_call_of_its_lost_attempts_once() -> None:
    def lost(usage: Usage, cost: float = 0.0) -> Meter:
        with graph.metered() as meter:
            graph.meter_add(usage, cost)
        return meter

    found = Usage(cached_calls=1, cached_input_tokens=10, cached_output_tokens=2, cached_cost=0.5)
    paid = Usage(input_tokens=10, output_tokens=2, calls=1, tries=1)
    before = Usage(cached_calls=1, cached_input_tokens=7, cached_output_tokens=1, cached_cost=0.25)
    row = EvaluationRow("c", "d", "1", 0, 0, 1.0, usage=before + found + paid, cost=0.5)
    whole = _with_lost(row, [lost(before + paid, 0.5), lost(before + found)])
    assert whole.usage == before + paid + paid, "what was in the cache before the run stays a cached call"
    assert whole.cost == 1.0


def plain_rows(result: EvaluationResult) -> list[dict[str, Any]]:
    """Everything but times."""
    return [{k: v for k, v in row.to_dict().items() if k != "latency"} for row in result.rows]


@pytest.mark.slow
def test_rows_and_traces_are_those_of_a_local_evaluation(cluster: Any, rows: list[dict[str, Any]]) -> None:
    here, there = Counting(), Counting()
    local, remote = evaluated("local", rows, here), evaluated("ray", rows, there)
    assert plain_rows(remote) == plain_rows(local)
    assert there.paid == here.paid and remote.usage.calls == 24
    assert len(list(Path().glob("worker-*"))) == 1 + WORKERS, "this process and both workers ran the program"
    ours, theirs = (result.rollouts[5].trace for result in (local, remote))
    assert [op.op for op in theirs.ops] == [op.op for op in ours.ops]
    assert theirs.parameters.keys() == ours.parameters.keys()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_no_call_is_paid_twice(cluster: Any, rows: list[dict[str, Any]]) -> None:
    agent = Counting(kill_at=10)
    local, remote = evaluated("local", rows, Counting()), evaluated("ray", rows, agent)
    assert agent.killed
    assert plain_rows(remote) == plain_rows(local)
    assert max(agent.paid.values()) == 1


@pytest.mark.slow
def test_what_a_program_reports_by_itself_and_a_metric_by_path_cross(cluster: Any, rows: list[dict[str, Any]]) -> None:
    local = evaluated("local", rows[:3], Counting(), "shout", metric=f"{PROGRAM}:length")
    remote = evaluated("ray", rows[:3], Counting(), "shout", metric=f"{PROGRAM}:length")
    assert plain_rows(remote) == plain_rows(local)
    assert remote.cost == 1.5 and remote.rows[0].feedback == "longer is better"


@pytest.mark.slow
def test_a_client_of_the_programs_own_is_seen_through_the_workers_endpoint(
    cluster: Any, rows: list[dict[str, Any]]
) -> None:
    here, there = Counting(), Counting()
    local, remote = evaluated("local", rows[:6], here, "client"), evaluated("ray", rows[:6], there, "client")
    assert not local.errors and plain_rows(remote) == plain_rows(local)
    assert there.paid == here.paid and there.paid.total() == 6
    assert [op.op for op in remote.rollouts[0].trace.ops] == [op.op for op in local.rollouts[0].trace.ops]


@pytest.mark.slow
def test_a_job_that_takes_its_worker_down_is_a_failed_row_and_the_others_are_made(cluster: Any) -> None:
    rows = [{"text": f"item {i}", "expected": "yes"} for i in range(3, 7)]
    result = evaluated("ray", rows, Counting(), "crash")
    assert [row.score for row in result.rows] == [0.0, 1.0, 1.0, 1.0]
    assert "the worker process died or blocked 4 times" in str(result.rows[0].error)


@pytest.mark.slow
def test_a_value_that_json_does_not_keep_is_refused(cluster: Any) -> None:
    with pytest.raises(UserError, match=r"holds a value that JSON does not keep"):
        evaluated("ray", [{"text": ("a", "b"), "expected": "x"}], Counting(), "shout")


def tuned(executor: str, agent: Counting, store: Store, **more: Any) -> TuneResult:
    sets = {name: [{"text": f"item {name} {i}", "expected": "yes" if i % 2 else "no"} for i in range(count)]
            for name, count in (("train", 16), ("val", 16), ("test", 30))}  # fmt: skip
    more.setdefault("budget", Budget(rollouts=220))
    return ao.tune(
        f"{PROGRAM}:ask",
        **sets,
        metric="exact_match",
        optimizer="instructions-free",
        seed=5,
        models={"agent": ao.FunctionLM(agent, name="counting")},
        store=store,
        options=TuneOptions(
            screen_size=8, executor=executor, workers=WORKERS if executor == "ray" else None, capture=False
        ),
        **more,
    )


def outcome(result: TuneResult, store: Store) -> dict[str, Any]:
    kept = store.evaluations(result.run_id)
    found = sorted(json.dumps({k: v for k, v in row.items() if k not in ("latency", "trace_id")}, sort_keys=True)
                   for row in kept)  # fmt: skip
    events = [event.kind for event in store.events(result.run_id)]
    cost = {k: v for k, v in result.cost.items() if not k.startswith("per_run")}
    return {
        "best": result.best.hash,
        "claim": result.claim.to_dict(),
        "rows": found,
        "events": events,
        "cost": cost,
        "stop": result.stop_reason,
    }


@pytest.mark.slow
def test_tuning_on_two_workers_one_of_them_killed_is_tuning_locally(cluster: Any, tmp_path: Path) -> None:
    here, there, attacked = Counting(), Counting(), Counting(kill_at=60)
    found: list[dict[str, Any]] = []
    for name, executor, agent in (("a", "local", here), ("b", "ray", there), ("c", "ray", attacked)):
        with Store.open(tmp_path / f"{name}.db") as store:
            found.append(outcome(tuned(executor, agent, store), store))
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert there.paid == here.paid == attacked.paid and attacked.killed


@pytest.mark.slow
def test_a_token_budget_ends_the_run_within_the_calls_in_flight(cluster: Any, tmp_path: Path) -> None:
    for executor in ("local", "ray"):
        agent = Counting()
        with Store.open(tmp_path / f"{executor}.db") as store:
            result = tuned(executor, agent, store, budget=Budget(tokens=1200))
        assert "tokens used up" in result.stop_reason
        assert result.cost["tokens"] <= 1200 + 8 * 12, "at most what was in flight"


@pytest.mark.slow
def test_a_run_begun_on_ray_is_resumed_locally(cluster: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.kind == "screen_done":
            raise Stop

    agent = Counting()
    with Store.open(tmp_path / "runs.db") as store:
        with pytest.raises(Stop):
            tuned("ray", agent, store, on_event=stop)
        run = store.runs()[0].id
        result = tuned("local", agent, store, resume=run)
        assert result.claim.status in ("improved", "not_improved", "kept_baseline", "worse", "no_claim")
    assert max(agent.paid.values()) == 1


@pytest.mark.slow
def test_an_unreachable_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    script = f"""
import agentopt as ao
from agentopt import graph
ao.evaluate({f"{PROGRAM}:shout"!r}, [{{"text": "a", "expected": "a"}}], "exact_match", store=":memory:",
            executor="ray://127.0.0.1:1")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert "UserError: executor: no Ray cluster answers at ray://127.0.0.1:1" in done.stderr


@pytest.mark.slow
def test_the_command_line_starts_and_stops_a_quiet_cluster_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"item {i}", "expected": "x"}) for i in range(4)), encoding="utf-8")
    arguments = [f"{PROGRAM}:shout", "--data", str(data), "-m", "exact_match", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "agentopt", "evaluate", *arguments, "--executor", "ray", "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 4
    assert done.stderr == ""
