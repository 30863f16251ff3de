"""Knowledge: documents that a program needs, as a parameter whose form is tuned.

The documents belong to the declaration; the value, small JSON, says in which form the model gets them: `in-context`
(the documents in the prompt), `capsule` (a shorter text made of them) or `folded` (an adapter that they were written
into, see `agentopt.weights.fold`; nothing stands in the prompt). A capsule or an adapter carries the hash of the
documents that it was made of and is refused for any others.

A folded knowledge reaches the model only by a call that names it, `complete(..., knowledge=handbook)`. Its text is
empty, so a call that was built from the text and does not name it would go without: that is told by a warning.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from agentopt.errors import UserError
from agentopt.graph._context import active_value, peek_value
from agentopt.graph._handles import CLASSES, Handle, _declared
from agentopt.graph._jsonvalue import JSONValue, digest
from agentopt.graph._parameters import ParameterSpec, find_parameter

KNOWLEDGE_FORMS: Final = ("in-context", "capsule", "folded")
_KEYS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "in-context": ((), ()),
    "capsule": (("of", "text"), ()),
    "folded": (("of", "adapter"), ("base_hash", "recall")),
}
"""Form → the keys that it must have beside "form", and those that it may have."""
_HASH_LENGTH: Final = 16
_PATH_LIKE: Final = re.compile(r"[!-~]*[/\\][!-~]*|\S*[^\s.]\.[A-Za-z][A-Za-z0-9]{1,8}")
"""One word with a slash (in ASCII: Chinese has no spaces) or an ending is a file's name, also of a file not there."""
_LONGEST_NAME: Final = 255
_BYTES_PER_TOKEN: Final = 4


class KnowledgeWarning(UserWarning):
    """A call was built from the text of a folded knowledge and does not name it: the model was not given it."""


@dataclass(frozen=True, slots=True)
class KnowledgeSource:
    """What a knowledge parameter is about."""

    documents: tuple[str, ...]
    folder: str = ""
    """The META folder with which the documents may be folded; '' when they may not."""
    hash: str = field(init=False)
    """First 16 hex characters of the SHA-256 of the documents."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", digest(list(self.documents))[:_HASH_LENGTH])

    @property
    def text(self) -> str:
        """The documents as one text: one a line when each is a line, else with an empty line between them."""
        between = "\n\n" if any("\n" in document for document in self.documents) else "\n"
        return between.join(self.documents)


class Knowledge(Handle):
    """Documents in the form that is active: `str()` and `.value` give the text for a prompt ('' when folded)."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The active text: the documents, their capsule, or '' when they are folded into an adapter."""
        return self.for_model(self._read())

    @property
    def form(self) -> str:
        """The active form: "in-context", "capsule" or "folded"."""
        return str(self._read()["form"])

    @property
    def adapter(self) -> str | None:
        """The active adapter, a folder or the name that a server knows it by; None unless the form is folded."""
        found = self._read().get("adapter")
        return None if found is None else str(found)

    @property
    def documents(self) -> tuple[str, ...]:
        """The documents as they were declared, whatever the form."""
        return knowledge_source(self._spec).documents

    def for_model(self, value: JSONValue) -> str:
        """What stands in a prompt for `value`, this parameter's value."""
        checked = checked_knowledge(self._spec, value)
        if checked["form"] == "folded":
            _read_folded().add(self.name)
        return knowledge_text(self._spec, checked)

    def __str__(self) -> str:
        return self.value

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec)

    def _read(self) -> dict[str, Any]:
        return checked_knowledge(self._spec, active_value(self._spec))


CLASSES["knowledge"] = Knowledge


