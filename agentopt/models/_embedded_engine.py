"""The in-process llama.cpp engine: one worker thread computes, callers wait for futures.

Measured choices. Flash attention is off and every slot has key-value memory of its own: otherwise the last bits of a
probability depend on how much of the prompt came from the prefix cache (60 prompts, 11 of them differed) and on where
other prompts lie in the shared memory (a greedy text differed). Like this, and with the rules of `_embedded_slots`, all
are bit-equal: a reply is a pure function of its request, whatever ran before. One thread fewer than there are physical
cores, for prompt and generation alike: llama.cpp's threads spin, and one that cannot get a core stalls all others.
"""

from __future__ import annotations

import atexit
import importlib
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from agentopt.models._embedded_files import INSTALL_ENGINE
from agentopt.models._embedded_lock import MachineLock
from agentopt.models._embedded_slots import Slots
from agentopt.models._errors import LMError, LMRefused, LMTimeout, LMUnavailable, UnknownModel
from agentopt.models._protocol import Message

T = TypeVar("T")

_CONTEXT = 4096
"""Tokens of context of each slot below (94 MB of keys and values a slot for the packaged model)."""
_SLOTS = 4
"""Kept prompt prefixes: several candidates (or agent and optimizer) in turn do not evict one another's."""
_FORCE = 100.0
"""Added to the logits of candidate tokens: e^100 is far above any ratio of probabilities; float32 still holds it."""
_IDLE_SECONDS = 0.25
_EXIT_SECONDS = 30.0
"""A thread that is still in native code when the interpreter ends aborts the process. Generation stops at its next
token; a prompt in work cannot be stopped, and the longest one takes about this long on one slow core."""


def engine_threads() -> int:
    """Physical cores minus one, at least one."""
    return max(1, physical_cores() - 1)


def physical_cores() -> int:
    """Distinct (package, core) pairs among the CPUs this process may run on; logical CPUs where that is not told."""
    cpus: set[int] = (
        set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    )
    cores: set[tuple[str, str]] = set()
    for cpu in cpus:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((folder / "physical_package_id").read_text("ascii"), (folder / "core_id").read_text("ascii")))
        except OSError:
            return len(cpus)
    return len(cores) or 1


