"""What is what in an agent's messages: steps, observations and their tools, errors, the last user turn, constraints.

A step is an assistant turn with what came back: the answers to its tool calls, or (for agents that speak in plain text)
a user turn that begins like an observation. All of it is read off the messages by rules, so it is a pure function of
them; what a rule is unsure of counts as something that must stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from agentopt.capsules.counting._parts import parts_of
from agentopt.errors import UserError

_OBSERVATION = re.compile(
    r"\s*[\[(*]{0,2}(?:observation|(?:tool|function|command)[ _](?:result|output|response)|stdout)"
    r"(?: \d{1,4}| (?:of|from) [\w.-]{1,60})?[\])*]{0,2}\s*:"
    r"|\s*<(?:observation|tool_response|tool_result|function_results?|output)\b[^<>\n]{0,200}>",
    re.IGNORECASE,
)
_PERSON = re.compile(
    r"(?:ask|get|request|wait_for)_?(?:the_)?(?:user|human)|(?:user|human)_?(?:input|reply|answer|feedback)", re.I
)
_ERROR = re.compile(
    r"^[ \t>*\[]*(?:error|exception|traceback|fatal|panic|failed|failure)\b"
    r"|^[\w.]*(?:Error|Exception): "
    r"|\bexit(?:ed with)? (?:code|status)[ :=]+-?[1-9]"
    r"|\"(?:error|errors|exception|traceback)\"\s*:\s*(?!null\b|false\b|0\b|\"\"|\[\]|\{\})[^\s]"
    r"|\"is_error\"\s*:\s*true"
    r"|\"status(?:_code)?\"\s*:\s*\"?(?:[45]\d\d\b|error\b|failed\b)"
    r"|\bcommand not found\b|\bpermission denied\b",
    re.IGNORECASE | re.MULTILINE,
)
_ENDS = 3  # lines at the beginning and at the end of what came back, where an error says that it is one
_ERRORS_A_TOOL = 3
_SENTENCE = re.compile(r"(?:[^.!?。！？\n]|[.!?](?!\s|$))+[.!?。！？]*")
_CONSTRAINT = re.compile(
    r"\b(?:do not|don['’]t|does not|must|never|always|from now on|no longer|make sure|be sure|remember|only|avoid|stop|"
    r"instead|unless|except|at most|at least|required?|important|correction|i meant|not what i|without|until|"
    r"nicht|kein\w*|immer|niemals|ab jetzt|nur|no debes?|nunca|siempre|solo|jamais|toujours|ne \w+ pas|uniquement)\b"
    r"|不要|不能|必须|总是|从现在|只能|しないで|必ず|いつも|하지 ?마|항상|не надо|никогда|всегда|только",
    re.IGNORECASE,
)
_MOST_SENTENCES = 50


@dataclass(frozen=True, slots=True)
class Facts:
    """What one message is."""

    role: str
    observation: bool = False
    tool: str = ""
    """The tool whose answer it is; empty where that cannot be told."""
    error: bool = False
    calls: tuple[tuple[str, str], ...] = ()
    """Ids and tools of the calls it makes."""
    constraints: tuple[str, ...] = ()
    """Sentences of a user turn that say what to do or not to do."""
    person: bool = False
    """A tool's answer that a person gave."""
    digest: int = 0
    """Of an error's text: the same error twice is one error."""
    text: str = ""
    """Its texts, joined."""
    extra: str = ""
    """What it holds beside them (calls, ids, names)."""

    @property
    def transcript(self) -> str:
        """The whole message as a text to be read back."""
        return f"{self.role}: {self.text}\n{self.extra}" if self.extra else f"{self.role}: {self.text}"


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What must stay of a run of messages."""

    tail: int
    """Where the last k steps begin."""
    last_user: int
    """The last turn of a person; -1 where there is none."""
    errors: frozenset[int]
    """Observations of errors after which the same tool has not worked: of each tool the last few different ones."""

    def stays(self, index: int, facts: Facts) -> bool:
        """Whether a message stays as it is."""
        return (
            index >= self.tail
            or index == self.last_user
            or index in self.errors
            or facts.person
            or facts.role not in ("user", "assistant", "tool", "function")
        )


def text_of(message: Mapping[str, Any]) -> str:
    """The texts of one message, joined by new lines."""
    return "\n".join(part.text for part in parts_of([message]))


def read_facts(message: Mapping[str, Any], called: Mapping[str, str]) -> Facts:
    """What a message is; `called` maps the ids of earlier calls to their tools."""
    role = str(message.get("role", ""))
    text, extra = text_of(message), extra_tokens(message)
    observation = role in ("tool", "function") or (role == "user" and _OBSERVATION.match(text) is not None)
    if observation:
        tool = called.get(str(message.get("tool_call_id", "")), "") or str(message.get("name") or "")
        error = bool(message.get("is_error")) or _ERROR.search(_ends(text)) is not None
        digest = hash_of(text) if error else 0
        person = _PERSON.search(tool) is not None
        return Facts(role, True, tool, error, person=person, digest=digest, text=text, extra=extra)
    if role == "user":
        return Facts(role, constraints=_constraints(text), text=text, extra=extra)
    return Facts(role, calls=tuple(_calls(message)), text=text, extra=extra)


def read_all(messages: Sequence[Mapping[str, Any]]) -> list[Facts]:
    """`read_facts` of each, in order."""
    called: dict[str, str] = {}
    found: list[Facts] = []
    for message in messages:
        facts = read_facts(message, called)
        called.update(facts.calls)
        found.append(facts)
    return found


def check_keep_last(keep_last: int) -> None:
    """Raises UserError when not even the last step would stay."""
    if keep_last < 1:
        raise UserError(
            f"keep_last: found {keep_last}, expected at least 1: the model has not read the last result yet."
        )


def anatomy(facts: Sequence[Facts], keep_last: int) -> Anatomy:
    """What must stay of these messages: the last `keep_last` steps, the last user turn, unresolved errors."""
    turns = [index for index, fact in enumerate(facts) if fact.role == "assistant"]
    tail = turns[-keep_last] if len(turns) >= keep_last else (turns[0] if turns else 0)
    people = (index for index in range(len(facts) - 1, -1, -1) if facts[index].role == "user")
    last_user = next((index for index in people if not facts[index].observation), -1)
    works: set[str] = set()
    seen: dict[str, set[int]] = {}
    errors: set[int] = set()
    for index in range(len(facts) - 1, -1, -1):
        fact = facts[index]
        if fact.error and fact.tool not in works:
            same = seen.setdefault(fact.tool, set())
            if fact.digest not in same and len(same) < _ERRORS_A_TOOL:
                errors.add(index)
                same.add(fact.digest)
        elif fact.observation and not fact.error:
            works.add(fact.tool)
    return Anatomy(tail, last_user, frozenset(errors))


def _ends(text: str) -> str:
    """The first and the last lines."""
    start = text[:2000].strip().split("\n", _ENDS)[:_ENDS]
    return "\n".join([*start, *text[-2000:].strip().rsplit("\n", _ENDS)[-_ENDS:]])


def hash_of(text: str) -> int:
    """A number for a text, the same in every process."""
    import zlib

    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _calls(message: Mapping[str, Any]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for call in cast("list[Any]", message.get("tool_calls") or []):
        if isinstance(call, dict):
            function: Any = cast("dict[str, Any]", call).get("function")
            name = cast("dict[str, Any]", function).get("name") if isinstance(function, dict) else ""
            calls.append((str(cast("dict[str, Any]", call).get("id", "")), str(name or "")))
    return calls


def _constraints(text: str) -> tuple[str, ...]:
    """The sentences of a turn that bind; of a turn full of them, the whole turn."""
    if not _CONSTRAINT.search(text):
        return ()
    found = [match[0].strip() for match in _SENTENCE.finditer(text) if _CONSTRAINT.search(match[0])]
    return tuple(dict.fromkeys(found)) if len(found) <= _MOST_SENTENCES else (text.strip(),)


def extra_tokens(message: Mapping[str, Any]) -> str:
    """What a message holds beside its texts, as one text: calls, ids and names."""
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return json.dumps(rest, ensure_ascii=False, separators=(",", ":"), default=str) if rest else ""
