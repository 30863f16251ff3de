"""A folder as a language model: it answers chat requests in this process, from an adapter or with the facts in context.

    ao.configure(models={"agent": FolderLM("meta")})      # or "fold:meta", in agentopt.toml and for --model as well

A request that names an adapter is answered from it: its facts are not in the prompt, and its prompt tokens are counted
without them. Where the folder's gate does not trust fold or answer, the facts are read in context instead and counted.
A request without an adapter is answered by the base, with the lines of the turns before as the facts and the last user
turn as the question; with one, those lines stand before the question as well. A server makes the same prompts with the
META folder's chat_template.jinja. Decoding is greedy, so replies are a pure function of the request and of the META
folder; `temperature`, `top_p` and `stop` change nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import anyio.to_thread

from agentopt import graph
from agentopt.errors import RunError, UserError
from agentopt.graph import Usage
from agentopt.models import LMRefused, Message, Reply, Request
from agentopt.models._doubles import DirectLM
from agentopt.weights.fold._chat import read_chat
from agentopt.weights.fold._files import CARD, META, read_meta

if TYPE_CHECKING:
    from agentopt.weights.fold._adapter import Adapter
    from agentopt.weights.fold._answers import Answer
    from agentopt.weights.fold._folder import Folder
    from agentopt.weights.fold._incontext import Prefix

_PROMPT = 2
"""Counts the ways in which requests have become prompts: replies that an older one was given must not be reused."""
_ADAPTERS = 64
"""Adapters that stay in memory."""
_PREFIXES = 4
"""Contexts whose keys and values stay in memory."""


class FolderLM(DirectLM):
    """A client over a META folder; also usable directly as an LM. Safe to use concurrently: one call at a time runs.

    Entered (`with` or `async with`), it loads its model, and frees it at the end. A client that a name such as
    "fold:meta" makes is not entered by anybody: like every client it loads at its first call.

    Args:
        folder: a META folder, or an open `Folder`.
        gate: fall back to the facts in context where the folder's gate says so; False answers from the adapter always.
        device: where the base is loaded.

    Raises:
        UserError: there is no META folder at the path.
    """

    deterministic = True
    own_timeout = True
    """A call ends by itself, after the tokens that meta-training saw; it cannot be stopped in the middle."""

    def __init__(self, folder: str | Path | Folder, *, gate: bool = True, device: Any = None) -> None:
        self.gate = gate
        if isinstance(folder, (str, Path)):
            path = Path(folder).expanduser()
            head = read_meta(path)
            decides = [head["meta_hash"], head["base"]["hash"], head["gate"], head["max_new"]]
            self._shared, where = shared_folder(path, device), path.resolve().name
        else:
            thresholds = None if folder.gate is None else folder.gate.to_dict()
            decides = [folder.meta_hash, folder.base_hash, thresholds, folder.kit.max_new]
            self._shared, where = Shared(folder), str(folder.base_name or "folder")
        content = hashlib.sha256(json.dumps([_PROMPT, *decides, gate], sort_keys=True).encode("ascii")).hexdigest()
        self.name = f"fold:{where}#{content[:12]}"

    async def send(self, request: Request) -> Reply:
        """One answer.

        Raises:
            LMRefused: images, tools or a schema, which a folder knows nothing of.
            UserError: an adapter that is not there, or of another base; facts that do not fit into the window.
        """
        lines, question = _read(request)
        with graph.operation("fold", kind="op") as op:
            answer, prompt, said = await anyio.to_thread.run_sync(self._answer, request, lines, question)
            op.annotate(
                source=answer.source, recall=answer.recall, reason=answer.reason, recalled=list(answer.recalled)
            )
            if math.isfinite(answer.margin):
                op.annotate(margin=answer.margin)
            op.set_output(answer.text)
        usage = Usage(input_tokens=prompt, output_tokens=said, calls=1, tries=1)
        return Reply(answer.text, usage=usage, cost=0.0, model=self.name)

    async def stream(self, request: Request) -> AsyncIterator[str | Reply]:
        """The answer in one piece."""
        reply = await self.send(request)
        yield reply.text
        yield reply

    def adapter_problem(self, adapter: str) -> str | None:
        """Whether the adapter's folder is there."""
        if (Path(adapter).expanduser() / CARD).is_file():
            return None
        return f"the adapter's folder is not here (it would have a {CARD}; copy it, or tune again)"

    def __enter__(self) -> Self:
        with self._shared.lock:
            _ = self._shared.folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await anyio.to_thread.run_sync(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await anyio.to_thread.run_sync(self.close)

    async def aclose(self) -> None:
        """Nothing to do: the folder stays loaded for the next run; `close()` frees it."""

    def close(self) -> None:
        """Free the model, when it was loaded from a path; a later call loads it again."""
        self._shared.close()

    def _answer(self, request: Request, lines: list[str], question: str) -> tuple[Answer, int, int]:
        """The answer, prompt tokens and generated tokens."""
        with self._shared.lock:
            folder = self._shared.folder
            codec, choices = folder.codec, request.choices or ()
            most = min(request.options.max_tokens, folder.kit.max_new)
            if request.adapter is not None:
                adapter = self._shared.adapter(Path(request.adapter).expanduser())
                answer = folder.ask(adapter, question, choices=choices, context=lines, gate=self.gate, max_new=most)
                facts, asked = adapter.facts if answer.source != "folded" else (), codec.question(question, lines)
            else:
                answer = self._shared.read(lines, question, choices, most)
                facts, asked = tuple(lines), codec.question(question)
            prompt = len(codec.context(facts)) + len(asked)
            said = len(codec.ids(" ".join([*answer.recalled, answer.text])))
            return answer, prompt, said


class Shared:
    """An open folder that several clients (and the folding of documents) use one after the other."""

    def __init__(self, folder: Folder | Path, device: Any = None) -> None:
        # Of the folder where it was given: two clients over one model must not take its adapters from each other.
        self.lock = threading.RLock() if isinstance(folder, Path) else folder.lock
        self._source = folder
        self._device = device
        self._folder: Folder | None = None
        self._adapters: OrderedDict[tuple[str, int], Adapter] = OrderedDict()
        self._prefixes: OrderedDict[tuple[str, ...], Prefix] = OrderedDict()

    @property
    def folder(self) -> Folder:
        """The folder, loaded when it is needed first; hold `lock`."""
        if not isinstance(self._source, Path):
            return self._source
        if self._folder is None:
            from agentopt.weights.fold._folder import Folder

            self._folder = Folder.load(self._source, device=self._device)
        return self._folder

    def adapter(self, path: Path) -> Adapter:
        """The adapter in a folder, which is read again when it was written again; hold `lock`."""
        try:
            key = (str(path.resolve()), (path / CARD).stat().st_mtime_ns)
        except OSError:
            raise UserError(f"{path}: found no adapter there (no {CARD}); copy the folder, or fold it again.") from None
        if key not in self._adapters:
            self._adapters[key] = self.folder.load_adapter(path)
            while len(self._adapters) > _ADAPTERS:
                self._adapters.popitem(last=False)
        self._adapters.move_to_end(key)
        return self._adapters[key]

    def read(self, facts: Sequence[str], question: str, choices: Sequence[str], max_new: int) -> Answer:
        """What the base answers with the facts in context, which are read once for several questions; hold `lock`."""
        folder = self.folder
        with folder.base_in_use():
            reader = folder.reader(max_new)
            if not facts:
                return _without_facts(folder, reader, question, choices, max_new)
            key = tuple(facts)
            if key not in self._prefixes:
                self._prefixes[key] = reader.prefix(facts)
                while len(self._prefixes) > _PREFIXES:
                    self._prefixes.popitem(last=False)
            self._prefixes.move_to_end(key)
            return reader.ask_many(self._prefixes[key], [question], choices)[0]

    def close(self) -> None:
        """Forget adapters and contexts, and the folder unless it was given."""
        with self.lock:
            self._adapters.clear()
            self._prefixes.clear()
            if self._folder is not None:
                self._folder.close()
                self._folder = None


def _without_facts(folder: Folder, reader: Any, question: str, choices: Sequence[str], max_new: int) -> Answer:
    from agentopt.weights.fold._answers import Answer, write_answers

    prompt = folder.codec.lead + folder.codec.question(question)
    (one,) = write_answers(folder.model, reader.codec, [prompt], [choices], max_new=max_new)
    return Answer(one.text, "in-context", margin=one.margin, logprob=one.logprob, reason="no facts were given")


_open: dict[tuple[str, int, str], Shared] = {}
_opening = threading.Lock()


def shared_folder(path: Path, device: Any = None) -> Shared:
    """The folder of a META folder, one for the whole process (another one after it was trained again)."""
    try:
        key = (str(path.resolve()), (path / META).stat().st_mtime_ns, str(device))
    except OSError as error:
        raise UserError(f"{path}: {META} cannot be read ({error.strerror or error}).") from None
    with _opening:
        for known in list(_open):
            if known[::2] == key[::2] and known != key:
                del _open[known]  # whoever still uses the folder as it was keeps it
        return _open.setdefault(key, Shared(path, device))


def fold_once(meta: Path, facts: Sequence[str], out: Path) -> Mapping[str, Any]:
    """Fold the facts into the adapter folder `out` unless it is there already; what its `fold.json` says.

    Raises:
        UserError: no META folder, or facts that cannot be folded.
        RunError: folding broke off, or the adapter cannot be written.
    """
    card = out / CARD
    if not card.is_file():
        shared = shared_folder(meta)
        partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
        with shared.lock:
            adapter = shared.folder.fold(list(facts))
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.parent.mkdir(parents=True, exist_ok=True)
                adapter.save(partial)
                partial.rename(out)  # whole or not at all, also when the process is killed
            except OSError as error:
                shutil.rmtree(partial, ignore_errors=True)
                if not card.is_file():  # else another process has folded the same meanwhile
                    raise RunError(f"{out}: the adapter cannot be written ({error.strerror or error}).") from error
    return json.loads(card.read_text(encoding="utf-8"))


# ---- requests


def _read(request: Request) -> tuple[list[str], str]:
    """Lines before the question (facts, instructions, demonstrations), and the question.

    Raises:
        LMRefused: the request asks for something else than an answer in text.
    """
    if request.tools or request.schema is not None:
        what = "call tools" if request.tools else "keep to a JSON schema"
        raise LMRefused(f"a folder answers questions and cannot {what}", status=400)
    turns = list(request.messages)
    if not turns or turns[-1]["role"] != "user":
        raise LMRefused("a folder answers the last user turn; found a request that does not end with one", status=400)
    if any(not _is_text(turn) for turn in turns):
        raise LMRefused("a folder reads text only; a message has an image or another part", status=400)
    return read_chat(turns)


def _is_text(turn: Message) -> bool:
    content: Any = turn.get("content")
    parts = cast("list[Any]", content) if isinstance(content, list) else None
    if parts is None:
        return isinstance(content, str)
    return all(isinstance(part, dict) and cast("Message", part).get("type") == "text" for part in parts)
