"""Chat turns as a folder's prompt: the lines of all turns before the last, then the last turn as the question.

`read_chat` makes it here, `chat_template` makes the same of the same turns in a server, token for token (where a
server reads one text, a folder tokenizes the lines with the question, see `Codec.question`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentopt.models import Message
from agentopt.models._messages import text_of

if TYPE_CHECKING:
    from agentopt.weights.fold._codec import Codec


def read_chat(turns: Sequence[Message]) -> tuple[list[str], str]:
    """Lines before the question (facts, instructions, demonstrations), and the question."""
    lines = [line.strip() for turn in turns[:-1] for line in text_of(turn).split("\n")]
    return [line for line in lines if line], text_of(turns[-1])


def chat_template(codec: Codec) -> str:
    """The jinja template of a folder's format, for `--chat-template` of a server."""
    lead = str(codec.tokenizer.decode(codec.lead)) if codec.lead else ""
    line = _filled(codec.format.fact, "fact", "line.strip()")
    question = _filled(codec.format.question, "question", "messages[-1].content")
    end = _literal("\n")
    begin = f"{{{{- {_literal(lead)} -}}}}\n" if lead else ""
    return (
        f"{begin}"
        "{%- for turn in messages[:-1] -%}\n"
        f"{{%- for line in turn.content.split({end}) if line.strip() -%}}\n"
        f"{{{{- {line} ~ {end} -}}}}\n"
        "{%- endfor -%}\n"
        "{%- endfor -%}\n"
        f"{{{{- {question} -}}}}\n"
    )


def _filled(text: str, field: str, value: str) -> str:
    """A jinja expression: the text with the value in place of `{field}`."""
    first, *others = text.split("{" + field + "}")
    parts = [_literal(first)] if first else []
    for other in others:
        parts += [value, *([_literal(other)] if other else [])]
    return " ~ ".join(parts)


def _literal(text: str) -> str:
    """As a string of jinja, which knows the escapes of JSON, except that it has no pairs of surrogates."""
    return json.dumps(text, ensure_ascii=False)
