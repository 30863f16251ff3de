"""Rows out of recordings: captured traffic in the store (`captured[:MODEL]`), and trace files (`*.trace.jsonl`).

A row holds what was asked; what was answered is never an input. The expected answer is what a user said it should have
been; where none was given and the reply was rated above 0, it is that reply, and the row's meta says `self_agreement`:
such rows reward a program for saying again what it said before. Exchanges of one conversation, of which later ones
hold the replies to earlier ones, carry a group that keeps them in one part of a split.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.evaluation._data import GROUP, content_hash
from agentopt.graph import OpRecord, Trace
from agentopt.store import DEFAULT_PATH, Store

JSONDict = dict[str, Any]
_NAME = re.compile(r"(?:.*?/)?captured(-all)?(?::(.+))?")
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class CapturedSource:
    """What `captured[-all][:MODEL]` says."""

    everything: bool = False
    """Also exchanges of which nobody said what the reply should have been."""
    model: str | None = None

    @classmethod
    def of(cls, text: str) -> CapturedSource | None:
        """The source a text names, also where a path was made of it; None for the name of a file."""
        match = _NAME.fullmatch(text)
        return None if match is None or Path(text).exists() else cls(bool(match[1]), match[2])

    def __str__(self) -> str:
        return f"captured{'-all' if self.everything else ''}{f':{self.model}' if self.model else ''}"


@dataclass(slots=True)
class Recorded:
    """One row: `fields` may be inputs, `hidden` columns are never inputs but may be the label."""

    place: str
    fields: JSONDict
    hidden: JSONDict = field(default_factory=JSONDict)
    session: str | None = None


def captured_rows(source: CapturedSource, store: Store | str | os.PathLike[str] | None) -> list[Recorded]:
    """The rows of the store's captured traffic, oldest first.

    Raises:
        UserError: there is no store, no such model, or no exchange that gives a row.
    """
    with _opened(store) as opened:
        known = opened.exchanges(rated=not source.everything)
        chosen = known if source.model is None else _asked(known, source.model)
        if not chosen:
            raise UserError(_none(source, opened, known))
        verdicts = _verdicts(opened.feedback())
        rows = list(_rows(opened, chosen, verdicts, source.everything))
    if not rows:
        raise UserError(
            f"{source}: {len(chosen)} captured exchanges in {_path(store)}, and none of them has an expected answer or "
            "a whole reply with a score above 0; give feedback by POST /v1/feedback, or take captured-all with a "
            "metric that needs no expected answer."
        )
    _group(rows)
    return rows


def trace_rows(path: Path) -> list[Recorded]:
    """The rows of a trace file: one for each outermost call of an agent, else one for each language model call.

    Raises:
        UserError: the file is no trace, or has no such call.
    """
    trace = Trace.load(path)
    agents = [op for op in trace.find(kind="agent") if op.inputs and not _inside_agent(op, trace)]
    rows: list[Recorded] = []
    for op in agents:
        if op.error is None:
            rows.append(Recorded(f"{path}, record {op.id}", op.inputs, {"reply": op.output}))
    if not agents:
        for op in trace.find(kind="lm"):
            row = _row(f"{path}, record {op.id}", op, {})
            if row is not None:
                row.session = str(path)
                rows.append(row)
        _group(rows)
    if not rows:
        raise UserError(f"{path}: the trace has no finished call of an agent or of a language model to make a row of.")
    return rows


def _inside_agent(op: OpRecord, trace: Trace) -> bool:
    enclosing = op.parent_op
    while enclosing is not None:
        if trace.ops[enclosing].kind == "agent" and trace.ops[enclosing].inputs:
            return True
        enclosing = trace.ops[enclosing].parent_op
    return False


# ---- the store


def _opened(store: Store | str | os.PathLike[str] | None) -> Any:
    if isinstance(store, Store):
        return nullcontext(store)
    path = _path(store)
    if not Path(path).is_file():
        raise UserError(
            f"{path}: no store here, so there is no captured traffic; run `agentopt serve MODEL --capture`, or give "
            "--store PATH."
        )
    return Store.open(path)


def _path(store: Store | str | os.PathLike[str] | None) -> str:
    if isinstance(store, Store):
        return store.path
    return os.fspath(store) if store is not None else os.environ.get("AGENTOPT_DB") or DEFAULT_PATH


def _asked(rows: Sequence[JSONDict], name: str) -> list[JSONDict]:
    """The exchanges whose client asked for this name; where none did, those that this variant (`model/label`) answered.

    What a tuned model's prompts answered is not the base's, although the base wrote it: to learn from it as the base's
    would be to learn from another prompt's replies.
    """
    named = [row for row in rows if _public(row) == name]
    return named or [row for row in rows if row.get("variant") and f"{_public(row)}/{row['variant']}" == name]


def _public(row: JSONDict) -> str:
    """What the client called the model; the engine's name where it called it nothing."""
    return str(row.get("asked") or row.get("model") or "")


def _none(source: CapturedSource, store: Store, known: list[JSONDict]) -> str:
    models = sorted({_public(row) for row in known})
    if models:
        return f"{source}: nobody asked for that model in {store.path}; there are exchanges of {', '.join(models)}."
    rated = "" if source.everything else " with feedback"
    more = "" if source.everything else " (captured-all takes those without feedback too)"
    return f"{source}: {store.path} holds no captured exchange{rated}; serve with --capture first{more}."


