"""A model in the form that an engine takes: unpacked, converted, quantized; done once and kept by content.

The work is done by a process of its own (`prepare_worker`): torch and the weights never enter the server, and a server
that is killed takes it along. What is finished appears under its final name in one step; what a killed process left is
gone on with or thrown away; a lock keeps two servers from doing the same work twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.models._embedded_engine import engine_threads
from agentopt.models._embedded_files import PACKAGED, fetch
from agentopt.serving.engines import _events as events
from agentopt.serving.engines._choose import ARCHIVE, FOLDER, GGUF, HUB, NEEDS, Chosen, gguf_file, model_kind
from agentopt.serving.engines._digest import digest
from agentopt.serving.engines._interpreters import converter
from agentopt.serving.engines._launch import engine_environment
from agentopt.serving.engines._machine import default_dtype

FORMATS = ("rf8-gg", "rf8", "rf8-strict", "e3m4")
EXPORTS = ("fp8", "int8")
RECIPE = 1
"""Counts changes of what is made from the same model: folders of an older recipe are not used."""
_WORKER: tuple[str, ...] = ("-P", "-m", "agentopt.serving.engines.prepare_worker")
_MARK = b"@prepare "


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that an engine can be started with.

    Attributes:
        path: a model folder, or a GGUF file for the embedded engine.
        name: what clients may call it: "smollm2-135m-instruct", the folder's name, the hub id.
        source: what it was made from.
        format: how it was quantized now; None: it was not.
        cached: nothing had to be done.
        seconds: that it took.
    """

    path: Path
    name: str
    source: str
    format: str | None = None
    cached: bool = True
    seconds: float = 0.0


async def prepare(
    model: str,
    chosen: Chosen,
    *,
    quantize: str | None = None,
    cache: Path,
    dtype: str | None = None,
    on_event: events.OnEvent | None = None,
) -> Prepared:
    """Make a model ready for an engine, or find what an earlier call made.

    Args:
        model: as for `choose_engine`.
        chosen: the engine.
        quantize: rf8-gg, rf8, rf8-strict or e3m4; for vLLM also fp8 and int8.
        cache: folder for what is made (`models/NAME-KEY`).
        dtype: number type of a converted model; None: what the machine computes in.
        on_event: told `Working` and at last `ModelReady`, on the event loop.

    Raises:
        UserError: there is no such model, it cannot be quantized so, or what is needed is not installed.
        RunError: the disk is full, or the work failed.
    """
    job = _Job(model, chosen, quantize, cache, dtype or default_dtype(), on_event or (lambda event: None))
    return await job.run()


