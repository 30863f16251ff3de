"""The process tier: warm, limited, restarted; every failure is one clear error."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentopt import graph
from agentopt.errors import UserError
from agentopt.graph import Candidate, CodeError, CodeTimeout, RolloutScope, Used, WorkerDied
from agentopt.sandbox import Limits, ProcessRunner, RunnerPool


@pytest.fixture(scope="module")
def runner() -> Iterator[ProcessRunner]:
    with ProcessRunner(Limits(seconds=20.0)) as shared:
        yield shared


def run(runner: ProcessRunner | RunnerPool, source: str, *args: object, name: str = "f", uses=(), **kwargs: object):
    return runner.call(runner.compile(source, name, uses), args, kwargs)


def test_one_warm_worker_serves_many_calls(runner: ProcessRunner) -> None:
    assert run(runner, "def f(x): return x + 1", 1) == 2
    pid = runner.pid
    assert [run(runner, "def f(x): return x * 2", n) for n in range(5)] == [0, 2, 4, 6, 8]
    assert run(runner, "def f(x): return x + 1", 5) == 6
    assert runner.pid == pid


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("$dict"), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(json_like)
def test_json_values_cross_unchanged_both_ways(runner: ProcessRunner, value: object) -> None:
    assert run(runner, "def f(x, *, y): return [x, y]", value, y=value) == [value, value]


@graph.register_dataclass
@dataclasses.dataclass
class Order:
    id: str
    items: list[int]
    note: str | None = None


def test_registered_dataclasses_cross_both_ways(runner: ProcessRunner) -> None:
    def total(order: Order) -> Order: ...

    unit = graph.describe_code(total, uses=(Order,))
    source = "def total(order: Order) -> Order:\n    return Order(order.id + '!', order.items + [1], note=None)"
    assert runner.call(runner.compile(source, "total", unit.uses), [Order("a", [3])], {}) == Order("a!", [3, 1])
    assert run(runner, "def f(order): return [order, order.id]", Order("b", [])) == [Order("b", []), "b"]


def test_async_functions_run(runner: ProcessRunner) -> None:
    source = "async def f(x):\n    return x + 1"
    assert run(runner, source, 1) == 2


@pytest.mark.anyio
async def test_acall_leaves_the_event_loop_free(runner: ProcessRunner) -> None:
    identity = runner.compile("import time\ndef f():\n    time.sleep(0.3)\n    return 1", "f")
    ticks = 0
    results: list[object] = []

    async def call() -> None:
        results.append(await runner.acall(identity, (), {}))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        while not results:
            ticks += 1
            await anyio.sleep(0.01)
    assert results == [1]
    assert ticks > 3


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (
            "def f():\n    x = 1\n    return x / 0",
            ZeroDivisionError,
            "f: ZeroDivisionError: division by zero at line 3.*`return x / 0`",
        ),
        ("def f():\n    raise ValueError", ValueError, "f: ValueError at line 2"),
        ("def f():\n    return g()\ndef g():\n    return [][0]", IndexError, "at line 4.*`return \\[\\]\\[0\\]`"),
        ("def f():\n    a, b = None", TypeError, "at line 2"),
        ("def f(:\n  pass", SyntaxError, "at line 1"),
        ("x = undefined\ndef f(): pass", NameError, "undefined.*at line 1"),
        ("def g(): pass", NameError, "does not define the function 'f'"),
        ("def f(): raise SystemExit(3)", CodeError, "SystemExit: 3"),
        ("def f(): raise KeyboardInterrupt", CodeError, "KeyboardInterrupt"),
        ("def f(): raise StopIteration", CodeError, "StopIteration"),
        (
            "class Odd(Exception):\n    def __str__(self): raise RuntimeError\ndef f(): raise Odd",
            CodeError,
            "Odd.*cannot be shown",
        ),
        ("def f(): return {1, 2}", TypeError, "holds a set, which cannot cross back"),
        ("def f(): return {1: 2}", TypeError, "keys are not all strings"),
        ("def f():\n    a = []\n    a.append(a)\n    return a", TypeError, "nested"),
        ("def f(): return f()", RecursionError, "recursion"),
        ("def f():\n    import subprocess", ImportError, "'subprocess' is not allowed here"),
        ("import os.path\ndef f(): pass", ImportError, "'os.path' is not allowed"),
        ("from . import x\ndef f(): pass", ImportError, "not allowed"),
    ],
)
def test_failure_has_type_message_line_and_text(runner: ProcessRunner, source: str, error, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        run(runner, source)
    assert isinstance(caught.value, CodeError)
    assert caught.value.exit_code == 1


def test_error_has_its_parts_as_fields(runner: ProcessRunner) -> None:
    with pytest.raises(CodeError) as caught:
        run(runner, "def f(x):\n    return helper(x)\ndef helper(x):\n    raise KeyError(x)", "k")
    error = caught.value
    assert (error.function, error.type, error.detail, error.line) == ("f", "KeyError", "'k'", 4)
    assert error.source_line == "raise KeyError(x)"
    assert error.trace == "line 2, in f: return helper(x)\nline 4, in helper: raise KeyError(x)"


def test_endless_loop_is_killed_and_the_next_call_works() -> None:
    with ProcessRunner(Limits(seconds=0.5)) as runner:
        good = runner.compile("def f(): return 1", "f")
        assert runner.call(good, (), {}) == 1
        first = runner.pid
        for body in (
            "while True: pass",
            "import time\n    time.sleep(60)",
            "while True:\n        try: g()\n        except BaseException: pass",
        ):
            with pytest.raises(CodeTimeout, match=r"f: TimeoutError: no result within 0\.5 s; the call was killed"):
                run(runner, f"def f():\n    {body}")
        assert runner.call(good, (), {}) == 1
        assert runner.pid != first
    with ProcessRunner(Limits(seconds=0.5)) as runner, pytest.raises(CodeTimeout):
        runner.compile("while True: pass\ndef f(): pass", "f")


def test_worker_killed_mid_call_is_a_clear_error_and_the_next_call_restarts_it() -> None:
    with ProcessRunner(Limits(seconds=300.0)) as runner:
        good = runner.compile("def f(x): return x", "f")
        slow = runner.compile("import time\ndef g():\n open('begun', 'w').close()\n time.sleep(600)", "g")
        outcome: list[BaseException] = []

        def call() -> None:
            try:
                runner.call(slow, (), {})
            except CodeError as error:
                outcome.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        until(lambda: Path(f"/proc/{runner.pid}/cwd/begun").exists())
        assert runner.pid is not None
        os.kill(runner.pid, signal.SIGKILL)
        thread.join()
        (error,) = outcome
        assert isinstance(error, WorkerDied)
        assert "g: WorkerDied: the worker process died during the call: it was ended by SIGKILL" in str(error)
        assert runner.call(good, (7,), {}) == 7


def test_worker_that_died_between_calls_is_replaced_silently() -> None:
    with ProcessRunner() as runner:
        good = runner.compile("def f(x): return x", "f")
        pid = runner.pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        until(lambda: _ended(pid))
        assert runner.call(good, (7,), {}) == 7


def test_crash_and_exit_of_the_worker_are_named() -> None:
    with ProcessRunner() as runner:
        source = "def f(): ctypes.string_at(0)"
        with pytest.raises(WorkerDied, match=r"SIGSEGV|SIGBUS"):
            run(runner, source, uses=[Used("ctypes", "module", "ctypes")])
        with pytest.raises(WorkerDied, match="exit code 3"):
            run(runner, "def f(): os._exit(3)", uses=[Used("os", "module", "os")])
        assert run(runner, "def f(): return 'alive'") == "alive"


def test_huge_results_arguments_and_prints(runner: ProcessRunner) -> None:
    assert run(runner, "def f():\n    for _ in range(200): print('x' * 100_000)\n    return 1") == 1
    assert run(runner, "def f(x): return len(x)", "y" * 3_000_000) == 3_000_000
    assert len(run(runner, "def f(): return 'z' * 3_000_000")) == 3_000_000
    with pytest.raises(ValueError, match=r"the result has 9,000,\d+ bytes; at most 4,194,304 may cross back"):
        run(runner, "def f(): return 'z' * 9_000_000")
    with pytest.raises(CodeError, match="MemoryError"):
        run(runner, "def f(): return bytearray(1 << 40)")
    with pytest.raises(CodeError, match=r"Exception: x{9999}"):
        run(runner, "def f(): raise Exception('x' * 9_000_000)")
    assert run(runner, "def f(): return 'alive'") == "alive"


def test_argument_that_cannot_cross_is_named(runner: ProcessRunner) -> None:
    with pytest.raises(UserError, match=r"argument 0 of f\['a'\]\[1\] is a object, which cannot cross"):
        run(runner, "def f(x): pass", {"a": [1, object()]})
    with pytest.raises(UserError, match="argument 'y' of f has a key of type int"):
        run(runner, "def f(x, y): pass", 1, y={1: 2})


def test_worker_sees_a_clean_environment_and_an_empty_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "sk-123")
    (tmp_path / "random.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    uses = [Used("os", "module", "os"), Used("sys", "module", "sys")]
    source = """def f():
    return [sorted(os.environ), os.getcwd(), os.listdir('.'), os.getsid(0) == os.getpid(), sys.path]"""
    with ProcessRunner() as runner:
        names, folder, files, leads_session, path = run(runner, source, uses=uses)
        assert "SECRET_API_KEY" not in names
        assert "PYTHONPATH" not in names
        assert folder != os.getcwd()
        assert files == []
        assert leads_session
        assert str(tmp_path) not in path
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


def test_closing_kills_what_the_worker_started() -> None:
    source = """def f():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid"""
    uses = [Used("os", "module", "os"), Used("time", "module", "time")]
    with ProcessRunner() as runner:
        try:
            child = run(runner, source, uses=uses)
        except BlockingIOError:
            return  # an ordinary user may not even start one
    until(lambda: _ended(child))


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_definitions_do_not_see_each_other(runner: ProcessRunner) -> None:
    run(runner, "import math\nleft = 1\nmath.pi\ndef f(): return 1")
    with pytest.raises(NameError, match="left"):
        run(runner, "def f(): return left")


def test_draws_of_changed_code_repeat_within_a_rollout() -> None:
    source = "import random\ndef f(): return [random.random() for _ in range(3)], list({'aa', 'bb', 'cc', 'dd'})"

    def rollout(example: str) -> list[object]:
        with ProcessRunner() as runner, graph.rollout(RolloutScope(0, "c", example)):
            return [run(runner, source), run(runner, source)]

    first = rollout("a")
    assert rollout("a") == first
    assert first[0] != first[1]
    assert rollout("b") != first


def test_calls_from_many_threads_are_served_one_after_the_other(runner: ProcessRunner) -> None:
    identity = runner.compile("def f(x): return x * 10", "f")
    with graph.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: runner.call(identity, (n,), {}), range(100)))
    assert results == [n * 10 for n in range(100)]


def test_pool_has_one_worker_per_candidate_and_ends_the_oldest() -> None:
    source = "def f(): return os.getpid()"
    uses = [Used("os", "module", "os")]
    with RunnerPool(size=2, tier="process") as pool:
        pids = []
        for value in (1, 2, 1, 3, 2):
            with Candidate({"v": value}).active():
                pids.append(run(pool, source, uses=uses))
        assert pids[0] == pids[2]
        assert len({pids[0], pids[1], pids[3]}) == 3
        assert pids[4] != pids[1]
        identity = pool.compile(source, "f", uses)
        for value in range(4):
            with Candidate({"v": value}).active():
                assert isinstance(pool.call(identity, (), {}), int)


def test_dropped_runner_ends_its_worker() -> None:
    runner = ProcessRunner()
    run(runner, "def f(): return 1")
    pid = runner.pid
    assert pid is not None
    del runner
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_forked_process_leaves_the_worker_of_its_parent_alone() -> None:
    code = """
