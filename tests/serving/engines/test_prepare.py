"""Models made ready for engines: once, by content, whatever is killed and whoever else does the same."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from agentopt.errors import RunError, UserError
from agentopt.serving.engines import Chosen, Event, ModelReady, Prepared, Working, prepare
from agentopt.serving.engines import _prepare as module
from agentopt.serving.engines._interpreters import Interpreter, own
from tests.serving.engines.running import gone

pytestmark = pytest.mark.anyio

VLLM = Chosen("vllm", "for the test", sys.executable, cpu=True)
WORKER = Path(__file__).with_name("preparing.py")


@pytest.fixture(autouse=True)
def quick_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORKER", (str(WORKER),))
    monkeypatch.setattr(module, "converter", _this_python)


def _this_python(first: str | None, modules: tuple[str, ...]) -> Interpreter:
    return own()


def _gguf(place: Path, text: str = "") -> Path:
    path = place / "source" / "small.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF" + text.encode())
    return path


def _made(place: Path) -> list[int]:
    file = place / "source" / "made"
    return [int(line) for line in file.read_text(encoding="utf-8").split()] if file.exists() else []


async def _prepare(source: Path | str, told: list[Event] | None = None, quantize: str | None = None) -> Prepared:
    on_event = None if told is None else told.append
    return await prepare(str(source), VLLM, quantize=quantize, cache=Path("cache"), dtype="float32", on_event=on_event)


async def test_model_is_converted_once_and_found_again_by_its_content(tmp_path: Path) -> None:
    told: list[Event] = []
    source = _gguf(tmp_path)
    first = await _prepare(source, told)
    assert first.name == "small" and not first.cached and first.path.is_absolute()
    assert Working("half of it", 1, 2) in told and isinstance(told[-1], ModelReady)
    source.rename(source.with_name("other.gguf"))
    second = await _prepare(source.with_name("other.gguf"))
    assert second.name == "other" and not second.cached  # the folder is called by the model's name
    again = await _prepare(source.with_name("other.gguf"))
    assert again.cached and again.path == second.path
    source.with_name("other.gguf").write_bytes(b"GGUF of another content")
    changed = await _prepare(source.with_name("other.gguf"))
    assert not changed.cached and changed.path != second.path
    assert (await _prepare(source.with_name("other.gguf"), quantize="rf8")).path != changed.path
    assert len(_made(tmp_path)) == 4


async def test_two_servers_at_once_do_the_work_once(tmp_path: Path) -> None:
    source, told = _gguf(tmp_path, "slow"), list[Event]()
    async with asyncio.TaskGroup() as group:
        both = [group.create_task(_prepare(source, told)) for _ in range(2)]
        while not any(isinstance(event, Working) and "waiting" in event.what for event in told):
            await asyncio.sleep(0.01)
        (source.parent / "go").touch()
    assert both[0].result().path == both[1].result().path and len(_made(tmp_path)) == 1


async def test_killed_worker_is_told_and_the_next_call_does_it_anew(tmp_path: Path) -> None:
    source = _gguf(tmp_path, "slow")
    task = asyncio.create_task(_prepare(source))
    while not _made(tmp_path):
        await asyncio.sleep(0.01)
    os.kill(_made(tmp_path)[0], signal.SIGKILL)
    with pytest.raises(RunError, match="ended early"):
        await task
    (source.parent / "go").touch()
    assert not (await _prepare(source)).cached


async def test_cancelled_call_takes_its_worker_along(tmp_path: Path) -> None:
    source = _gguf(tmp_path, "slow")
    task = asyncio.create_task(_prepare(source))
    while not _made(tmp_path):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(_made(tmp_path))


SERVER = """
import asyncio, sys
from tests.serving.engines import test_prepare as t
t.module._WORKER, t.module.converter = (str(t.WORKER),), t._this_python
asyncio.run(t._prepare(sys.argv[1]))
"""


async def test_worker_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    source = _gguf(tmp_path, "slow")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    server = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(source), env=env)
    while not _made(tmp_path):
        await asyncio.sleep(0.01)
    server.kill()
    await server.wait()
    assert gone(_made(tmp_path))


@pytest.mark.parametrize(("text", "error"), [("refused", UserError), ("broken", RunError)])
async def test_errors_of_the_worker_are_raised_here(tmp_path: Path, text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"the model is refused|the disk is full"):
        await _prepare(_gguf(tmp_path, text))


async def test_folder_is_served_as_it_is_and_quantized_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    plain = await prepare(str(folder), VLLM, cache=tmp_path / "cache")
    assert (plain.path, plain.name, plain.cached, plain.format) == (folder, "model", True, None)
    (tmp_path / "source" / "model" / "notes.log").touch()  # says nothing of the model


@pytest.mark.parametrize(
    ("engine", "quantize", "words"),
    [
        ("embedded", "rf8", "GGUF files are quantized already"),
        ("transformers", "fp8", "expected rf8-gg, rf8, rf8-strict, e3m4"),
        ("vllm", "q4", "expected rf8-gg, rf8, rf8-strict, e3m4, fp8, int8"),
    ],
)
async def test_quantizing_that_does_not_fit_is_refused(tmp_path: Path, engine: str, quantize: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        await prepare(str(_gguf(tmp_path)), Chosen(engine, "test"), quantize=quantize, cache=tmp_path / "cache")


async def test_embedded_engine_takes_the_file_itself(tmp_path: Path) -> None:
    source = _gguf(tmp_path)
    found = await prepare(str(source), Chosen("embedded", "test"), cache=tmp_path / "cache")
    assert found.path == source and found.cached and not _made(tmp_path)


async def test_real_worker_quantizes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from tests.weights.tiny import tiny

    monkeypatch.undo()
    model, tokenizer = tiny(("red", "green", "blue"))
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    told: list[Event] = []
    chosen = Chosen("transformers", "for the test")
    for cached in (False, True):
        found = await prepare(
            str(tmp_path / "small"), chosen, quantize="rf8", cache=tmp_path / "cache", on_event=told.append
        )
        assert found.cached is cached and found.format == "rf8"
    assert '"rf8"' in (found.path / "config.json").read_text(encoding="utf-8")
    assert any(isinstance(event, Working) and event.what.startswith("quantizing ") and event.total for event in told)
    with pytest.raises(UserError, match="found weights quantized by agentopt"):
        await prepare(str(found.path), chosen, quantize="rf8", cache=tmp_path / "cache")
