"""Random texts of every kind a prompt is made of: scripts, code, data, markdown, chats, and characters out of place.

A text is a pure function of its random generator; nothing is read from disk.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any


def _words(text: str) -> list[str]:
    return text.split()


LATIN = _words(
    "the model answers questions about invoices orders refunds shipping dates and prices each customer account must "
    "not never unless except only if until at most three every all none some under over before after between report "
    "summary table value example context passage answer reply classify extract rewrite compare explain because so"
)
EUROPEAN = _words(
    "Größe über naïve façade señor łódź çalışma œuvre Ελληνικά γλώσσα привет мир данные Straße déjà niño žluťoučký"
)
ARABIC = _words("مرحبا العالم كتاب مدرسة لا تفعل ذلك أبدا إلا إذا كان السعر ١٢٣ قَلَمٌ")
DEVANAGARI = _words("नमस्ते दुनिया क्षत्रिय हिन्दी कभी नहीं जब तक मूल्य १२३ ज्ञान")
THAI = "สวัสดีชาวโลก ราคาไม่เกินสามร้อยบาท"
HANGUL = _words("한국어 문장 가격은 절대로 초과하지 않는다 만약 그러나")
CJK = "漢字文章価格不得超過三百元除非客戶同意必須回答問題資料表示例子説明其他情況"
KANA = "これはテストのぶんしょうです。ただしれいがいをのぞく"
EMOJI = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇯🇵", "😀", "❤️‍🔥", "1️⃣", "🧑🏿‍🚀", "☕️")
MARKS = "\u0301\u0308\u0323\u20dd\u0338\u0489\u093f\u0e31\u05b7\ufe0f"
ODD = "\0\x01\x1c\x7f\x85\u00a0\u00ad\u200b\u200c\u200d\u200e\u2028\u2029\u2060\ufeff\ufffd\ufffe\ud800\udfff\U000e0041"
PLACES = ("{name}", "{{ticket}}", "${VALUE}", "%s", "<input>", "{0}", "{{#each items}}")


def number(rng: random.Random) -> str:
    """A number as people write it, with its unit."""
    return rng.choice(
        (
            f"{rng.randint(0, 99_999):,}",
            f"-{rng.random() * 100:.2f} %",
            f"${rng.randint(1, 9_999)}.{rng.randint(10, 99)}",
            f"{rng.randint(1, 28)}/{rng.randint(1, 12)}/20{rng.randint(10, 40)}",
            f"20{rng.randint(10, 40)}-0{rng.randint(1, 9)}-1{rng.randint(0, 9)}",
            f"{rng.randint(1, 900)} km/h",
            f"v{rng.randint(0, 9)}.{rng.randint(0, 30)}.{rng.randint(0, 9)}",
        )
    )


def sentence(rng: random.Random, words: list[str] = LATIN) -> str:
    """A sentence with now and then a number, a name, a quote, a path or a slot in it."""
    found = [rng.choice(words) for _ in range(rng.randint(2, 18))]
    for _ in range(rng.randint(0, 2)):
        odd = rng.choice(
            (
                number(rng),
                "Maria Keller",
                '"left as it is"',
                "https://example.org/a?b=1&c=%20",
                "/srv/data/in.csv",
                "order_id",
                rng.choice(PLACES),
                "isn't",
            )
        )
        found.insert(rng.randint(0, len(found)), odd)
    text = " ".join(found)
    return text[:1].upper() + text[1:] + rng.choice((".", ".", ".", "?", "!", ";", ":", ""))


def latin(rng: random.Random) -> str:
    return rng.choice((" ", " ", "\n", "\n\n", "  ")).join(sentence(rng) for _ in range(rng.randint(1, 9)))


def european(rng: random.Random) -> str:
    return " ".join(sentence(rng, EUROPEAN) for _ in range(rng.randint(1, 5)))


def east_asian(rng: random.Random) -> str:
    pool = rng.choice((CJK, CJK + KANA, KANA))
    parts = ["".join(rng.choice(pool) for _ in range(rng.randint(1, 25))) for _ in range(rng.randint(1, 8))]
    return "".join(part + rng.choice("。。，、！？\n 「") for part in parts)


def right_to_left(rng: random.Random) -> str:
    return " ".join(sentence(rng, ARABIC) for _ in range(rng.randint(1, 6)))


def indic(rng: random.Random) -> str:
    words = rng.choice((DEVANAGARI, HANGUL, list(THAI)))
    glue = "" if words and len(words[0]) == 1 else " "
    return rng.choice(("। ", ". ", "\n")).join(
        glue.join(rng.choice(words) for _ in range(rng.randint(1, 20))) for _ in range(rng.randint(1, 5))
    )


def emoji(rng: random.Random) -> str:
    return "".join(rng.choice((*EMOJI, " ", "ok ", "\u200d", "🇫")) for _ in range(rng.randint(1, 40)))


def marks(rng: random.Random) -> str:
    return "".join(
        rng.choice("aeoun xyÅक") + "".join(rng.choice(MARKS) for _ in range(rng.randint(0, 5)))
        for _ in range(rng.randint(1, 60))
    )


def code(rng: random.Random) -> str:
    lines = ["import os", ""]
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(("load", "price_of", "check", "toJson"))
        lines += [
            f"def {name}(order_id: str, limit={rng.randint(0, 99)}):",
            f'    """{sentence(rng)}"""',
            f"    if limit > {rng.random():.3f} and not order_id:",
            f"        return {{'a': [{rng.randint(0, 9)}, {rng.randint(0, 9)}], \"b\": None}}  # {rng.choice(LATIN)}",
            "",
        ]
    body = "\n".join(lines)
    fence = rng.choice(("```python\n{}\n```", "```\n{}\n```", "{}", "```\n{}", "~~~\n{}\n~~~"))
    return rng.choice(("", latin(rng) + "\n\n")) + fence.format("%s").replace("%s", body, 1)


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.randint(0, 5 if depth else 3)
    if kind == 0:
        return rng.randint(-(10**9), 10**9)
    if kind == 1:
        return sentence(rng)
    if kind == 2:
        return rng.choice((None, True, False, 1.50, 1e-9))
    if kind == 3:
        return rng.choice(LATIN)
    if kind == 4:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 5))]
    return {f"{rng.choice(LATIN)}_{place}": _value(rng, depth - 1) for place in range(rng.randint(0, 5))}


def data(rng: random.Random) -> str:
    value = {"type": "object", "rows": _value(rng, 3), "more": _value(rng, 2)}
    text = json.dumps(value, indent=rng.choice((None, 2, 4)), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15:
        text = text[: rng.randint(1, len(text))]
    if rng.random() < 0.2:
        text = f"<items>\n  <item id='1'>{sentence(rng)}</item>\n</items>"
    return rng.choice(("{}", "```json\n{}\n```", "Answer with this schema:\n{}", "{}\n\n")).replace("{}", text, 1)


def markdown(rng: random.Random) -> str:
    lines: list[str] = []
    for _ in range(rng.randint(1, 4)):
        lines += [f"{'#' * rng.randint(1, 4)} {rng.choice(LATIN).title()}", ""]
        for _ in range(rng.randint(0, 4)):
            lines.append(rng.choice(("- {}", "* {}", "1. {}", "   - {}", "> {}")).replace("{}", sentence(rng), 1))
        lines.append("")
        if rng.random() < 0.3:
            lines += ["| a | b |", "|---|---|", *(f"| {number(rng)} | {rng.choice(LATIN)} |" for _ in range(3)), ""]
        if rng.random() < 0.5:
            lines += [latin(rng), ""]
    return "\n".join(lines)


def demonstrations(rng: random.Random) -> str:
    form = rng.choice((("Q", "A"), ("Input", "Output"), ("Review", "Sentiment"), ("Question", "Answer")))
    shots = [f"{form[0]}: {sentence(rng)}\n{form[1]}: {rng.choice(LATIN)}" for _ in range(rng.randint(1, 8))]
    head = f"Classify the text. Answer with one of: yes, no.\n{sentence(rng)}\n\n"
    return head + "\n\n".join(shots) + f"\n\n{form[0]}: {rng.choice(PLACES)}\n{form[1]}:"


def log(rng: random.Random) -> str:
    rows = [
        f"2026-11-{rng.randint(10, 28)}T{rng.randint(10, 23)}:{rng.randint(10, 59)}:07Z "
        f"{rng.choice(('INFO', 'WARN', 'ERROR'))} worker[{rng.randint(1, 99)}] {sentence(rng)}"
        for _ in range(rng.randint(1, 15))
    ]
    return "\n".join(rows + (rows[:3] if rng.random() < 0.3 else []))


def wild(rng: random.Random) -> str:
    """Any code point, also those that are none, controls, and long runs of one thing."""
    parts: list[str] = []
    for _ in range(rng.randint(1, 30)):
        kind = rng.randint(0, 5)
        if kind == 0:
            parts.append(chr(rng.randrange(0x110000)))
        elif kind == 1:
            parts.append(rng.choice(ODD))
        elif kind == 2:
            parts.append(rng.choice(" \n\t\r a.=-{<\"'`#|") * rng.choice((1, 2, 3, 17, 90)))
        elif kind == 3:
            parts.append(
                rng.choice(("<|endoftext|>", "<|im_start|>", "[CLS]", "</s>", "<EOT>", "{{", "}}", "```", '{"a":'))
            )
        elif kind == 4:
            parts.append("".join(chr(rng.randrange(33, 1_500)) for _ in range(rng.randint(1, 12))))
        else:
            parts.append(rng.choice(LATIN) + rng.choice((" ", ". ", "")))
    return "".join(parts)


KINDS: dict[str, Callable[[random.Random], str]] = {
    "latin": latin,
    "european": european,
    "cjk": east_asian,
    "arabic": right_to_left,
    "indic": indic,
    "emoji": emoji,
    "combining marks": marks,
    "code": code,
    "json": data,
    "markdown": markdown,
    "demonstrations": demonstrations,
    "log": log,
    "wild": wild,
}


def text(rng: random.Random) -> tuple[str, str]:
    """A text and its kind: mostly short, one in sixty of many parts, one in four of mixed kinds."""
    kind = rng.choice(list(KINDS))
    if rng.random() < 0.25:
        mixed = [KINDS[rng.choice(list(KINDS))](rng) for _ in range(rng.randint(2, 4))]
        return rng.choice(("\n\n", "\n", " ", "")).join(mixed), "mixed"
    if rng.random() < 1 / 60:
        return rng.choice(("\n\n", "\n")).join(KINDS[kind](rng) for _ in range(rng.randint(5, 40))), kind
    return KINDS[kind](rng), kind


def _one(rng: random.Random) -> str:
    return KINDS[rng.choice(list(KINDS))](rng)


def chat(rng: random.Random) -> list[dict[str, Any]]:
    """Chat messages: a system prompt, turns, now and then a tool call with its answer or an image."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.7:
        messages.append({"role": "system", "content": _one(rng)})
    for turn in range(rng.randint(1, 3)):
        asked: Any = _one(rng)
        if rng.random() < 0.15:
            asked = [
                {"type": "text", "text": asked},
                {"type": "image_url", "image_url": {"url": "https://e.org/i.png"}},
            ]
        messages.append({"role": "user", "content": asked})
        if rng.random() < 0.3:
            call = {"id": f"c{turn}", "type": "function", "function": {"name": "find", "arguments": '{"q": "tea"}'}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": _one(rng)})
        messages.append({"role": "assistant", "content": sentence(rng)})
    if rng.random() < 0.8:
        messages.append({"role": "user", "content": sentence(rng)})
    return messages
