"""Which fields of a body go to the engine, and how much one request may ask for.

An engine honours many fields that were made for those who run it: a template that it executes, addresses that it
connects to, weights that stand behind no model's name. And it takes counts and grammars of any size, some of which stop
it for everybody. Such fields are refused, never dropped: a reply that left something out would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from agentopt.serving._types import COMPLETIONS, EMBEDDINGS, Refusal
from agentopt.serving.gateway._limits import Limits
from agentopt.serving.gateway._parse import bad, parse_body

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("chat_template",), "it is a program that the engine runs"),
    **dict.fromkeys(("custom_logit_processor", "logits_processors"), "it names code that the engine runs"),
    **dict.fromkeys(
        ("kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
        "it tells engines which others to connect to",
    ),
    **dict.fromkeys(("lora", "lora_path", "adapter_id"), "adapters are asked for by 'model'"),
    **dict.fromkeys(("mm_processor_kwargs", "media_io_kwargs"), "it sets how much memory media take"),
    **dict.fromkeys(
        ("priority", "data_parallel_rank", "routed_dp_rank", "id_slot"), "who is answered first and where is not asked"
    ),
    **dict.fromkeys(("rid", "session_params"), "it names requests of all clients"),
    "grammar": "a short one can hold up its engine for minutes",
    "background": "the reply would be written with nobody waiting for it",
}
"""Fields of engines that are not a client's to set, and why; those that are null, false, 0 or empty ask for nothing."""
_NO_VARIABLES = ("chat_template", "tokenize")
"""Of `chat_template_kwargs`: the template itself, and what is made of its text."""
_COUNTS = frozenset(
    {
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "n_predict", "min_tokens"),
        *("n", "best_of"),
    }
)
_LOGPROBS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs", "top_logprobs_num", "n_probs"})
_STOPS = ("stop", "stop_sequences")
_SCHEMAS = (
    *("response_format", "tools", "functions", "text", "structured_outputs", "output_format", "output_config"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "structural_tag"),
    *("grammar", "regex", "ebnf"),  # the first only where it is let through
)
_PATTERNS = frozenset({"pattern", "regex", "guided_regex"})
_GRAMMARS = frozenset({"grammar", "guided_grammar", "ebnf"})
_CHOICES = frozenset({"enum", "anyOf", "oneOf", "choice", "guided_choice"})
_WRITTEN = frozenset({"json", "guided_json", "json_schema", "structural_tag", "schema", "parameters"})
"""Fields that may hold a schema as a text of JSON."""
_TEXTS = _PATTERNS | _GRAMMARS | _WRITTEN
_READ = frozenset({*REFUSED, *_COUNTS, *_LOGPROBS, *_STOPS, *_SCHEMAS, "model", "stream", "stream_options"})
"""What is decided here or by the gateway."""
_INTEGER = 1 << 31
_STOP_LIST, _STOP_CHARS = 64, 16 << 10
_PATTERN_CHARS, _GRAMMAR_CHARS = 8 << 10, 64 << 10


def check_fields(route: str, body: Mapping[str, Any], size: int, limits: Limits) -> None:
    """Look at a client's body before anything is made of it.

    Args:
        route: one of `FORWARDED`.
        body: as it was read.
        size: bytes that it was.
        limits: `replies`, `inputs`, `logprobs`, `schema_values`, `alternatives` and `fields` are used.

    Raises:
        Refusal: 400: a field that is not a client's to set, or one that asks for too much.
    """
    for name, value in body.items():
        if name not in _READ:
            if not (name.isascii() and name.islower()) and name.casefold() in _READ:
                # Some servers read names without regard to case: what is decided here must be what they see.
                raise _refused(name[:80], f"the field {name[:80]!r} must be written {name.casefold()!r}")
        elif value and name in REFUSED and name not in limits.fields:
            raise _refused(name, f"'{name}' is not taken from clients: {REFUSED[name]}")
    _check_kwargs(body.get("chat_template_kwargs"), limits)
    _check_counts(route, body, limits)
    _check_stops(body)
    if size > _PATTERN_CHARS:  # what is shorter holds nothing that is too long
        _check_schemas(body, limits)


