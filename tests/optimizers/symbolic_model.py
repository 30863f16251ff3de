"""An optimizer's model for tests of symbolic learning: answers by what it is asked for, and remembers everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from agentopt.models import FunctionLM, Request

Answer = Mapping[str, Any] | str | Callable[[Request], Any]
LOSS, GRADIENT = "comments", "suggestion"


class Model(FunctionLM):
    """`answers`: a key of the wanted object → the answer to questions that want it; the first key that fits counts.

    Questions without a schema (repairs) are told apart by the answer's form that the conversation asked for.
    """

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        super().__init__(self._reply)
        self.name = "fake/model-70b"
        self.answers = {
            LOSS: {"comments": "The result is wrong."},
            GRADIENT: {"suggestion": "Do better.", "demand_on_previous": "Give better input."},
            **answers,
        }
        self.requests: list[Request] = []

    def _reply(self, request: Request) -> Any:
        self.requests.append(request)
        kind = self.kind(request)
        answer = self.answers.get(kind, "I cannot say.")
        answer = answer(request) if callable(answer) else answer
        return answer if isinstance(answer, (str, BaseException)) else json.dumps(answer)

    def kind(self, request: Request) -> str:
        """Which answer a request wants."""
        wanted = (request.schema or {}).get("properties")
        text = " ".join(f'"{name}":' for name in wanted) if wanted is not None else question(request)
        return next((key for key in self.answers if f'"{key}":' in text), "")

    def asked(self, kind: str) -> list[Request]:
        """The first turns of conversations of one kind."""
        return [request for request in self.requests if self.kind(request) == kind and len(request.messages) == 2]


def question(request: Request) -> str:
    """The first user turn."""
    return str(next(turn["content"] for turn in request.messages if turn["role"] == "user"))


def last(request: Request) -> str:
    """The last turn."""
    return str(request.messages[-1]["content"])