def knowledge(
    name: str,
    docs: str | Path | Sequence[str],
    *,
    folder: str | Path | None = None,
    description: str = "",
) -> Knowledge:
    """Declare documents whose form is tuned: in the prompt, as a capsule, or folded into an adapter.

    Args:
        name: the parameter's identity.
        docs: a text, a list of texts (facts, pages), or the path of a text file or of a folder of text files. A path is
            looked up in the working directory, then beside the file that declares it.
        folder: the META folder (`agentopt fold train`) with which the documents may be folded; without one the folded
            form is not offered.
        description: what the documents are about; optimizers see it.

    Raises:
        UserError: there is no text, a file cannot be read, or the name is declared with other documents.
    """
    frame = sys._getframe(1)
    documents = _documents(name, docs, Path(frame.f_code.co_filename).parent)
    source = KnowledgeSource(documents, "" if folder is None else str(folder))
    spec = ParameterSpec(
        name,
        "knowledge",
        {"form": "in-context"},
        description=description,
        constraint_text="the documents in the prompt, a capsule of them, or folded into an adapter",
        check_value=partial(knowledge_problems, source=source),
        knowledge=source,
    )
    return _declared(Knowledge, spec, frame)


# --- the documents ---------------------------------------------------------------------------------------------------


def _documents(name: str, docs: Any, beside: Path) -> tuple[str, ...]:
    if isinstance(docs, Path) or (isinstance(docs, str) and _names_a_path(docs, beside)):
        texts = _from_path(name, Path(docs), beside)
    elif isinstance(docs, str):
        texts = [docs]
    elif isinstance(docs, (list, tuple)):
        texts = list(cast("Sequence[Any]", docs))
    else:
        raise UserError(
            f"parameter {name!r}: the documents must be a text, a list of texts or a path, found {type(docs).__name__}."
        )
    for place, text in enumerate(texts, 1):
        if not isinstance(cast("object", text), str):
            raise UserError(f"parameter {name!r}: document {place} must be a text, found {type(text).__name__}.")
    kept = tuple(text.strip("\n").rstrip() for text in texts if text.strip())
    if not kept:
        raise UserError(f"parameter {name!r}: there is no text in the documents; expected at least one sentence.")
    return kept


def _names_a_path(text: str, beside: Path) -> bool:
    """Whether a text is the name of a file or folder: of one that is there, or one word that looks like it."""
    if "\n" in text or not text.strip() or len(text) > 16 * _LONGEST_NAME:
        return False
    if _PATH_LIKE.fullmatch(text):
        return True
    try:
        return Path(text).expanduser().exists() or (beside / text).exists()
    except (OSError, ValueError):
        return False  # longer than a name may be: a document


def _from_path(name: str, path: Path, beside: Path) -> list[str]:
    here = path.expanduser()
    found = here if here.exists() else beside / path
    if not found.exists():
        raise UserError(
            f"parameter {name!r}: there is no file or folder {str(path)!r}, neither here nor beside the file that "
            "declares it."
        )
    files = [found]
    if found.is_dir():
        files = sorted(
            file
            for file in found.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(found).parts)
        )
    texts: list[str] = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise UserError(f"parameter {name!r}: {file} is no UTF-8 text; documents are text files.") from None
        except OSError as error:
            raise UserError(f"parameter {name!r}: {file} cannot be read ({error.strerror or error}).") from None
    return texts


def knowledge_source(spec: ParameterSpec) -> KnowledgeSource:
    """The documents of a knowledge parameter.

    Raises:
        UserError: the parameter has none: it was not declared with `knowledge`.
    """
    if spec.knowledge is None:
        raise UserError(
            f"parameter {spec.name!r} of kind {spec.kind!r} has no documents; declare it with ao.knowledge."
        )
    return spec.knowledge


# --- values ----------------------------------------------------------------------------------------------------------


