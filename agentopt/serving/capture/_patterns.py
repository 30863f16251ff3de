"""What is taken out of captured text by default: e-mail addresses, phone and card numbers, keys and tokens.

Each finder gives the spans of one kind in a text, in time that grows with its length alone: captured text is written
by strangers, so a pattern that could be made to backtrack would be a way to stop the server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

_AT = re.compile(r"(?:@|%40)(?:[\w-]{1,63}\.){1,10}[^\W\d_](?:[\w-]{0,61}[^\W_])?")
_LOCAL = "._%+-'"
_PHONE = re.compile(
    r"(?:(?<!\d)\+|(?<![\w.])00[ -]?(?=[1-9]))\d(?:[ ()./-]{0,3}\d){6,14}(?!\w)"  # +49 (0)30 123456, 0044 20 7946 0958
    r"|(?<![\w.])(?:\(\d{2,5}\)[ -]?\d(?:[ ./-]?\d){4,9}"  # (555) 123-4567
    r"|\d{3}([ .-])\d{3}\1\d{4}"  # 555-123-4567
    r"|0\d{2,4}[ /-]\d{2,4}(?:[ /-]?\d{2,4}){1,3}"  # 030/123 456
    r")(?!\w)"
)
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
_GROUPED = re.compile(
    r"(?<!\d)(?=("
    r"\d{13,19}|\d{4}([ \u00a0\u202f.-]{1,2})\d{4}\2\d{4}\2\d{4}|3[47]\d\d([ \u00a0\u202f.-]{1,2})\d{6}\3\d{5}"
    r")(?!\d))"
)
"""As cards show it. What stands before or after it, an expiry date say, is none of it, so each place is looked at."""
_DIGIT = re.compile(r"\d")
_DOUBLED = bytes.maketrans(b"0123456789", b"0246813579")
"""Of a digit: that of the sum of the digits of its double."""
_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|ak|pk|rk|hf|gsk|xai|r8|nvapi|glpat|npm|pypi|dop_v1|shpat|whsec)[-_](?=[A-Za-z_-]{0,64}\d)[A-Za-z0-9_-]{16,}"
    r"|ak-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"  # our own: one in 1,500 has no digit
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"
    r"|(?<![_-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?"
    r")"
)
_BEARER = re.compile(r"(?i)(?<![a-z0-9])(?:bearer|basic)[ \t]+(?=\S{0,200}[0-9+/=])[A-Za-z0-9+/=_.~-]{12,}")
_BLOCK = "-----BEGIN "
_BLOCK_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----")
_BLOCK_HEAD = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----")


def emails(text: str) -> Iterator[Span]:
    """Addresses, also with the @ percent-encoded; found from the @ outward."""
    if "@" not in text and "%40" not in text:
        return
    for match in _AT.finditer(text):
        start = match.start()
        while start > 0 and match.start() - start < 320 and (text[start - 1].isalnum() or text[start - 1] in _LOCAL):
            start -= 1
        if start < match.start():
            yield start, match.end()


def phones(text: str) -> Iterator[Span]:
    """Numbers that are written as phone numbers: with a plus, parentheses or separators. Bare digits are not."""
    if _DIGIT.search(text) is None:
        return
    for match in _PHONE.finditer(text):
        if 7 <= sum(map(str.isdigit, match[0])) <= 15:
            yield match.span()


def cards(text: str) -> Iterator[Span]:
    """13 to 19 digits, also in groups, whose check digit (Luhn) is right."""
    if _DIGIT.search(text) is None:
        return
    seen: set[Span] = set()
    for match in _CARD.finditer(text):
        seen.add(match.span())
        if _luhn(match[0]):
            yield match.span()
    for match in _GROUPED.finditer(text):
        if match.span(1) not in seen and _luhn(match[1]):
            yield match.span(1)


def keys(text: str) -> Iterator[Span]:
    """API keys and tokens by their well-known beginnings, JSON web tokens, and private keys in PEM form."""
    for match in _KEYS.finditer(text):
        yield match.span()
    start = text.find(_BLOCK)
    while start >= 0:
        if _BLOCK_HEAD.match(text, start):
            match = _BLOCK_END.search(text, start)
            end = len(text) if match is None else match.end()  # a key that was cut off is still a key
            yield start, end
            start = end - len(_BLOCK)
        start = text.find(_BLOCK, start + len(_BLOCK))


def credentials(text: str) -> Iterator[Span]:
    """What follows `Bearer` or `Basic` in a header."""
    for match in _BEARER.finditer(text):
        yield match.span()


def _luhn(text: str) -> bool:
    digits = "".join(filter(str.isdigit, text))
    if not digits.isascii():
        digits = "".join(str(int(digit)) for digit in digits)
    codes = digits.encode()
    total = sum(codes[::-2]) + sum(codes[-2::-2].translate(_DOUBLED)) - len(codes) * ord("0")
    return total % 10 == 0 and len(set(codes)) > 1


DEFAULTS: dict[str, Finder] = {
    "key": keys,
    "credentials": credentials,
    "email": emails,
    "card": cards,
    "phone": phones,
}
"""Name to finder; the name is what stands in the text's place, in square brackets."""
