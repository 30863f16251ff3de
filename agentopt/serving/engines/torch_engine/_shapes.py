"""The JSON of replies, as OpenAI's API has it: whole, or as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from agentopt.serving.engines.torch_engine._sampling import Picked
from agentopt.serving.engines.torch_engine._wire import Ask


class Shapes:
    """For one request.

    Args:
        ask: the request.
        tokenizer: to name tokens in log-probabilities.
    """

    def __init__(self, ask: Ask, tokenizer: Any) -> None:
        self._ask, self._tokenizer = ask, tokenizer
        self._id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The body of a reply."""
        kind = "chat.completion" if self._ask.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, picks: Sequence[Picked], reason: str) -> dict[str, Any]:
        """One of its replies."""
        found: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(picks)}
        if self._ask.chat:
            return {**found, "message": {"role": "assistant", "content": text}}
        return {**found, "text": text}

    def event(
        self, index: int, text: str, picks: Sequence[Picked] = (), reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """One event of a stream."""
        found: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(picks)}
        if not self._ask.chat:
            return {**self._head("text_completion"), "choices": [{**found, "text": text}]}
        delta = {"role": "assistant", "content": ""} if first else {"content": text} if reason is None or text else {}
        return {**self._head("chat.completion.chunk"), "choices": [{**found, "delta": delta}]}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The event that says how many tokens there were."""
        kind = "chat.completion.chunk" if self._ask.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._ask.model}

    def _logprobs(self, picks: Sequence[Picked]) -> dict[str, Any] | None:
        if self._ask.sampling.logprobs is None or not picks:
            return None
        if self._ask.chat:
            return {
                "content": [
                    {**self._named(pick.token, pick.logprob), "top_logprobs": [self._named(*pair) for pair in pick.top]}
                    for pick in picks
                ]
            }
        names = [self._text(pick.token) for pick in picks]
        tops = [{self._text(token): value for token, value in pick.top} for pick in picks]
        return {"tokens": names, "token_logprobs": [pick.logprob for pick in picks], "top_logprobs": tops}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        found: Any = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return str(found)


def usage_of(prompt: int, completion: int) -> dict[str, int]:
    """As replies count tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
