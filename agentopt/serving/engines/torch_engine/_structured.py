"""Replies that are JSON of a given schema: llguidance (MIT), where it is installed, says which tokens may come next."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from agentopt.serving._types import Refusal

ANY_OBJECT = '{"type": "object"}'
INSTALL = "pip install llguidance"


def grammar_of(schema: str) -> str:
    """The grammar of a JSON schema.

    Raises:
        Refusal: 400: llguidance is not installed, or the schema is none.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise Refusal(
            400,
            f"response_format needs llguidance, which is not installed with this engine: {INSTALL}.",
            param="response_format",
        )
    matcher: Any = importlib.import_module("llguidance").LLMatcher
    grammar: Any = None
    try:
        grammar = matcher.grammar_from_json_schema(schema)
        problem = matcher.validate_grammar(grammar, None)
    except (ValueError, TypeError, RuntimeError) as error:
        problem = str(error)
    if problem:
        first = str(problem).strip().splitlines()[0]
        raise Refusal(400, f"response_format: the schema cannot be used: {first}.", param="response_format")
    return str(grammar)


def schema_of(body: Any) -> str | None:
    """The JSON schema that `response_format` asks for; None for plain text.

    Raises:
        Refusal: 400: it is not as OpenAI defines it.
    """
    if body is None:
        return None
    asked = _object(body)
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    schema: Any = _object(asked.get("json_schema")).get("schema")
    if kind != "json_schema" or not isinstance(schema, dict):
        raise Refusal(
            400,
            "response_format: expected type text, json_object, or json_schema with json_schema.schema.",
            param="response_format",
        )
    return json.dumps(schema)


def _object(found: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


class Grammars:
    """What of a tokenizer all replies share.

    Args:
        tokenizer: of the model.
        vocabulary: width of its logits.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    @functools.cached_property
    def _shared(self) -> Any:
        return importlib.import_module("llguidance.hf").from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)

    def start(self, grammar: str) -> Grammar:
        """For one reply."""
        matcher: Any = importlib.import_module("llguidance").LLMatcher(self._shared, grammar)
        return Grammar(matcher, self._vocabulary)


class Grammar:
    """Where one reply is in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """Which tokens may come next, (vocabulary,)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return torch.as_tensor(np.pad(flags, (0, self._vocabulary - len(flags))))

    def take(self, token: int) -> bool:
        """The token that was chosen; whether the reply is complete with it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
