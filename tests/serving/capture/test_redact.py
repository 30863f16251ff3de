"""Redaction: nothing that a pattern finds survives, however it is wrapped; what is not private stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentopt.errors import UserError
from agentopt.serving.capture import Redaction

SECRETS = [
    "first.o'last+tag@mail.example.com",
    "jürgen@straße.example",
    "+49 (0)30 123456-78",
    "(555) 123-4567",
    "4111 1111 1111 1111",
    "378282246310005",
    "sk-proj-a1B2c3D4e5F6g7H8i9J0",
    "ak-" + "a1B2" * 10 + "xyz",
    "ghp_abcdefghijklmnopqrst1234",
    "AKIAIOSFODNN7EXAMPLE",
    "Bearer abcdef0123456789abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKCAQ\n-----END RSA PRIVATE KEY-----",
]
KEPT = [
    "Invoice 2026-11-21 at 10:30:59 costs 1,234.50, see version 3.11.4 or 192.168.0.1.",
    "def f(x: int) -> int:\n    @app.route('/a')\n    return x @ y",
    "Basic training of the internationalisation team is on page 1234567.",
    r"C:\new\table \u00e4 and a lone \ here",
    "pip install sk-learn-contrib-something-long",
]
SAFE = st.text(st.characters(codec="utf-8", exclude_characters="0123456789@%+-_./\\"), max_size=12).map(
    lambda t: f" {t} "
)


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111 12/27",
        "card 4111-1111-1111-1111 123, thanks",
        "4111111111111111 123",
        "Invoice 2026 4111 1111 1111 1111",
        "paid 12/27 4111111111111111",
        "4111\u00a01111\u00a01111\u00a01111",
        "3782 822463 10005 12/27",
    ],
)
def test_a_card_is_found_beside_other_numbers(text: str) -> None:
    left = "".join(letter for letter in Redaction().text(text) if letter.isdigit())
    assert len(left) <= 4
    assert "[card]" in Redaction().text(text)


def test_our_own_keys_are_found_also_without_a_digit() -> None:
    assert Redaction().text("ak-" + "abCD_-xyZ" * 4 + "abcdefg") == "[key]"


@pytest.mark.parametrize("text", KEPT)
def test_what_is_not_private_stays(text: str) -> None:
    assert Redaction().text(text) == text


@pytest.mark.parametrize("secret", SECRETS)
def test_each_kind_is_found_plain_and_in_escapes_of_any_depth(secret: str) -> None:
    text = f"it is {secret} indeed"
    for _ in range(4):
        redacted = Redaction().text(text)
        assert "it is [" in redacted
        assert "indeed" in redacted
        assert not leaks(redacted, secret)
        text = json.dumps(text)
    everywhere = "".join(f"\\u{ord(letter):04x}" for letter in secret)
    assert not leaks(Redaction().text(f"it is {everywhere} indeed"), secret)


def leaks(stored: str, secret: str) -> bool:
    """Whether the secret can be read from what was stored, also after decoding it as JSON time and again."""
    views = [stored]
    for _ in range(6):
        views.append(views[-1].encode("utf-8", "replace").decode("unicode_escape", "replace"))
    return any(secret in view for view in views)


@settings(max_examples=150)
@given(
    secret=st.sampled_from(SECRETS),
    before=SAFE,
    after=SAFE,
    depth=st.integers(0, 3),
    ascii_only=st.booleans(),
    shape=st.sampled_from(["value", "key", "list", "deep"]),
)
def test_no_secret_survives_in_a_json_value(
    secret: str, before: str, after: str, depth: int, ascii_only: bool, shape: str
) -> None:
    text = before + secret + after
    for _ in range(depth):
        text = json.dumps({"arguments": text}, ensure_ascii=ascii_only)
    given_value: Any = {"value": text, "key": {text: 1}, "list": [[text]], "deep": {"a": [{"b": {"c": text}}]}}[shape]
    redaction = Redaction()
    stored = json.dumps(redaction.value(given_value))
    decoded = json.dumps(json.loads(stored), ensure_ascii=False)
    assert secret not in decoded and not leaks(stored, secret)
    assert not any(redaction.found(item) for item in strings(json.loads(stored)))


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []


@settings(max_examples=150)
@given(st.text(max_size=200))
def test_any_text_is_taken_and_what_remains_has_no_finding(text: str) -> None:
    redaction = Redaction()
    assert not redaction.found(redaction.text(text))


def test_numbers_that_are_cards_and_images_are_taken_out() -> None:
    given_value = {"card": 4111111111111111, "n": 12, "f": 0.25, "ok": True, "big": 2**70, "none": None}
    assert Redaction().value(given_value) == {**given_value, "card": "[card]"}
    image = "data:image/png;base64," + "iVBORw0KGgo" * 100
    redacted = Redaction().value({"url": image})["url"]
    assert redacted.startswith("[image/png, 1122 characters, sha256 ")
    assert "iVBOR" not in redacted


@pytest.mark.parametrize("piece", ["a", "@", "1 ", "eyJ-", "\\", "(12", "a@b.", "-----BEGIN PRIVATE KEY-----", "00 "])
def test_hostile_texts_take_linear_work(piece: str) -> None:
    # Quadratic work on half a megabyte would take hours: the suite's time limit would end it.
    text = piece * (500_000 // len(piece))
    assert "me@example.com" not in Redaction().text(f"{text} me@example.com")


def test_own_patterns_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "patterns.txt").write_text("# names\nProject [A-Z]\\w+\n\n", encoding="utf-8")
    redaction = Redaction.of([str(tmp_path / "patterns.txt"), r"\bcase-\d+"])
    assert redaction.text("Project Falcon, case-77, me@example.com") == "[redacted], [redacted], [email]"
    assert Redaction.of(["x+"], defaults=False).text("axxb me@example.com") == "a[redacted]b me@e[redacted]ample.com"


@pytest.mark.parametrize(("pattern", "said"), [("(", "no regular expression"), ("a*", "matches nothing at all")])
def test_a_bad_pattern_is_one_sentence(pattern: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        Redaction.of([pattern])
    (tmp_path / "p").write_text(f"fine\n{pattern}\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        Redaction.of([str(tmp_path / "p")])


def test_a_text_that_comes_again_is_treated_as_it_was() -> None:
    redaction = Redaction()
    dirty = [
        "someone@example.com",
        "x" * 100 + " someone@example.com",
        "A1b2" * 200,
        "mail \\u0040 to a\\u0040b.example",
    ]
    for _ in range(3):
        for text in dirty:
            assert redaction.text(text) == Redaction().text(text)
    for number in range(20_000):  # more than are remembered
        assert redaction.text(f"line {number}") == f"line {number}"
    assert redaction.text(dirty[0]) == "[email]"
