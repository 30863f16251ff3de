"""Reading what a language model sent back when it was asked for a shorter text.

The unit is one reply. What is not the text is taken off: thinking, a fence or tags around the whole, "Here is the
compressed version:" before it, "Let me know if ..." after it, lines of the document's own fence. What is then left may
be nothing, a refusal, or a text that was cut off: that is said, never raised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_THINK_CLOSED = re.compile(r"</(?:think|thinking|reasoning|thought)>", re.I)
_THINK_OPEN = re.compile(r"^\s*<(think|thinking|reasoning|thought)>", re.I)
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})[\w-]*[ \t]*\n(.*?)\n?\1\s*$", re.S)
_TAGS = re.compile(
    r"^\s*<(capsule|text|output|answer|result|shortened|compressed|document)>\s*(.*?)\s*</\1>\s*$", re.S | re.I
)
_WHAT = (
    r"(?:shorten|compress|condens|summar|rewrit|rewrote|reduc|concise|telegraphic|version|revis|correct|updat"
    r"|text|prompt)"
)
_INTRO = re.compile(
    rf"^\s*(?:(?:sure|certainly|of course|okay|ok|absolutely|got it|understood)\b[^\n]{{0,80}}?[!.,:]\s*)?"
    rf"(?:(?:here(?:'s|’s| is| are)|below is|this is|the following is|i(?:'ve| have))\b[^\n:]{{0,160}}{_WHAT}"
    rf"[^\n:]{{0,120}}|\**(?:shortened|compressed|condensed|rewritten|concise|final|revised|corrected)[^\n:]{{0,60}})(?::\**|\n)\s*",
    re.I,
)
_GREETING = re.compile(
    r"^\s*(?:sure|certainly|of course|okay|absolutely|got it|understood)\b[^\n]{0,40}?[!.:]\s*(?=\S)", re.I
)
_OUTRO = re.compile(
    r"\n[ \t]*+(?:\(?\**note\b[^\n]{0,20}(?:that|:)[^\n]{0,200}"
    r"(?:short|compress|word|token|preserv|mark|kept|remov)[^\n]*"
    r"|\(?\**(?:word|token|character) count[^\n]*"
    r"|(?:please )?(?:let me know|feel free|would you like|i hope|hope this|do you want|is there anything)[^\n]*"
    r"|this (?:shortened|compressed|condensed|version|rewrite)[^\n]*)\s*$",
    re.I,
)
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'m| am|’m) (?:very |really |so )?(?:sorry|afraid|unable)|sorry\b|i (?:can(?:not|'t|’t)|won't|will not|"
    r"am not able|must decline|have to decline|do not feel)|as an ai\b|unfortunately,? i\b|apologies\b|my apologies\b)",
    re.I,
)
_LONGEST = 400_000
_END = re.compile(r"[.!?;:…。！？\"”'’`)\]}>|]\s*$")


@dataclass(frozen=True, slots=True)
class Read:
    """The text in a reply; `problem` says in words why it cannot be used, empty when it can."""

    text: str
    problem: str = ""


def read_reply(reply: str, source: str, *, finish_reason: str = "stop", fence: str = "") -> Read:
    """The shortened text in `reply`. What `source` itself begins or ends with is never taken for chatter."""
    text = reply[:_LONGEST]
    if _THINK_OPEN.match(text):
        ends = [match.end() for match in _THINK_CLOSED.finditer(text)]
        if not ends:
            return Read("", "the model's reasoning used up the whole reply")
        text = text[ends[-1] :]
    if fence:
        text = "\n".join(line for line in text.splitlines() if fence not in line)
    text = _unwrapped(text.strip(), source)
    for pattern in (_INTRO, _GREETING):
        match = pattern.match(text)
        if match is not None and not pattern.match(source) and (pattern is _INTRO or not _within(match[0], source)):
            text = text[match.end() :]
    text = _unwrapped(text.strip(), source)
    for _ in range(3):
        match = _OUTRO.search(text)
        if match is None or _within(match[0], source):
            break
        text = text[: match.start()]
    text = text.strip()
    if not text:
        return Read("", "the reply was empty" + (" and was cut off" if finish_reason == "length" else ""))
    if refused(text, source):
        return Read("", f"the model refused: {text[:80]!r}")
    if finish_reason == "content_filter":
        return Read("", "the provider's content filter stopped the reply")
    if finish_reason == "length":
        return _whole_part(text)
    return Read(text)


def refused(text: str, source: str) -> bool:
    """Whether `text` says no instead of being a shorter `source`."""
    return _REFUSAL.match(text) is not None and _REFUSAL.match(source) is None


def chatter(text: str, source: str) -> str:
    """What a model said around the text instead of in it; empty when nothing was."""
    for match in (_INTRO.match(text), _OUTRO.search(text)):
        if match is not None and not _within(match[0], source) and not _INTRO.match(source):
            return match[0].strip()
    return ""


def _within(part: str, source: str) -> bool:
    return " ".join(part.split()) in " ".join(source.split())


def _unwrapped(text: str, source: str) -> str:
    """Without a fence, tags or quotes around all of it that the source has not."""
    for pattern in (_FENCE, _TAGS):
        match = pattern.match(text)
        if match is not None and not pattern.match(source.strip()):
            again = match[1] if pattern is _FENCE else f"<{match[1]}>"
            text = text if again in match[2] else match[2].strip()
    for opening, closing in (('"', '"'), ("“", "”")):
        inner = text[1:-1]
        wrapped = len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in inner
        if wrapped and source.lstrip()[:1] != opening:
            text = inner.strip()
    return text


def _whole_part(text: str) -> Read:
    """A reply that was stopped, up to its last whole sentence or line."""
    if _END.search(text):
        return Read(text)
    ends = [match.end() for match in re.finditer(r"[.!?;。！？](?=\s)|[。！？]|\n", text)]
    kept = text[: ends[-1]].strip() if ends else ""
    return Read(kept, "" if kept else "the reply was cut off before its first sentence ended")
