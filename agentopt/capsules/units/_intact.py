"""Intact spans: what is never altered inside a unit that stays. Numbers, dates, names, quotes, code, negations, ...

Of two spans one of which holds the other the outer one is given. A negation or a quantifier reaches to the end of its
clause; where other spans stand in that scope, the scope is given in parts around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from agentopt.capsules._types import Span, SpanKind
from agentopt.capsules.units._lines import Brackets, Tags, fence_end, is_opaque, looks_like_json, same_length

_N = r"\d++(?:[.,'’\u00a0\u202f]\d++)*+(?:[eE][-+]?\d+)?"
_SCALE = r"(?:\s?(?:k|K|m|M|bn|B|T|thousand|million|billion|trillion|万|亿|億|lakh|crore)(?![A-Za-z]))?"
_SIGN = r"(?:[<>≤≥≈~±]=?\s?)?[-+−–]?"
_MONTH = (
    r"(?:Jan(?:uary|\.)?|Feb(?:ruary|\.)?|Mar(?:ch|\.)?|Apr(?:il|\.)?|May|June?|July?|Aug(?:ust|\.)?"
    r"|Sept?(?:ember|\.)?|Oct(?:ober|\.)?|Nov(?:ember|\.)?|Dec(?:ember|\.)?)"
)
_MONAT = "(?:Januar|Jänner|Februar|Feber|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember)"
_UNIT = r"""(?:%|‰|°\s?[CFK]?|percent(?:age\spoints?)?|per\scent|pp|bps|degrees?|kelvin|celsius|fahrenheit
  |[kKMGTPmµμncd]?(?:m|g|s|l|L|W|Wh|V|A|Hz|B|b|Pa|J|N|bit|byte|bps|cal|eV|mol)(?:[²³]|\^?[23](?!\d))?|ms|min
    |mins|h|hr|hrs|lbs?|oz|ft|in|yd|mi|mph|kph|rpm|psi|px|pt|fps|dB|ha|GiB|MiB|KiB|TiB|sqm
  |(?:nano|micro|milli)?seconds?|minutes?|hours?|days?|weeks?|months?|quarters?|years?|decades?|centur(?:y|ies)
  |(?:kilo|centi|milli)?met(?:er|re)s?|miles?|feet|foot|inch(?:es)?|yards?|acres?|hectares?|(?:kilo
    |milli)?grams?|kilos?|pounds?|ounces?|tons?|tonnes?
  |(?:milli)?lit(?:er|re)s?|gallons?|cups?|(?:mega|giga|kilo|tera)?(?:bytes?|bits?|watts?|hertz)|volts?
    |calories|tokens?|words?|characters?|lines?|pages?|times?|people|persons?|users?|items?|points?|x
  |个|人|年|月|日|天|元|岁|小时|分钟|秒|公里|米|円|時間|分)"""
_UPPER = "A-ZÀ-ÖØ-ÞΆ-ΫА-ЯЁ"
_WORD = rf"(?:[{_UPPER}][\w]{{0,40}}(?:['’&+-][\w]{{1,30}}){{0,3}})"
_SPELLED = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion"
    r"|trillion|dozen|half|third|quarter)s?"
)
_B = r"(?<![A-Za-z0-9_])"
_E = r"(?![A-Za-z0-9_])"

_INLINE = re.compile(
    rf"""(?P<code>`[^`\n]{{1,500}}`)
    |(?P<hash>{_B}[0-9a-fA-F]{{8}}-(?:[0-9a-fA-F]{{4}}-){{3}}[0-9a-fA-F]{{12}}{_E}
      |{_B}(?=[0-9a-f]{{0,8}}[a-f])[0-9a-f]{{16,128}}{_E})
    |(?P<quote>"[^"\n]{{1,500}}"|“[^“”\n]{{1,500}}”|«[^«»\n]{{1,500}}»|「[^「」\n]{{1,500}}」|『[^『』\n]{{1,500}}』
      |《[^《》\n]{{1,200}}》|‘[^‘’\n]{{1,300}}’(?!\w)|(?<![\w'])'(?=[^\s'])[^'\n]{{1,200}}(?<=\S)'(?!\w))
    |(?P<url>{_B}(?:(?:https?|ftps?|file|wss?|s3|git|ssh)://|www\.
      |mailto:)[^\s<>"'`“”「」，。、）]*[^\s<>"'`“”「」，。、）.,;:!?)\]]
      |(?<![\w.+-])[\w.+-]{{1,64}}@[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,8}})
    |(?P<date>{_B}(?:\d{{4}}-\d\d?-\d\d?(?:[T\s]\d\d?:\d\d(?::\d\d(?:[.,]\d{{1,9}})?)?(?:Z|\s?[+-]\d\d:?\d\d)?)?{_E}
      |\d{{1,2}}(?P<mark>[/.-])\d{{1,2}}(?P=mark)\d{{2,4}}{_E}(?!/)
      |\d{{1,2}}:\d\d(?::\d\d(?:[.,]\d{{1,9}})?)?(?:\s?[ap]\.?m\b\.?)?(?:\s?(?:UTC|GMT|[A-Z]{{1,3}}T)\b)?{_E}
      |\d{{1,2}}\s?[ap]\.?m\b\.?
      |\d{{1,2}}(?:st|nd|rd|th)?\s(?:of\s)?{_MONTH}(?:,?\s\d{{4}})?{_E}
      |\d{{1,2}}\.\s?{_MONAT}(?:\s\d{{4}})?{_E}
      |{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?(?:\s?[-–]\s?\d{{1,2}})?(?:,?\s\d{{4}})?{_E}|{_MONTH}\s\d{{4}}{_E}
      |\d{{2,4}}年(?:\d{{1,2}}月)?(?:\d{{1,2}}[日号])?|\d{{1,2}}月\d{{1,2}}[日号]|Q[1-4]\s\d{{4}}{_E}
      |(?:19|20)\d\d[-–](?:19|20)?\d\d{_E}|\d{{4}}s{_E}))
    |(?P<path>{_B}[A-Za-z]:\\[^\s"<>|?*:,;]{{0,300}}[^\s"<>|?*:,;.)]
      |(?<!\\)\\\\[\w.-]{{1,80}}\\[^\s"<>|?*:,;]{{1,300}}
      |(?<![\w/.~)<-])(?:~|\.{{1,2}}|[\w.-]{{1,80}})?/(?:[\w.@%+~-]{{1,120}}/){{1,30}}(?:[\w.@%+~*-]{{0,120}}[\w*])?
      |(?<![\w/.~)<])(?:~|\.{{1,2}})?/[\w.@%+~-]{{0,120}}[\w]{_E}
        |(?<![\w/.-])[A-Za-z_][\w.-]{{0,80}}/[\w-]{{1,80}}\.[A-Za-z]\w{{0,7}}{_E})
    |(?P<money>{_B}{_SIGN}(?:US|AU?|CA?|HK|NZ|R)?[$€£¥₹₽₩₺฿]\s?{_N}{_SCALE}(?:\s?[-–]\s?[$€£¥₹]?{_N}{_SCALE})?
      |{_B}{_SIGN}{_N}{_SCALE}\s?(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|AUD|CAD|dollars?|euros?|cents?|rupees?|yen
        |yuan){_E}|{_B}{_SIGN}{_N}{_SCALE}\s?[$€£¥₹元円]
      |{_B}(?:USD|EUR|GBP|JPY|CNY|INR|CHF)\s?{_N}{_SCALE})
    |(?P<number>{_B}{_SIGN}{_N}(?:\s?(?:[-–—/×*^]|to|:
      |\.\.)\s?[-+]?{_N}(?![A-Za-z]))?{_SCALE}(?:[\s-]?{_UNIT}(?![A-Za-z])(?:/[A-Za-z]{{1,10}}
      |\sper\s\w{{1,20}})?|(?:st|nd|rd|th)\b)?(?![A-Za-z_])
      |[½¼¾⅓⅔⅛]|(?<!\w)(?i:{_SPELLED}(?:(?:[\s-]|\sand\s){_SPELLED}){{0,6}})(?:[\s-]{_UNIT})?(?!\w))
    |(?P<identifier>(?<!\S)--?[A-Za-z][\w-]{{0,60}}(?:=[^\s,;]{{1,80}})?
      |[@\#]\w[\w-]{{0,60}}
      |{_B}(?=[A-Za-z0-9]{{0,60}}_[A-Za-z0-9])[A-Za-z0-9_]{{1,200}}(?:\.[A-Za-z_]\w{{0,60}}){{0,8}}(?:\(\))?{_E}
      |{_B}[A-Za-z_][A-Za-z0-9_]{{1,60}}(?:(?:\.|::|->)[A-Za-z_][A-Za-z0-9_]{{0,60}}){{1,12}}(?:\(\))?{_E}
      |{_B}[A-Za-z_][A-Za-z0-9_]{{0,60}}\(\)
      |{_B}[a-z]{{1,40}}[A-Z][A-Za-z0-9]{{0,80}}{_E}(?:\s\d{{1,3}}(?![\w.%]))?
      |{_B}(?=[A-Za-z-]{{0,40}}[0-9])(?=[0-9-]{{0,80}}[A-Za-z])[A-Za-z0-9]{{1,128}}(?:[-.][A-Za-z0-9]{{1,60}}){{0,8}}{_E})
    |(?P<name>(?<!\w)(?:(?:Mr|Mrs|Ms|Dr|Prof|St|Sen|Gov|Gen|Sir|Lady)\.?\s)?(?:[{_UPPER}]\.\s?){{0,3}}{_WORD}
      (?:(?:\s(?:of|of\sthe|de|de\sla|der|van|von|van\sder|du|del|di|da|la|le|al|bin|ibn|&|and\sthe)\s|[ -])
         (?:(?:[{_UPPER}]\.\s?){{1,3}}{_WORD}|{_WORD}|\d{{1,4}}(?![\w%.])|[IVX]{{1,5}}\b)){{0,10}}
      (?:,?\s(?:Inc|Ltd|Corp|Co|LLC|GmbH|Jr|Sr)\b\.?)?)""",
    re.VERBOSE,
)
_BLOCK = re.compile(
    r"(?P<fence>^[^\S\n]*(?:`{3,}(?=[^`\n]*$)|~{3,}))|[\[{](?=\s*[\"\[{}\]\-0-9tfn])|<(?=[A-Za-z/!?])", re.MULTILINE
)
_XML_TAG = re.compile(r"</?[A-Za-z_][\w:.-]*(?:\s[^<>\n]*)?/?>|<!--.{0,2000}?-->|<[?!][^<>]{0,300}>", re.DOTALL)
_SENTENCE_START = re.compile(r"(?:^|[.!?。！？:]|\n[^\S\n]*(?:[-*•>#]+|\d{1,3}[.)])?)[\s\"'“‘(\[*_]*$")

NEGATIONS = r"""no|not|never|none|nothing|nobody|nowhere|neither|nor|without|cannot|hardly|scarcely|barely
  |rarely|seldom
  |\w{2,9}n['’]t|cant|dont|wont|didnt|doesnt|isnt|arent|(?:fail|fails|failed)\sto|lack(?:s|ed|ing)?|refus(?:e
    |es|ed)|avoid(?:s|ed|ing)?
  |forbid\w{0,5}|forbidden|prohibit\w{0,5}|exclud\w{1,4}|instead\sof|rather\sthan|other\sthan
  |nicht|kein\w{0,3}|ohne|nie|niemals|ne|pas|jamais|sans|nunca|sin|jamás|não|nem|senza|nessun\w?|не|нет|без
    |никогда|नहीं|मत|ليس|لا|لم|لن"""
QUANTIFIERS = r"""all|every|each|any|some|most|many|few|fewer|several|both|either|only|just|sole(?:ly)?
  |at\s(?:most|least)|(?:more|less|fewer|greater|higher|lower|larger|smaller)\sthan
  |up\sto|exactly|always|often|usually|sometimes|every(?:one|body|thing)|any(?:one|body|thing)|half|twice
    |double|triple|about|approximately|around|nearly|almost
  |nur|jeder|jede|alle|tous|toutes|chaque|seulement|todos|todas|cada|solo|sólo|только|все|каждый"""
CONDITIONS = r"""if|unless|except\w{0,5}|until|till|provided|providing|whether|otherwise|when|whenever|in\scase
  |assuming|as\slong\sas|save\sfor|apart\sfrom
  |even\sthough|although|wenn|falls|außer|sofern|bis|si|sauf|jusqu|excepto|hasta|если|кроме|пока|अगर|यदि|إذا|إلا|لو"""
_SCOPE = r"(?:[^.,;:!?\n。，；：！？、…]|[.,:](?=[^\s]))*+"
_CUES = re.compile(
    rf"(?:\b(?:(?P<negation>{NEGATIONS})|(?P<quantifier>{QUANTIFIERS}))\b|(?P<negation2>[不没未非无別勿])|(?P<quantifier2>全部|所有|每|只|仅|至少|最多)){_SCOPE}",
    re.VERBOSE | re.IGNORECASE,
)
_ALNUM = re.compile(r"\w")


def find_intact(text: str) -> list[Span]:
    """The intact spans of `text`, sorted, not overlapping."""
    lines = same_length(text)
    spans: list[Span] = []
    at = 0
    for block in _blocks(lines):
        _inline(lines, at, block.start, spans)
        spans.append(block)
        at = block.end
    _inline(lines, at, len(lines), spans)
    return _with_scopes(lines, spans)


def _blocks(text: str) -> Iterator[Span]:
    """Fenced code, JSON values and XML: outermost first."""
    brackets, tags = Brackets(text), Tags(text)
    after = 0
    for match in _BLOCK.finditer(text):
        start = match.start()
        if start < after:
            continue
        kind, end = cast("SpanKind", "json"), -1
        if match["fence"] is not None:
            start += len(match[0]) - len(match[0].lstrip())
            kind, end = "code", fence_end(text, start)
        elif text[start] == "<":
            kind, end = "xml", _xml_end(text, start, tags)
        else:
            end = brackets.close(start)
            if end > 0 and (end - start < 3 or not looks_like_json(text, start, end)):
                end = -1
        if end > start:
            yield Span(start, end, "intact", kind)
            after = end


def _xml_end(text: str, start: int, tags: Tags) -> int:
    """Offset after an XML element that holds data, or after a single tag; -1 when it is none."""
    tag = _XML_TAG.match(text, start)
    if tag is None:
        return -1
    inner, close = tags.close(start)
    return close if inner >= 0 and is_opaque(text, tag.end(), inner) else tag.end()


def _inline(text: str, start: int, end: int, spans: list[Span]) -> None:
    for match in _INLINE.finditer(text, start, end):
        kind = cast("SpanKind", "identifier" if match.lastgroup == "hash" else match.lastgroup)
        if kind == "name" and not _is_name(text, match[0], match.start()):
            continue
        spans.append(Span(match.start(), match.end(), "intact", kind))


def _is_name(text: str, found: str, at: int) -> bool:
    """A capital alone does not make a name at the beginning of a sentence."""
    if found == "I":
        return False
    if len(found) > 1 and (found[1:] != found[1:].lower() or any(mark in found for mark in " -&")):
        return True
    return not _SENTENCE_START.search(text, max(0, at - 12), at) if at else False


def _with_scopes(text: str, spans: list[Span]) -> list[Span]:
    """The spans, and between them the parts of the scopes of negations and quantifiers."""
    out: list[Span] = []
    ahead = 0
    for match in _CUES.finditer(text):
        kind = cast("SpanKind", "negation" if match["negation"] or match["negation2"] else "quantifier")
        start, end = match.span()
        while ahead < len(spans) and spans[ahead].end <= start:
            out.append(spans[ahead])
            ahead += 1
        at = start
        while ahead < len(spans) and spans[ahead].start < end:
            _part(text, at, spans[ahead].start, kind, out)
            out.append(spans[ahead])
            at = max(at, spans[ahead].end)
            ahead += 1
        _part(text, at, end, kind, out)
    return out + spans[ahead:]


def _part(text: str, start: int, end: int, kind: SpanKind, out: list[Span]) -> None:
    if out:
        start = max(start, out[-1].end)
    if end <= start or not _ALNUM.search(text, start, end):
        return
    body = text[start:end]
    end -= len(body) - len(body.rstrip())
    out.append(Span(end - len(body.strip()), end, "intact", kind))