def _verdicts(rows: Iterable[JSONDict]) -> dict[str, JSONDict]:
    """Of each request what was said last of each kind."""
    found: dict[str, JSONDict] = {}
    for row in rows:
        said = {name: row[name] for name in ("score", "text", "expected") if row.get(name) is not None}
        found.setdefault(row["exchange_id"], {}).update(said)
    return found


def _rows(
    store: Store, chosen: Sequence[JSONDict], verdicts: Mapping[str, JSONDict], everything: bool
) -> Iterator[Recorded]:
    at, ops = "", {}
    for entry in chosen:
        if entry["trace_id"] != at:
            at, ops = entry["trace_id"], _calls(store.trace(entry["trace_id"]))
        op = ops.get(entry["id"])
        row = None if op is None else _row(f"captured request {entry['id']}", op, verdicts.get(entry["id"], {}))
        if row is not None and (everything or row.hidden["expected"] is not None):
            row.session = entry["trace_id"]
            yield row


def _calls(payload: JSONDict | None) -> dict[str, OpRecord]:
    if payload is None:
        return {}
    trace = Trace.from_dict(payload)
    return {str((op.meta or {}).get("request_id")): op for op in trace.find(kind="lm")}


# ---- one call


def _row(place: str, op: OpRecord, verdict: Mapping[str, Any]) -> Recorded | None:
    """The row of one call; None where what was asked is not all there, or there is no answer to compare with."""
    meta = op.meta or {}
    fields = _fields(op)
    reply = _reply(op) if op.error is None and meta.get("reply") is None else None
    expected: Any = verdict.get("expected")
    agreement = expected is None and reply is not None and float(verdict.get("score") or 0) > 0
    if fields is None or meta.get("partial_input") or (expected is None and reply is None):
        return None
    hidden = {"expected": reply if agreement else expected, "reply": reply}
    hidden |= {name: meta.get(name) for name in ("request_id", "asked", "variant") if meta.get(name) is not None}
    hidden |= {name: verdict[name] for name in ("score", "text") if name in verdict}
    return Recorded(place, fields, hidden | ({"self_agreement": True} if agreement else {}))


def _fields(op: OpRecord) -> JSONDict | None:
    inputs, meta = op.inputs, op.meta or {}
    messages: Any = inputs.get("messages") or meta.get("messages")
    prompt = inputs.get("prompt")
    if messages is None and isinstance(prompt, str):
        return {"prompt": prompt, "message": prompt}
    if not isinstance(messages, list) or not messages:
        return None
    turns = cast("list[JSONDict]", messages)
    if not all(isinstance(turn.get("content"), str) or _calls_only(turn) for turn in turns):
        return None  # images and files are not kept
    fields: JSONDict = {"messages": turns}
    ends_with_user = turns[-1].get("role") == "user"
    fields["history"] = turns[:-1] if ends_with_user else turns
    fields["message"] = turns[-1]["content"] if ends_with_user else ""
    system = "\n\n".join(turn["content"] for turn in turns if turn.get("role") in _SYSTEM)
    if system:
        fields["system"] = system
    if inputs.get("tools"):
        fields["tools"] = inputs["tools"]
    return fields


def _calls_only(turn: JSONDict) -> bool:
    return turn.get("content") is None and bool(turn.get("tool_calls"))


def _reply(op: OpRecord) -> Any:
    """The text of a reply; of one that calls tools their names and arguments, as `agentopt.serving.chat` gives them."""
    output: Any = op.output
    if isinstance(output, dict):
        said = cast("JSONDict", output)
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in said.get("tool_calls") or ()]
        return json.dumps(calls, sort_keys=True, ensure_ascii=False) if calls else said.get("text") or None
    return output or None


# ---- conversations


def _group(rows: Sequence[Recorded]) -> None:
    """Give rows of one session, and rows whose turns go on from another row's, the same group."""
    leader = list(range(len(rows)))

    def find(place: int) -> int:
        while leader[place] != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    first: dict[str, int] = {}
    turns = [_prefixes(row) for row in rows]
    for place, (row, prefixes) in enumerate(zip(rows, turns, strict=True)):
        for mark in (f"session {row.session}", prefixes[-1]):
            leader[find(place)] = find(first.setdefault(mark, place))
    for place, prefixes in enumerate(turns):
        for mark in prefixes[:-1]:
            if mark in first:
                leader[find(place)] = find(first[mark])
    names: dict[int, str] = {}
    for place, prefixes in enumerate(turns):
        root = find(place)
        names[root] = min(names.get(root, prefixes[-1]), prefixes[-1])
    for place, row in enumerate(rows):
        row.hidden[GROUP] = names[find(place)]


def _prefixes(row: Recorded) -> list[str]:
    """A mark of each beginning of the conversation, the whole one last; instructions do not count."""
    turns = row.fields.get("messages")
    if not isinstance(turns, list):
        return [content_hash(row.fields)]
    marks: list[str] = [""]
    for turn in cast("list[JSONDict]", turns):
        if turn.get("role") not in _SYSTEM:
            marks.append(content_hash([marks[-1], turn.get("role"), turn.get("content"), turn.get("tool_calls")]))
    return marks[1:] or [content_hash(row.fields)]