import os
from agentopt.sandbox import ProcessRunner
runner = ProcessRunner()
identity = runner.compile("def f(x): return x", "f")
child = os.fork()
if child == 0:
    assert runner.call(identity, (1,), {}) == 1
    raise SystemExit(0)
assert os.waitpid(child, 0)[1] == 0
pid = runner.pid
assert runner.call(identity, (2,), {}) == 2
assert runner.pid == pid
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_worker_of_a_killed_parent_does_not_stay() -> None:
    code = """
import sys
from agentopt.sandbox import ProcessRunner
runner = ProcessRunner()
runner.compile("def f(): return 1", "f")
print(runner.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdin is not None
    with parent.stdout, parent.stdin:
        pid = int(parent.stdout.readline())
        folder = os.readlink(f"/proc/{pid}/cwd")
        parent.kill()
        parent.wait()
    until(lambda: not Path(folder).exists())


def test_unknown_function_and_bad_limits_are_clear_errors(runner: ProcessRunner) -> None:
    with pytest.raises(UserError, match="no function 'nope'"):
        runner.call("nope", (), {})
    with pytest.raises(UserError, match="sandbox limit 'seconds'"):
        Limits(seconds=0)


def test_runner_and_pool_are_code_runners() -> None:
    assert isinstance(ProcessRunner(), graph.CodeRunner)
    assert isinstance(RunnerPool(), graph.CodeRunner)