def knowledge_problems(value: Any, *, source: KnowledgeSource | None = None) -> list[str]:
    """What keeps `value` from being a form of the knowledge `source`, one clause each."""
    if not isinstance(value, Mapping):
        return [f'expected {{"form": ...}}, found {type(value).__name__}']
    entry = cast("Mapping[str, Any]", value)
    form = entry.get("form")
    if not isinstance(form, str) or form not in _KEYS:
        return [f"its form must be one of {', '.join(KNOWLEDGE_FORMS)}, found {form!r:.60}"]
    needed, allowed = _KEYS[form]
    odd = [
        *(key for key in needed if key not in entry),
        *(key for key in entry if key not in ("form", *needed, *allowed)),
    ]
    if odd:
        keys = ", ".join(("form", *needed, *allowed))
        return [f"the keys of a {form} value are {keys}; {odd[0]!r} is missing or unknown"]
    found = [
        f"{key!r} must be a text that is not empty, found {entry[key]!r:.60}"
        for key in ("of", "text", "adapter", "base_hash")
        if key in entry and not (isinstance(entry[key], str) and entry[key].strip())
    ]
    recall = entry.get("recall", 0.0)
    if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 <= recall <= 1:
        found.append(f"'recall' must be a number from 0 to 1, found {recall!r:.40}")
    if not found and source is not None and entry.get("of", source.hash) != source.hash:
        what = f"adapter {entry['adapter']!r}" if form == "folded" else "capsule"
        found.append(
            f"made of other documents is the {what} (hash {entry['of']}; that of the declared ones is {source.hash}): "
            'tune again, or use {"form": "in-context"}'
        )
    return found


def checked_knowledge(spec: ParameterSpec, value: JSONValue) -> dict[str, Any]:
    """`value` when it is a form of the declared documents.

    Raises:
        UserError: it is none, or was made of other documents.
    """
    found = knowledge_problems(value, source=knowledge_source(spec))
    if found:
        raise UserError(f"parameter {spec.name!r}: {found[0]}.")
    return cast("dict[str, Any]", value)


def knowledge_text(spec: ParameterSpec, value: JSONValue) -> str:
    """The text that a checked value puts into a prompt; '' for the folded form."""
    entry = cast("Mapping[str, Any]", value)
    match entry["form"]:
        case "in-context":
            return knowledge_source(spec).text
        case "capsule":
            return str(entry["text"])
        case _:
            return ""


def about_tokens(text: str) -> int:
    """How many tokens a text is, about: four bytes each. Which model reads it is not known here."""
    return max(1, round(len(text.encode("utf-8", "surrogatepass")) / _BYTES_PER_TOKEN))


def describe_knowledge(value: Any, name: str = "") -> str:
    """The form in a few words; with the parameter's name also the length of its documents, where they are declared."""
    entry = cast("Mapping[str, Any]", value)
    match entry["form"]:
        case "in-context":
            spec = find_parameter(name) if name else None
            known = "" if spec is None or spec.knowledge is None else spec.knowledge.text
            return f"in-context (about {about_tokens(known):,} tokens)" if known else "in-context"
        case "capsule":
            return f"capsule (about {about_tokens(str(entry['text'])):,} tokens)"
        case _:
            recall = "" if "recall" not in entry else f", recall {entry['recall']:.2f}"
            return f"folded (adapter {entry['adapter']}{recall})"


# --- reads that no call took up --------------------------------------------------------------------------------------

_waiting: ContextVar[set[str] | None] = ContextVar("agentopt_folded_reads", default=None)
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


def _read_folded() -> set[str]:
    """Folded knowledge whose (empty) text was read here for a call to come; shared with what is started from here."""
    found = _waiting.get()
    if found is None:
        found = set[str]()
        _waiting.set(found)
    return found


def claim_knowledge(named: Collection[str]) -> None:
    """A language model is called with the knowledge `named`: warn, once for each adapter, of folded knowledge that was
    read before and is not among it.
    """
    waiting = _waiting.get()
    if not waiting:
        return
    missed = sorted(waiting.difference(named))
    waiting.clear()
    for name in missed:
        spec = find_parameter(name)
        value: Any = {} if spec is None else peek_value(spec)
        if not isinstance(value, Mapping):
            continue
        entry = cast("Mapping[str, Any]", value)
        if entry.get("form") != "folded":
            continue  # another candidate is active by now
        key = (name, str(entry.get("adapter")))
        with _lock:
            if key in _warned:
                continue
            _warned.add(key)
        warnings.warn(
            f"the knowledge {name!r} is folded into an adapter, so its text is empty, and the language model was "
            "called without it; name it in the call that needs it: complete(..., knowledge=handle)",
            KnowledgeWarning,
            stacklevel=4,
        )