class _Job:
    """One call of `prepare`."""

    def __init__(
        self, model: str, chosen: Chosen, quantize: str | None, cache: Path, dtype: str, tell: events.OnEvent
    ) -> None:
        self.model, self.chosen, self.quantize, self.cache, self.dtype = model, chosen, quantize, cache, dtype
        self.tell = tell
        self.began = time.monotonic()

    async def run(self) -> Prepared:
        engine = self.chosen.engine
        if engine == "fake":
            return self._done(Path(self.model), model_name(self.model), self.model, cached=True)
        self._check_format()
        kind = await asyncio.to_thread(model_kind, self.model)
        name = model_name(self.model)
        if kind == GGUF:
            source = await self._gguf()
            if engine == "embedded":
                return self._done(source, name, str(source), cached=True)
        elif kind == HUB:
            source = Path(await self._work({"job": "fetch", "source": self.model}, NEEDS[HUB]))
        else:
            source = Path(self.model).expanduser()
        if kind in (FOLDER, HUB) and self.quantize is None:
            return self._done(source, name, self.model, cached=True)
        return await self._made(source, kind, name)

    def _check_format(self) -> None:
        if self.quantize is None:
            return
        engine = self.chosen.engine
        if engine == "embedded":
            raise UserError(
                f"quantize: found {self.quantize!r} for the embedded engine, whose GGUF files are quantized already; "
                "leave it out, or use --engine vllm or --engine transformers."
            )
        known = FORMATS + EXPORTS if engine == "vllm" else FORMATS
        if self.quantize not in known:
            raise UserError(f"quantize: found {self.quantize!r} for {engine}, expected {', '.join(known)}.")

    async def _gguf(self) -> Path:
        """The GGUF file; one on the hub is fetched."""
        found = gguf_file(self.model)
        if found is not None:
            return found
        self.tell(events.Working("fetching the model from the hub"))
        return await asyncio.to_thread(fetch, self.model)

    async def _made(self, source: Path, kind: str, name: str) -> Prepared:
        """A folder of ours, found or made."""
        found = await self._digest(source)
        job = "quantize" if self.quantize is not None else "unpack" if kind == ARCHIVE else "convert"
        dtype = self.dtype if job == "convert" else ""
        cpu = self.chosen.cpu and self.quantize in EXPORTS
        about = f"{RECIPE} {job} {self.quantize or ''} {dtype} {'cpu' if cpu else ''} {found}"
        key = hashlib.sha256(about.encode()).hexdigest()[:16]
        out = self.cache.absolute() / "models" / f"{_file_name(name)}-{key}"
        cached = (out / "config.json").is_file()
        if not cached:
            told = {"job": job, "source": str(source.absolute()), "out": str(out), "format": self.quantize}
            told |= {"dtype": dtype, "digest": found, "model": self.model, "cpu": cpu}
            await self._work(told, NEEDS[kind])
        return self._done(out, name, str(source), cached=cached)

    async def _digest(self, source: Path) -> str:
        loop, last = asyncio.get_running_loop(), [0.0]

        def tell(what: str, done: int, total: int) -> None:
            if time.monotonic() - last[0] > 0.2:  # from a thread; not for every block of a large file
                last[0] = time.monotonic()
                loop.call_soon_threadsafe(self.tell, events.Working(f"reading {what}", done, total))

        try:
            return await asyncio.to_thread(digest, source, self.cache / "digests", tell)
        except OSError as error:
            raise UserError(f"model {self.model!r}: {source} cannot be read ({error.strerror or error}).") from error

    def _done(self, path: Path, name: str, source: str, *, cached: bool) -> Prepared:
        seconds = time.monotonic() - self.began
        self.tell(events.ModelReady(str(path), cached, seconds))
        return Prepared(path, name, source, self.quantize, cached, seconds)

    # --- the worker --------------------------------------------------------------------------------------------------

    async def _work(self, job: dict[str, Any], needs: tuple[str, ...]) -> str:
        """Have a job done by a process of its own; gives what it says at last."""
        python = (await asyncio.to_thread(converter, self.chosen.python, needs)).python
        worker = await asyncio.create_subprocess_exec(
            *(python, *_WORKER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=engine_environment(python, OMP_NUM_THREADS=str(engine_threads())),
            start_new_session=True,
            limit=1 << 20,
        )
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(job).encode() + b"\n")
            return await self._listen(worker.stdout.readline)
        finally:
            # The worker ends when its stdin does: also when this process is killed.
            worker.stdin.close()
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    async def _listen(self, line_of: Callable[[], Any]) -> str:
        said: list[str] = []
        while line := await line_of():
            if not line.startswith(_MARK):
                said.append(line.decode("utf-8", "replace").rstrip())
                continue
            told: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            if "error" in told:
                raise (UserError if told["user"] else RunError)(told["error"])
            if "result" in told:
                return str(told["result"])
            self.tell(events.Working(told["what"], told.get("done", 0), told.get("total")))
        tail = "".join(f"\n    {one}" for one in said[-12:])
        raise RunError(f"preparing {self.model!r} ended early (out of memory?); the last lines:{tail or ' none'}")


def model_name(model: str) -> str:
    """What clients may call a model."""
    if model in ("embedded", PACKAGED):
        return PACKAGED.partition("/")[2]
    if model.startswith("hf:"):
        return Path(model).stem
    path = Path(model).expanduser()
    if path.suffix in (".gguf", ".ggz"):
        return path.stem
    if path.is_dir():
        return path.resolve().name
    return model


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60] or "model"
