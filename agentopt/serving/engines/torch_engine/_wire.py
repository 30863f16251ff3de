"""Requests of OpenAI's API read into what the worker needs: chat completions and completions.

A value that is out of range, and an option that would not be obeyed, is refused; fields that nobody here knows are
passed over, as OpenAI's own clients may send new ones.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from agentopt.serving._types import Refusal
from agentopt.serving.engines.torch_engine._sampling import Sampling
from agentopt.serving.engines.torch_engine._structured import grammar_of, schema_of

_COMPLETION_TOKENS = 16
"""What OpenAI's completions write when nothing is said."""
_MOST_REPLIES = 64
_READING = threading.Lock()
"""A tokenizer reads one text at a time: it cannot be shared while it does."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request wants."""

    chat: bool
    model: str
    prompts: tuple[list[int], ...]
    replies: int
    """For each prompt."""
    most: int
    """Tokens of each reply."""
    sampling: Sampling
    stops: tuple[str, ...]
    grammar: str | None
    ignore_eos: bool
    stream: bool
    usage: bool
    """A stream ends with an event that says how many tokens there were."""


def read_chat(body: Mapping[str, Any], tokenizer: Any, context: int) -> Ask:
    """A request to /v1/chat/completions.

    Raises:
        Refusal: 400.
    """
    for option in ("tools", "functions"):
        if body.get(option):
            raise _wrong(option, "this engine reads no tool calls out of replies; serve the model with vLLM for that")
    prompt = _templated(body, tokenizer)
    most = body.get("max_completion_tokens")
    ask = _read(body, (prompt,), context, body.get("max_tokens") if most is None else most, None)
    schema = schema_of(body.get("response_format"))
    reported = _number(body, "top_logprobs", 0, 0, 20, whole=True) if body.get("logprobs") is True else None
    sampling = replace(ask.sampling, logprobs=None if reported is None else int(reported))
    return replace(ask, chat=True, sampling=sampling, grammar=None if schema is None else grammar_of(schema))


def read_completion(body: Mapping[str, Any], tokenizer: Any, context: int) -> Ask:
    """A request to /v1/completions.

    Raises:
        Refusal: 400.
    """
    for option in ("echo", "suffix"):
        if body.get(option):
            raise _wrong(option, "this engine does not do that")
    prompts = tuple(_tokens(one, tokenizer) for one in _prompts(body.get("prompt")))
    ask = _read(body, prompts, context, body.get("max_tokens"), _COMPLETION_TOKENS)
    schema = schema_of(body.get("response_format"))
    reported = None if body.get("logprobs") is None else int(_number(body, "logprobs", 0, 0, 20, whole=True))
    sampling = replace(ask.sampling, logprobs=reported)
    return replace(ask, sampling=sampling, grammar=None if schema is None else grammar_of(schema))


def _read(body: Mapping[str, Any], prompts: tuple[list[int], ...], context: int, most: Any, default: int | None) -> Ask:
    longest = max(len(prompt) for prompt in prompts)
    if longest >= context or not min(len(prompt) for prompt in prompts):
        raise Refusal(
            400,
            f"The prompt has {longest} tokens; expected at least 1 and less than the model's {context}.",
            code="context_length_exceeded",
            param="messages" if "messages" in body else "prompt",
        )
    asked = _number({"max_tokens": most}, "max_tokens", default or context, 1, 1 << 31, whole=True)
    options: Any = body.get("stream_options") or {}
    model: Any = body.get("model") or ""
    if not isinstance(model, str) or not isinstance(options, dict):
        raise _wrong("model", "expected a text, and an object as stream_options")
    replies = int(_number(body, "n", 1, 1, _MOST_REPLIES, whole=True))
    if body.get("best_of") not in (None, 1, replies):
        raise _wrong("best_of", "expected 1 or n")
    return Ask(
        chat=False,
        model=model,
        prompts=prompts,
        replies=replies,
        most=min(int(asked), context - longest),
        sampling=_sampling(body),
        stops=_stops(body.get("stop")),
        grammar=None,
        ignore_eos=body.get("ignore_eos") is True,
        stream=body.get("stream") is True,
        usage=cast("dict[str, Any]", options).get("include_usage") is True,
    )