def _check_kwargs(value: object, limits: Limits) -> None:
    """Variables of the engine's own template are the client's."""
    if isinstance(value, dict) and "chat_template" not in limits.fields:
        for name in _NO_VARIABLES:
            if name in value:
                raise _refused("chat_template_kwargs", f"'chat_template_kwargs' may not set {name!r}")


def _check_counts(route: str, body: Mapping[str, Any], limits: Limits) -> None:
    for name in body.keys() & _COUNTS:
        value = body[name]
        if isinstance(value, int | float) and not 0 <= value < _INTEGER:
            raise bad(f"'{name}' must be from 0 to {_INTEGER - 1}", name)
    for name in body.keys() & _LOGPROBS:
        value = body[name]
        if isinstance(value, int | float) and not 0 <= value <= limits.logprobs:
            raise bad(f"'{name}' must be from 0 to {limits.logprobs}", name)
    if route == EMBEDDINGS:
        if _many(body.get("input")) > limits.inputs:
            raise bad(f"'input' may hold at most {limits.inputs} texts", "input")
        return
    prompts = _many(body.get("prompt")) if route == COMPLETIONS else 1
    each = max((int(value) for name in ("n", "best_of") if isinstance(value := body.get(name), int | float)), default=1)
    if prompts * each > limits.replies:
        param = "prompt" if prompts > 1 else "best_of" if body.get("best_of") else "n"
        raise bad(f"one request may ask for at most {limits.replies} replies, all its prompts together", param)


def _many(prompt: object) -> int:
    """How many texts a prompt or an input is; a list of numbers is one text in tokens."""
    given = cast("list[object]", prompt) if isinstance(prompt, list) else []
    return len(given) if given and not isinstance(given[0], int) else 1


def _check_stops(body: Mapping[str, Any]) -> None:
    for name in _STOPS:
        value: object = body.get(name)
        if not value:
            continue
        texts = cast("list[object]", value) if isinstance(value, list) else [value]
        length = sum(len(one) for one in texts if isinstance(one, str))
        if len(texts) > _STOP_LIST or length > _STOP_CHARS:
            raise bad(f"'{name}' may hold at most {_STOP_LIST} texts, {_STOP_CHARS} characters together", name)


def _check_schemas(body: Mapping[str, Any], limits: Limits) -> None:
    """Engines make automata of these: some patterns stop them, and long lists hold them up for minutes."""
    left, choices = limits.schema_values, limits.alternatives
    top: dict[str, object] = {name: body[name] for name in _SCHEMAS if name in body}
    unread: list[tuple[str, object]] = [("", top)]
    while unread:
        name, value = unread.pop()
        if isinstance(value, dict):
            held = cast("dict[str, object]", value).items()
            if name == "patternProperties":
                for key, _ in held:
                    _check_text("pattern", key)
        else:
            listed = cast("list[object]", value)
            held = [(name, one) for one in listed]
            choices -= len(listed) if name in _CHOICES else 0
        left -= len(held)
        if left < 0:
            raise bad(f"schemas, tools and choices may hold at most {limits.schema_values} values together")
        if choices < 0:
            raise bad(f"schemas and choices may hold at most {limits.alternatives} alternatives together", name)
        for key, one in held:
            if isinstance(one, dict | list):
                unread.append((key, cast("object", one)))
            elif key in _TEXTS and isinstance(one, str) and (read := _written(key, one, limits)) is not None:
                unread.append((key, read))


def _written(name: str, text: str, limits: Limits) -> dict[str, Any] | None:
    """What a text holds that an engine would read as a pattern, a grammar or a schema; None for any other text."""
    _check_text(name, text)
    if name not in _WRITTEN or len(text) <= _PATTERN_CHARS:
        return None
    try:
        return parse_body(text.encode(), nesting=limits.nesting)
    except Refusal as refusal:
        raise bad(f"'{name}' is a text that is no schema in JSON ({refusal})", name) from None


def _check_text(name: str, text: str) -> None:
    most = _PATTERN_CHARS if name in _PATTERNS else _GRAMMAR_CHARS if name in _GRAMMARS else len(text)
    if len(text) > most:
        raise bad(f"'{name}' may have at most {most} characters", name)


def _refused(name: str, message: str) -> Refusal:
    return bad(message, name, "field_not_allowed")
