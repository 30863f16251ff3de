"""Texts for property tests: pieces that begin, end or break every kind of block, in any order."""

from hypothesis import strategies as st

BITS = [
    "\n", "\n\n", "\n \n", "\r", "\r\n", "\u2028", "\x00", "\ud800", "\t", "    ", "  ", "   ", " ",
    "- ", "1. ", "(a) ", "# ", "## Title\n", "---", "===", "| a | b |\n", "a | b | c\n", "> ",
    "```", "```json\n", "````\n", "~~~", "{", "}", "[", "]", '{"a" : [1, 2.50]}\n', '{"type": "object", "items": {}}\n',
    "<a>", "</a>", "<doc>", "</doc>", "<examples>", "</examples>", "<example>", "</example>", "<your answer>", "<br>",
    "Q: ", "A: ", "Question: ", "Answer: ", "User: ", "Assistant: ", "Alice: ", "Options:", "Example 1", "Tools:\n",
    "Let's think step by step.", "The answer is 4.", "Return JSON: ", "Respond with yes or no.", "You must never lie.",
    "{x}", "{{y}}", "${z}", "$w", "%s", "%(k)d", "[[slot]]", "{% if a %}", "\\frac{a}{b}", "$x^2$",
    '"', "'", "`", "“", "”", "\\", "word", "Word. ", "Mr. Smith ", "U.S. ", "e.g. ", "3.14 ", "-5 °C ", "$1,000 ",
    "...",
    "http://a.b/c?d=e. ", "a_b", "fooBar", "/usr/bin/x ", "not ", "unless ", "。", "字", "؟", "।", "é", "👩‍👩‍👧", "🇩🇪",
    "2024-01-02 10:00:00 x\n", "A paragraph that is long enough to be no coincidence at all.\n\n",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=5)), max_size=60).map("".join)

LONG = [
    "a", "7", ".", '"', "'", "“", "{", "[", "}", "$", "%", "<", "`", "\0", "\ud800", " ", "\n", "-", "/", "\\", "_",
    "🇩",
    "字", "{\n", "[\n", '"\\', '{"a":', "<a>", "```\n", "Q: a\n", "Q: a\nA: b\n\n", "User: a\nAssistant: b\n", "Cap ",
    "A. ", "not ", "Return JSON:\n", "Options:\n", "a | b | c\n", "- a\n", "a/", "a.", "1,", "a@", "--a", "$a ", "{{a",
    "please return the ", "a.b.", "word and more. ", "    x = 1\n",
]  # fmt: skip
"""What a hostile text of one kind consists of."""


def repeated(piece: str, size: int) -> str:
    """`size` characters of nothing but `piece`."""
    return (piece * (size // len(piece) + 1))[:size]