class Stop:
    """Why a generation should end early: its caller went away, its time is over, or the process exits."""

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._asked = threading.Event()
        self._deadline: float | None = None

    def ask(self) -> None:
        """Called from any thread."""
        self._asked.set()

    def start(self) -> None:
        """The engine begins with this job: its clock starts now, not while it waited for others."""
        self._deadline = None if self.timeout is None else time.monotonic() + self.timeout

    @property
    def late(self) -> bool:
        """The time is over."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def __bool__(self) -> bool:
        return self._asked.is_set() or self.late


class Loaded:
    """One loaded model. Every method runs in the engine's worker thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            llama: Any = importlib.import_module("xllamacpp")
        except ImportError as error:
            raise UnknownModel(f"the embedded engine is not installed: run {INSTALL_ENGINE}") from error
        key = secrets.token_hex(16)  # the library opens a loopback port; nobody else gets to use it
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.kv_unified = _CONTEXT * _SLOTS, _SLOTS, False
        params.n_gpu_layers, params.cache_ram_mib, params.warmup = 0, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = engine_threads()
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity, params.api_keys, params.ui, params.endpoint_slots = -1, [key], False, False
        try:
            self._server: Any = llama.Server(params)
        except (RuntimeError, ValueError) as error:
            raise UnknownModel(f"llama.cpp cannot load {path}: {error}") from error
        import httpx

        self._http = httpx.Client(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=30,
        )
        self._label_tokens: dict[str, tuple[int, ...]] = {}
        self._slots = Slots(_SLOTS)

    def close(self) -> None:
        """Free the model."""
        self._http.close()
        self._server = None

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The model's own chat template applied; a last assistant message is left open to be continued."""
        body: dict[str, Any] = {"messages": list(messages)}
        if tools:
            body["tools"] = list(tools)
        return str(self._post("/apply-template", body)["prompt"])

    def tokens(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Token ids; `special` adds the beginning token, where the model has one, and reads control tokens in it."""
        body = {"content": text, "add_special": special, "parse_special": special}
        return tuple(self._post("/tokenize", body)["tokens"])

    def label_tokens(self, text: str) -> tuple[int, ...]:
        """`tokens` of a label, remembered."""
        found = self._label_tokens.get(text)
        if found is None:
            found = self._label_tokens[text] = self.tokens(text)
        return found

    def place(self, prompt: Sequence[int]) -> int:
        """The slot that is to compute `prompt` next, cut back to what may be reused (see `_embedded_slots`)."""
        plan = self._slots.plan(prompt)
        if plan.first is not None:
            self.checked(
                self._server.handle_completions(
                    {"prompt": list(plan.first), "max_tokens": 1, "temperature": 0.0, "id_slot": plan.slot}
                )
            )
        return plan.slot

    def next_logprobs(
        self, slot: int, prompt: Sequence[int], candidates: Sequence[int], absolute: bool
    ) -> dict[int, float]:
        """Log-probability of each candidate as the next token: over the candidates, or over the whole vocabulary.

        Only the part of the prompt that the slot does not hold yet is computed, so a second look costs one token.
        """
        found = dict.fromkeys(candidates, 0.0)
        if len(candidates) > 1:
            how: dict[str, Any] = {"post_sampling_probs": True, "temperature": 1.0, "id_slot": slot}
            first = self._first_token(prompt, candidates, how)
            probs = {item["id"]: item["prob"] for item in first["top_probs"]}
            found = {token: math.log(max(probs.get(token, 0.0), 1e-45)) for token in candidates}
        if absolute:
            best = max(candidates, key=lambda token: found[token])
            shift = self._first_token(prompt, [best], {"temperature": 0.0, "id_slot": slot})["logprob"] - found[best]
            found = {token: value + shift for token, value in found.items()}
        return found

    def _first_token(self, prompt: Sequence[int], candidates: Sequence[int], how: dict[str, Any]) -> dict[str, Any]:
        """What llama.cpp tells of one next token that is forced to be among the candidates."""
        body = {
            "prompt": list(prompt),
            "max_tokens": 1,
            "samplers": ["temperature"],
            "seed": 1,
            "logprobs": len(candidates),
            "logit_bias": [[token, _FORCE] for token in candidates],
            "cache_prompt": True,
            **how,
        }
        reply = self.checked(self._server.handle_completions(body))
        return reply["choices"][0]["logprobs"]["content"][0]

    def chat(self, body: dict[str, Any], on_chunk: Callable[[dict[str, Any]], bool]) -> None:
        """Generate; each chunk of the OpenAI stream form goes to `on_chunk`, which returns True to stop."""
        slot = self._placed(body)

        def receive(chunk: Any) -> bool:
            # An exception must not cross the native frames; an error chunk is kept and raised by the caller.
            return on_chunk(cast("dict[str, Any]", chunk))

        try:
            self._server.handle_chat_completions({**body, "id_slot": slot, "stream": True}, receive)
        except ValueError as error:
            raise LMRefused(f"the embedded engine rejected the request: {error}", status=400) from error

    def chat_once(self, body: dict[str, Any]) -> dict[str, Any]:
        """Generate without a stream (tool calls come whole)."""
        slot = self._placed(body)
        try:
            return self.checked(self._server.handle_chat_completions({**body, "id_slot": slot}))
        except ValueError as error:
            raise LMRefused(f"the embedded engine rejected the request: {error}", status=400) from error

    def _placed(self, body: dict[str, Any]) -> int:
        text = self.prompt_text(body["messages"], body.get("tools") or ())
        return self.place(self.tokens(text, special=True))

    def checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        """The reply, or the error it carries as an exception."""
        error = reply.get("error")
        if error is None:
            return reply
        status, message = int(error.get("code", 500)), str(error.get("message", error))
        if error.get("type") == "exceed_context_size_error":
            message = f"the prompt has {error.get('n_prompt_tokens')} tokens, {self.path.name} takes at most {_CONTEXT}"
        kind = LMRefused if 400 <= status < 500 else LMUnavailable
        raise kind(f"embedded engine: {message}", status=status)

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.checked(self._http.post(route, json=body).json())


class _Job(Generic[T]):
    def __init__(self, path: Path, work: Callable[[Loaded], T], stop: Stop) -> None:
        self.path, self.work, self.stop = path, work, stop
        self.future: Future[T] = Future()


class Engine:
    """The worker thread, its queue, and the models it has loaded. One per process."""

    def __init__(self, lock: MachineLock | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = lock or MachineLock()
        self._loaded: dict[Path, Loaded] = {}
        self._closing = threading.Event()
        self._running: _Job[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="agentopt-engine", daemon=True)
        self._thread.start()

    def submit(self, path: Path, work: Callable[[Loaded], T], stop: Stop) -> Future[T]:
        """Queue `work(model)`; jobs run one after the other in the order they came."""
        job = _Job(path, work, stop)
        self._jobs.put(job)
        return job.future

    def close(self, timeout: float = _EXIT_SECONDS) -> None:
        """Drop queued jobs, stop the running one at its next token, free the models; at most `timeout` seconds."""
        self._closing.set()
        self._jobs.put(None)
        running = self._running
        if running is not None:
            running.stop.ask()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def closing(self) -> bool:
        """`close` was called."""
        return self._closing.is_set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS) if self._lock.held else self._jobs.get()
            except queue.Empty:
                self._lock.release()
                continue
            if job is not None and job.future.set_running_or_notify_cancel():
                self._serve(job)
        for model in self._loaded.values():
            model.close()
        self._loaded.clear()
        self._lock.release()
        self._refuse_queued()

    def _serve(self, job: _Job[Any]) -> None:
        try:
            if not self._lock.acquire(give_up=lambda: bool(job.stop) or self._closing.is_set()):
                raise LMUnavailable("the embedded engine was not needed any more")
            model = self._loaded.get(job.path)
            if model is None:
                model = self._loaded[job.path] = Loaded(job.path)
            job.stop.start()
            self._running = job
            if self._closing.is_set():  # `close` may have looked for a running job just before there was one
                job.stop.ask()
            result = job.work(model)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to the caller who waits
            job.future.set_exception(error)
        else:
            job.future.set_result(result)
        finally:
            self._running = None

    def _refuse_queued(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None and job.future.set_running_or_notify_cancel():
                job.future.set_exception(LMUnavailable("the embedded engine is closed: the process is exiting"))


_guard = threading.Lock()
_engines: dict[int, Engine] = {}
"""Process id → engine: a forked child has no worker thread and starts its own engine."""


def engine() -> Engine:
    """This process's engine, started on first use and closed at interpreter exit."""
    found = _engines.get(os.getpid())
    if found is not None and not found.closing:
        return found
    with _guard:
        found = _engines.get(os.getpid())
        if found is None or found.closing:
            if not _engines:
                atexit.register(close_engine)
            _engines.clear()
            found = _engines[os.getpid()] = Engine()
        return found


def close_engine() -> None:
    """Close this process's engine, if it has one; the next call starts another."""
    found = _engines.get(os.getpid())
    if found is not None:
        found.close()


def stopped_error(stop: Stop) -> LMError:
    """What to raise when a generation was ended early."""
    if stop.late:
        return LMTimeout(f"the embedded engine gave no full reply within {stop.timeout:g} s", retryable=False)
    return LMUnavailable("the embedded call was cancelled")