def _sampling(body: Mapping[str, Any]) -> Sampling:
    seed = body.get("seed")
    return Sampling(
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 0, 1),
        top_k=max(0, int(_number(body, "top_k", 0, -1, 1 << 31, whole=True))),
        min_p=_number(body, "min_p", 0.0, 0, 1),
        seed=None if seed is None else int(_number(body, "seed", 0, -(1 << 63), 1 << 63, whole=True)),
        presence=_number(body, "presence_penalty", 0.0, -2, 2),
        frequency=_number(body, "frequency_penalty", 0.0, -2, 2),
        repetition=_number(body, "repetition_penalty", 1.0, 0.01, 100),
        bias=_bias(body.get("logit_bias")),
    )


def _number(
    body: Mapping[str, Any], key: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    found = body.get(key)
    if found is None:
        return default
    fits = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if not fits or not least <= found <= most or (whole and found != int(found)):
        raise _wrong(key, f"found {found!r:.40}, expected a{' whole' if whole else ''} number from {least} to {most}")
    return found if whole else float(found)


def _bias(found: Any) -> dict[int, float]:
    if not found:
        return {}
    try:
        return {int(token): max(-100.0, min(100.0, float(value))) for token, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise _wrong("logit_bias", "expected an object of token numbers and values") from None


def _stops(found: Any) -> tuple[str, ...]:
    listed: Any = [found] if isinstance(found, str) else found or []
    texts: list[Any] = [*listed] if isinstance(listed, list) else [None]
    if len(texts) > 16 or not all(isinstance(one, str) and one for one in texts):
        raise _wrong("stop", "expected a text, or a list of at most 16")
    return tuple(texts)


# --- prompts ---------------------------------------------------------------------------------------------------------


def _templated(body: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise _wrong("messages", "the model has no chat template; ask /v1/completions")
    messages = [_message(one) for one in _list(body.get("messages"), "messages")]
    goes_on = body.get("continue_final_message") is True
    apply: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        text = apply(messages, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    except Exception as error:  # noqa: BLE001  # templates are programs that raise what they like
        raise _wrong("messages", f"the model's chat template does not take them ({error})") from None
    return _ids(tokenizer, str(text), special=False)


def _message(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(cast("dict[str, Any]", found).get("role"), str):
        raise _wrong("messages", "expected objects with role and content")
    message = cast("dict[str, Any]", found)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in cast("list[Any]", content))
    if content is not None and not isinstance(content, str):
        raise _wrong("messages", "expected content of text alone")
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content or ""}


def _part(found: Any) -> str:
    part = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if part.get("type") != "text":
        raise _wrong("messages", "expected content of text alone")
    return str(part.get("text", ""))


def _prompts(found: Any) -> list[Any]:
    """A text, tokens, or a list of one of them."""
    if isinstance(found, str):
        return [found]
    listed = _list(found, "prompt")
    return [listed] if isinstance(listed[0], int) else listed


def _tokens(found: Any, tokenizer: Any) -> list[int]:
    if isinstance(found, str):
        return _ids(tokenizer, found, special=True)
    ids = cast("list[Any]", found) if isinstance(found, list) else []
    if not ids or not all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(tokenizer) for one in ids
    ):
        raise _wrong("prompt", f"expected texts, or token numbers below {len(tokenizer)}")
    return ids


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    with _READING:
        found: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(found)


def _list(found: Any, key: str) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise _wrong(key, "expected a list that is not empty")
    return cast("list[Any]", found)


def _wrong(param: str, why: str) -> Refusal:
    return Refusal(400, f"{param}: {why}.", param=param)
