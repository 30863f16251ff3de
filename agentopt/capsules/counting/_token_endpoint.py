"""Counting by asking the server that will read the text: the /tokenize of vLLM and of llama.cpp."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit, urlunsplit

from agentopt.errors import UserError

_TRIAL = "a b"
_REMEMBERED = 1 << 16
_AT_ONCE = 8
_SECONDS = 30.0


class Endpoint:
    """Tokens as a server counts them.

    `url` is the server's address or that of its /tokenize; `?model=NAME` names one of several models. Which of the two
    forms the server speaks is found by a trial request before the first count.
    """

    exact = True

    def __init__(self, url: str) -> None:
        import httpx

        self.name = url
        parts = urlsplit(url)
        path = parts.path.rstrip("/")
        for known in ("/tokenize", "/v1"):
            path = path.removesuffix(known)
        self._base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._model = next(iter(parse_qs(parts.query).get("model", [])), None)
        here = (parts.hostname or "") in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
        self._client = httpx.Client(timeout=_SECONDS, trust_env=not here)  # no proxy stands before this machine
        self._form: str | None = None
        self._counts: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, text: str) -> int:
        """Tokens of `text`, remembered."""
        if not text:
            return 0
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        key = hashlib.sha256(text.encode()).digest()
        with self._lock:
            if key in self._counts:
                self._counts.move_to_end(key)
                return self._counts[key]
        counted = self._ask(text)
        with self._lock:
            self._counts[key] = counted
            while len(self._counts) > _REMEMBERED:
                self._counts.popitem(last=False)
        return counted

    def count_many(self, texts: Sequence[str]) -> list[int]:
        """`count` of each, a few requests at a time."""
        if len(texts) < 2:
            return [self.count(text) for text in texts]
        self._speak()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.count, texts))

    def count_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> int:
        """Tokens of chat messages in the template of the served model."""
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True}
        if tools:
            body["tools"] = list(tools)
        if self._speak() == "prompt":
            return self._number(self._post("/tokenize", {**body, **self._named()}))
        reply = self._post("/apply-template", body)
        shown = f"{reply!s:.80}"
        prompt = cast("dict[str, Any]", reply).get("prompt") if isinstance(reply, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"tokenizer {self.name}: /apply-template gave no prompt; found {shown}.")
        return self._number(self._post("/tokenize", {"content": prompt, "parse_special": True}))

    def _named(self) -> dict[str, Any]:
        return {} if self._model is None else {"model": self._model}

    def _speak(self) -> str:
        """The form that this server answers to."""
        if self._form is None:
            refusals: list[str] = []
            for form in ("content", "prompt"):
                try:
                    if self._ask(_TRIAL, form) > 0:
                        self._form = form
                        return form
                    refusals.append("no tokens")
                except _Refused as error:
                    refusals.append(str(error))
            raise UserError(
                f"tokenizer {self.name}: neither the llama.cpp form nor the vLLM form of /tokenize was understood "
                f"({'; '.join(refusals)}); give the address of a server that has it, or --tokenizer PATH."
            )
        return self._form

    def _ask(self, text: str, form: str | None = None) -> int:
        if (form or self._speak()) == "content":
            body: dict[str, Any] = {"content": text, "add_special": False, "parse_special": False}
        else:
            body = {"prompt": text, "add_special_tokens": False, **self._named()}
        return self._number(self._post("/tokenize", body))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        import httpx

        try:
            reply = self._client.post(self._base + path, json=body)
        except httpx.HTTPError as error:
            raise UserError(
                f"tokenizer {self.name}: no answer from {self._base}{path} ({type(error).__name__}); start the server, "
                "or use --tokenizer PATH or bytes."
            ) from error
        if reply.status_code != 200:
            raise _Refused(f"tokenizer {self.name}: {path} answered {reply.status_code}: {reply.text:.120}")
        try:
            return reply.json()
        except ValueError as error:
            raise _Refused(f"tokenizer {self.name}: {path} answered no JSON: {reply.text:.80}") from error

    def _number(self, reply: Any) -> int:
        shown = f"{reply!s:.80}"
        found = cast("dict[str, Any]", reply) if isinstance(reply, dict) else {}
        count, tokens = found.get("count"), found.get("tokens")
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return count
        if isinstance(tokens, list):
            return len(cast("list[Any]", tokens))
        raise _Refused(f"tokenizer {self.name}: found {shown}, expected a count or tokens")


class _Refused(UserError):
    """The server answered, but not with a count."""
