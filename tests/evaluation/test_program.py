"""Programs: loaded as Python would, with every mistake shown as the user's own line."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.errors import UserError
from agentopt.evaluation import Example, load_program
from agentopt.graph import parameter_scope

PROGRAM = """
import agentopt as ao
from prompts import SHARED

instruction = ao.prompt("Say {x}", name="t.instruction")
tone = ao.choice(["calm", "loud"], name="t.tone")

@ao.tool
def lookup(order: str) -> str:
    "Look an order up."
    return order

@ao.agent
def triage(ticket: str) -> str:
    return instruction.format(x=ticket) + SHARED.value

class Desk:
    def run(self, ticket: str) -> str:
        return ticket

desk = Desk()
constant = 3
"""


@pytest.fixture(autouse=True)
def own_modules() -> Generator[None]:
    before, path = set(sys.modules), list(sys.path)
    with parameter_scope():
        yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "agentopt" not in name and "site-packages" not in file:
            sys.modules.pop(name, None)
    sys.path[:] = path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "prompts.py").write_text(
        "import agentopt as ao\nSHARED = ao.prompt('!', name='t.shared')\n", encoding="utf-8"
    )
    (tmp_path / "unused.py").write_text("import agentopt as ao\nao.prompt('?', name='t.unused')\n", encoding="utf-8")
    (tmp_path / "agent_file.py").write_text(PROGRAM, encoding="utf-8")
    return tmp_path


def run(program: Any, timeout: float | None = None, **inputs: Any) -> Any:
    return asyncio.run(program.run(Example(inputs=inputs), timeout))


def test_a_file_is_loaded_with_its_folder_on_the_path_and_its_modules_parameters(project: Path) -> None:
    program = load_program(f"{project}/agent_file.py:triage")
    assert program.name == "agent_file.py:triage"
    assert set(program.parameters) == {"t.shared", "t.instruction", "t.tone", "lookup.description", "lookup.code"}
    assert set(program.tunable()) == {"t.shared", "t.instruction", "t.tone"}
    assert run(program, ticket="x") == "Say x!"
    assert load_program(f"{project}/agent_file.py:triage").target is program.target
    assert run(load_program(f"{project}/agent_file.py:desk.run"), ticket="y") == "y"


def test_a_module_by_name_is_found_from_the_working_folder(project: Path) -> None:
    assert run(load_program("agent_file:triage"), ticket="x") == "Say x!"


def test_globs_choose_what_is_tuned(project: Path) -> None:
    program = load_program("agent_file:triage")
    assert set(program.tunable(["lookup.*"])) == {"lookup.description", "lookup.code"}
    assert set(program.tunable(freeze=["t.s*"])) == {"t.instruction", "t.tone"}
    with pytest.raises(UserError, match=r"no parameter matches 'nope\.\*'; .* declares t\.shared"):
        program.tunable(["nope.*"])
    with pytest.raises(UserError, match="nothing is left to tune"):
        program.tunable(freeze=["*"])
    with pytest.raises(UserError, match="declares no parameters, so there is nothing to tune"):
        load_program(len).tunable()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("agent_file.py", r"expected file\.py:function or package\.module:function; for example agent_file\.py:main"),
        ("agent_fil.py:triage", r"no such file; did you mean agent_file\.py\?"),
        ("agent_file.py:triag", r"agent_file\.py has no 'triag'; did you mean 'triage'\?"),
        ("agent_file.py:zzzz", r"has no 'zzzz'; it has .*triage"),
        ("agent_file.py:constant", "is a int, expected a function"),
        ("agent_file.py:Desk", "is the class Desk, expected a function"),
        ("no_such_module:f", r"module 'no_such_module' was not found; expected"),
        (":f", "expected file"),
    ],
)
def test_wrong_targets_are_one_sentence(project: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_program(target)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "x = 1\nboom = 1 / 0\n",
            r"cannot be imported: ZeroDivisionError: division by zero at .*bad\.py:2: boom = 1 / 0",
        ),
        ("import json\njson.loads('{')\n", r"JSONDecodeError.* at .*bad\.py:2: json\.loads"),
        ("def f(:\n", r"bad\.py:1: SyntaxError: .* in `def f\(:`"),
        ("import sys\nsys.exit(3)\n", r"calls sys\.exit\(3\) when imported"),
        ("import no_such_thing\n", r"ModuleNotFoundError: No module named 'no_such_thing' at .*bad\.py:1"),
    ],
)
def test_an_import_that_raises_shows_the_users_line(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_program(f"{tmp_path}/bad.py:f")
    with pytest.raises(UserError, match=message):
        load_program("bad:f")


def test_a_file_named_like_a_standard_module_does_not_replace_it(tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text("def f(x):\n    return x + '!'\n", encoding="utf-8")
    assert run(load_program(f"{tmp_path}/json.py:f"), x="a") == "a!"
    assert sys.modules["json"] is json


async def coroutine(x: str) -> str:
    await asyncio.sleep(0)
    return x


def plain(x: str) -> str:
    assert threading.current_thread() is not threading.main_thread()
    return x


def pieces(x: str) -> Iterator[str]:
    yield x[:1]
    yield x[1:]


def numbers(x: str) -> Iterator[int]:
    yield from range(len(x))


def returning(x: str) -> Generator[str, None, str]:
    yield "ignored"
    return x


async def apieces(x: str) -> AsyncIterator[str]:
    yield x[:1]
    yield x[1:]


def late(x: str) -> Any:
    return coroutine(x)


def positional(x: str, /) -> str:
    return x


class Callable_:
    def __call__(self, x: str) -> str:
        return x


class AsyncCallable:
    async def __call__(self, x: str) -> str:
        return x


@pytest.mark.parametrize(
    ("target", "output"),
    [
        (coroutine, "abc"),
        (plain, "abc"),
        (pieces, "abc"),
        (numbers, [0, 1, 2]),
        (returning, "abc"),
        (apieces, "abc"),
        (late, "abc"),
        (positional, "abc"),
        (Callable_(), "abc"),
        (AsyncCallable(), "abc"),
        (functools.partial(coroutine), "abc"),
        (lambda x: x, "abc"),
    ],
)
def test_every_kind_of_callable_runs(target: Any, output: Any) -> None:
    assert run(load_program(target), x="abc") == output


def test_a_module_instance_is_a_program_with_its_own_parameters() -> None:
    class Shift(ao.Module):
        def __init__(self) -> None:
            self.by = ao.parameter(1, name="shift.by")

        def __call__(self, x: int) -> Any:
            return self.by + x

    program = load_program(Shift())
    assert "shift.by" in program.parameters
    assert run(program, x=2) == 3


def test_the_context_reaches_worker_threads() -> None:
    hello = ao.prompt("hello", name="t.hello")

    def read(x: str) -> str:
        return hello.value

    async def main() -> Any:
        with ao.Candidate({"t.hello": "changed"}).active():
            return await load_program(read).run(Example(inputs={"x": ""}))

    assert asyncio.run(main()) == "changed"


def test_a_hanging_sync_function_is_abandoned_and_counted_and_its_end_too() -> None:
    go = threading.Event()

    def hang(x: str) -> str:
        go.wait(60)
        return x

    program = load_program(hang)
    with pytest.raises(TimeoutError):
        run(program, timeout=0.05, x="a")
    counts = [program.threads.abandoned]
    go.set()
    for _ in range(3000):
        counts.append(program.threads.abandoned)
        if counts[-1] == 0:
            break
        threading.Event().wait(0.02)
    assert (counts[0], counts[-1]) == (1, 0)


def test_odd_exceptions_come_out_as_errors() -> None:
    def stop(x: str) -> str:
        raise StopIteration(x)

    def cancelled(x: str) -> str:
        raise asyncio.CancelledError

    for target in (stop, cancelled):
        with pytest.raises(RuntimeError, match="the function raised"):
            run(load_program(target), x="a")
