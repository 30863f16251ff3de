"""What a text states that can be looked up in another one: numbers with sign, unit and scale, dates, names, addresses.

A number is compared by value, so `1,500` is `1.5k` and "three" is `3`; a unit or a currency, where both sides have one,
must be the same. A date is compared by its parts, so `2025-03-04` is "4 March 2025". What cannot be read as either
(versions, times, phone numbers) is compared as it is written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

_CURRENCIES = {"$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "usd": "$", "eur": "€", "gbp": "£", "jpy": "¥"}
_UNITS: dict[str, str] = {}
for _names in (
    "% percent pct", "$ dollar dollars usd", "€ euro euros eur", "£ pound pounds gbp", "¥ yen jpy", "cent cents",
    "second seconds sec secs s", "minute minutes min mins", "hour hours hr hrs h", "day days d", "week weeks wk wks",
    "month months mo", "year years yr yrs", "ms millisecond milliseconds", "mm millimetre millimetres millimeter "
    "millimeters", "cm centimetre centimetres centimeter centimeters", "km kilometre kilometres kilometer kilometers",
    "m metre metres meter meters", "mile miles mi", "foot feet ft", "inch inches", "kg kilogram kilograms kilo kilos",
    "g gram grams", "mg milligram milligrams", "lb lbs", "ounce ounces oz", "l litre litres liter liters",
    "ml millilitre millilitres milliliter milliliters", "°c celsius", "°f fahrenheit", "kb kilobyte kilobytes",
    "mb megabyte megabytes", "gb gigabyte gigabytes", "tb terabyte terabytes", "byte bytes", "bit bits", "hz hertz",
    "ghz", "mhz", "w watt watts", "kw kilowatt kilowatts", "kwh", "v volt volts", "token tokens", "word words",
    "char chars character characters", "sentence sentences", "line lines", "point points pt pts", "page pages",
):  # fmt: skip
    for _name in _names.split():
        _UNITS[_name] = _names.split()[0]
_TELLING = frozenset("%$€£¥₹")
_SCALES = {"k": 3, "thousand": 3, "million": 6, "mn": 6, "mio": 6, "billion": 9, "bn": 9, "trillion": 12}
_DIGITS = r"\d+(?:[.,:/'’_\u00a0\u202f]\d+|(?<!\d\d\d\d)[ ](?=\d{3}(?![\d.,]*\w))\d{3})*+"
_NUMBER = re.compile(
    rf"""
    (?<!\w)(?<!\w\.)(?P<minus>(?<![\w)\]%.])[-−](?=[$€£¥₹]?\d))?
    (?P<currency>(?:[$€£¥₹]|\b(?:USD|EUR|GBP|JPY))[^\S\n]?)?(?P<minus2>[-−](?=\d))?
    (?P<digits>{_DIGITS})(?P<exp>[eE][-+]?\d{{1,4}}(?!\w))?
    (?:\s?(?P<scale>(?i:k|thousand|million|mn|mio|billion|bn|trillion))(?![\w]))?
    (?:(?!\n-?[%$€£¥₹°])\s?-?(?:(?:business|working|calendar|full|consecutive|square|cubic)\s)?(?P<unit>%|[$€£¥₹](?!\d)|°\s?[CF]|[^\W\d_]+\b))?
    """,
    re.X,
)
_GROUPED = re.compile(r"\d{1,3}(?:[,'’_ \u00a0\u202f]\d{3})+(?:\.\d+)?")
_GROUPED_DOTS = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}")
_PLAIN = re.compile(r"\d+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}|0,\d+")
_LIST_MARK = re.compile(r"^[ \t>]*(?:\(?\d{1,3}[.)]|#{1,6})[ \t]+", re.M)

_ONE_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_ONES = _ONE_WORDS.split()
_TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = _TEN_WORDS.split()
_WORDS = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * n for n, word in enumerate(_TENS)}
_BIG = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_NAMED = "|".join((*_WORDS, *_BIG))
_NUMBER_WORDS = re.compile(rf"\b(?:{_NAMED})(?:(?:[ -]|[ -]and[ -])(?:{_NAMED}))*+\b(?:[ -](?P<unit>[a-z]+))?", re.I)
_ALSO = {
    "once": "1", "twice": "2", "both": "2", "pair": "2", "double": "2", "half": "0.5", "triple": "3", "dozen": "12",
    "first": "1", "third": "3", "fourth": "4", "fifth": "5", "sixth": "6", "tenth": "10", "quarter": "0.25",
    "single": "1", "a": "1", "an": "1", "second": "2",
}  # fmt: skip
_ALSO_RE = re.compile(r"\b(?:" + "|".join(_ALSO) + r")\b", re.I)

_MONTH_NAMES = "jan feb mar apr may jun jul aug sep oct nov dec"
_MONTHS = {name: number for number, name in enumerate(_MONTH_NAMES.split(), 1)}
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DATE = re.compile(
    rf"""\b(?P<y1>\d{{4}})[-/.](?P<m1>\d{{1,2}})[-/.](?P<d1>\d{{1,2}})(?![\d])
    |\b(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?[ -](?:of[ ])?(?P<m2>{_MONTH})(?:,?[ -](?P<y2>\d{{4}})(?!\d))?
    |\b(?P<m3>{_MONTH})[ ](?P<d3>\d{{1,2}})(?:st|nd|rd|th)?(?!\d)(?:,?[ ](?P<y3>\d{{4}})(?!\d))?
    |\b(?P<m4>{_MONTH})[ ](?P<y4>\d{{4}})(?!\d)""",
    re.X | re.I,
)
_ADDRESS = re.compile(
    r"https?://[^\s<>\"'`\])}]+|www\.[^\s<>\"'`\])}]+|[\w.+-]{1,64}@[\w-]+\.[\w.-]+"
    r"|(?<![\w/:.])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]+)+/?|\b[A-Za-z]:\\[\w\\.-]+"
    r"|\b[A-Za-z]\w*_\w+\b|\b[a-z][a-z0-9]*+(?:[A-Z][a-z0-9]++)+\b|\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b"
    r"|\b[A-Za-z][A-Za-z-]{0,40}\d[\w-]*+"
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it can be compared."""

    value: str
    """Canonical decimal digits with the sign, or the characters themselves for what is no plain number."""
    unit: str
    written: str


@dataclass(frozen=True, slots=True)
class Date:
    """The parts that a date has; 0 for a part that is not said."""

    year: int
    month: int
    day: int
    written: str

    def within(self, others: Iterable[Date]) -> bool:
        """Whether one of `others` says at least as much and nothing else."""
        return any(
            self.month == other.month and self.day in (0, other.day) and self.year in (0, other.year)
            for other in others
        )


def numbers(text: str) -> Iterator[Number]:
    """Numbers in digits, and in words of which the value is not in doubt ("one" is)."""
    for match in _NUMBER.finditer(text):
        yield from _digits(match)
    for match in _NUMBER_WORDS.finditer(text):
        words = re.findall(r"[a-z]+", match[0].lower())
        value = _word_value(words)
        if value != 1 and words[0] not in _BIG:
            yield Number(str(value), _UNITS.get((match["unit"] or "").lower(), ""), match[0])


def implied(text: str) -> Iterator[Number]:
    """Numbers that words such as "both", "half" or "one" stand for: enough for a digit elsewhere to be no invention."""
    for match in _ALSO_RE.finditer(text):
        yield Number(_ALSO[match[0].lower()], "", match[0])
    for match in re.finditer(r"\b(?:one|hundred|thousand|million|billion)\b", text, re.I):
        yield Number(str(_BIG.get(match[0].lower(), 1)), "", match[0])


def without_list_marks(text: str) -> str:
    """`text` without the numbers that only count its lines."""
    return _LIST_MARK.sub(lambda match: " " * len(match[0]), text)


def without_dates(text: str) -> str:
    """`text` without its dates."""
    return _DATE.sub(lambda match: " " * len(match[0]), text)


def _digits(match: re.Match[str]) -> Iterator[Number]:
    digits = match["digits"]
    unit = _unit(match["unit"])
    written = match[0].strip() if unit or not match["unit"] else match[0][: match.start("unit") - match.start()].strip()
    currency = (match["currency"] or "").strip().lower()
    if currency:
        unit = _CURRENCIES[currency]
    sign = "-" if match["minus"] or match["minus2"] else ""
    plain = _plain(digits)
    if plain is None:
        pieces = digits.split(",") if "," in digits and not re.search(r"[:/.]", digits) else [digits]
        for piece in pieces:
            yield Number(_plain(piece) or piece, unit if len(pieces) == 1 else "", written)
        return
    scale = _SCALES.get((match["scale"] or "").lower(), 0)
    yield Number(sign + _scaled(plain + (match["exp"] or ""), scale), unit, written)


def _unit(found: str | None) -> str:
    found = (found or "").replace(" ", "")
    if len(found) == 1 and found in "mMgGsdhlwWvV":
        return {"m": "m", "g": "g", "s": "second", "d": "day", "h": "hour", "l": "l", "W": "w", "V": "v"}.get(found, "")
    return _UNITS.get(found.lower(), "")


def _plain(digits: str) -> str | None:
    """Digits with at most one decimal point, or None for what is no plain number."""
    if _PLAIN.fullmatch(digits):
        return digits
    if _GROUPED.fullmatch(digits):
        return re.sub(r"[,'’_ \u00a0\u202f]", "", digits)
    if _GROUPED_DOTS.fullmatch(digits):
        return digits.replace(".", "").replace(",", ".")
    if _DECIMAL_COMMA.fullmatch(digits):
        return digits.replace(",", ".")
    return None


def _scaled(digits: str, scale: int) -> str:
    if len(digits) > 24:  # beyond what is computed with: compared as written
        return digits
    try:
        value = Decimal(digits).scaleb(scale)
    except InvalidOperation:
        return digits
    return format(value.normalize(), "f") if abs(value.adjusted()) < 40 else str(value.normalize())


def _word_value(words: list[str]) -> int:
    total = current = 0
    for word in words:
        if word in _WORDS:
            current += _WORDS[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word in _BIG:
            total, current = total + max(current, 1) * _BIG[word], 0
    return total + current


class Numbers:
    """The numbers of a source, to look others up in."""

    def __init__(self, text: str) -> None:
        self._units: dict[str, set[str]] = defaultdict(set)
        for number in numbers(without_list_marks(text)):
            self._units[number.value].add(number.unit)
        self._implied = {number.value for number in (*implied(text), *numbers(text)) if not number.unit}

    def has(self, number: Number, beside: str = "") -> bool:
        """Whether the source has this number.

        A unit that only one of the two says is no contradiction (a table says it in its head), but what is nothing but
        a percentage or an amount of money there must not become a plain number, unless `beside` says what it is.
        """
        units = self._units.get(number.value)
        if units is None:
            return number.value in self._implied and not number.unit
        if number.unit:
            return number.unit in units or "" in units
        return not units <= _TELLING or any(unit in beside for unit in units) or number.value in self._implied


def dates(text: str) -> Iterator[Date]:
    """Dates with a month that is not in doubt."""
    for match in _DATE.finditer(text):
        part = match.groupdict()
        month = part["m1"] or part["m2"] or part["m3"] or part["m4"]
        number = int(month) if month.isdigit() else _MONTHS[month[:3].lower()]
        year, day = part["y1"] or part["y2"] or part["y3"] or part["y4"], part["d1"] or part["d2"] or part["d3"]
        if 1 <= number <= 12:
            yield Date(int(year or 0), number, int(day or 0), match[0])


def addresses(text: str) -> Iterator[str]:
    """URLs, e-mail addresses, paths and identifiers, without the punctuation that ends the sentence."""
    for match in _ADDRESS.finditer(text):
        found = match[0].rstrip(".,;:!?-")
        if len(found) > 2:
            yield found
