"""What a chat costs beyond its texts: OpenAI's overhead, a model's own template, or ChatML where nothing is known.

A chat template is a program that came with a model, so it runs in jinja's sandbox, on plain data, and its output is
limited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError

PER_MESSAGE, PER_NAME, PRIMING = 3, 1, 3
"""Tokens that OpenAI's format adds: around each message, for a name, and to begin the reply."""

_ROUNDS = 100_000
_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What a template can raise by itself."""
_READS_LISTS = re.compile(
    r"""in\s+[\w.]*(?:\.content|\[['"]content['"]\])|content(?:['"]\])?\s+is\s+(?:not\s+)?(?:string|iterable|sequence)"""
)
"""A template that looks into a content that is a list; the others are given its text, as servers do."""


class TemplateRefused(UserError):
    """The template does not accept these messages, or is broken."""


class ChatTemplate:
    """A model's own chat template."""

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, str], name: str) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        self._variables = dict(variables)
        self._name = name
        self._compiled: dict[str, Any] = {}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The text the model reads, up to where its reply begins.

        Raises:
            TemplateRefused: the template raises, does not compile, or writes without end.
        """
        import jinja2

        from agentopt.capsules.counting._sandboxed_jinja import LARGEST

        plain, definitions = json.loads(json.dumps([list(messages), list(tools or [])], default=str))
        given = len(json.dumps([plain, definitions]))
        try:
            name, program = self._program("tool_use" if tools else "default")
            values = {
                "messages": plain if _READS_LISTS.search(self._sources[name]) else [_flat(one) for one in plain],
                "tools": definitions or None,
                "documents": None,
                "add_generation_prompt": True,
                **self._variables,
            }
            return program.write(values, longest=4 * given + LARGEST, rounds=_ROUNDS + 100 * len(plain))
        except (*_FAILURES, jinja2.TemplateError) as error:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> TemplateRefused:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return TemplateRefused(f"chat template of {self._name}: it does not accept these messages ({reason:.160}).")

    def _program(self, wanted: str) -> tuple[str, Any]:
        name = next((name for name in (wanted, "default") if name in self._sources), next(iter(self._sources)))
        if name not in self._compiled:
            from agentopt.capsules.counting._sandboxed_jinja import Program

            self._compiled[name] = Program(self._sources[name])
        return name, self._compiled[name]


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message if isinstance(content, str) else {**message, "content": text_of(content)}


def template_of_folder(folder: Path) -> ChatTemplate | None:
    """The chat template of a model folder: `chat_template.jinja`, else what `tokenizer_config.json` holds; or None."""
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"model folder: {path.name} is not JSON ({error}).") from error
        config = cast("dict[str, Any]", loaded) if isinstance(loaded, dict) else {}
    source: Any = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(source, list):
        source = {str(one["name"]): str(one["template"]) for one in cast("list[dict[str, Any]]", source)}
    if not source:
        return None
    variables: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                variables[key] = text
    return ChatTemplate(cast("str | dict[str, str]", source), variables, folder.name)


def text_of(content: Any) -> str:
    """The text of a message's content; images and other parts have none."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [cast("dict[str, Any]", one).get("text") for one in cast("list[Any]", content) if isinstance(one, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def uncounted(messages: Sequence[Mapping[str, Any]]) -> int:
    """Content parts that no tokenizer of text can count: images, audio, files."""
    return sum(
        not (isinstance(one, dict) and isinstance(cast("dict[str, Any]", one).get("text"), str))
        for message in messages
        if isinstance(message.get("content"), list)
        for one in cast("list[Any]", message["content"])
    )


def _rest(message: Mapping[str, Any]) -> list[str]:
    """What else of a message is sent: calls, ids, reasoning; as compact JSON where it is not text."""
    return [
        value if isinstance(value, str) else _compact(value)
        for key, value in message.items()
        if key not in ("role", "content", "name") and value is not None
    ]


def openai_texts(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> tuple[list[str], int]:
    """The texts of a chat that are counted one by one, and the tokens that the format adds."""
    texts: list[str] = []
    overhead = PRIMING
    for message in messages:
        overhead += PER_MESSAGE
        texts += [str(message.get("role", "")), text_of(message.get("content")), *_rest(message)]
        if message.get("name"):
            texts.append(str(message["name"]))
            overhead += PER_NAME
    if tools:
        texts.append(_compact(list(tools)))
    return texts, overhead


def chatml(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """The chat in ChatML, the most common form of template."""
    head = f"<|im_start|>tools\n{_compact(list(tools))}<|im_end|>\n" if tools else ""
    turns: list[str] = []
    for message in messages:
        name = f" name={message['name']}" if message.get("name") else ""
        body = "\n".join(text for text in (text_of(message.get("content")), *_rest(message)) if text)
        turns.append(f"<|im_start|>{message.get('role', '')}{name}\n{body}<|im_end|>\n")
    return f"{head}{''.join(turns)}<|im_start|>assistant\n"


def count_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> int:
    """Tokens of a chat: by the tokenizer's own way where it has one (`count_chat`), else as ChatML text."""
    own = getattr(tokenizer, "count_chat", None)
    return own(messages, tools) if own is not None else tokenizer.count(chatml(messages, tools))


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
