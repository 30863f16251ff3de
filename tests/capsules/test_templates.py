"""Chat templates: rendered as transformers renders them, in a sandbox, with clear errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import agentopt as ao
from agentopt.capsules import TokenBudget
from agentopt.capsules.counting._templates import (
    ChatTemplate,
    TemplateRefused,
    chatml,
    template_of_folder,
    text_of,
    uncounted,
)
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.errors import UserError

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is twelve times seven? <|im_end|> ünïcode 漢字"},
    {"role": "assistant", "content": "Eighty-four."},
    {"role": "user", "content": "Sure?\n\n  yes"},
]
TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(found=0) %}\n"
    "{% for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('role') }}{% endif %}\n"
    "    {%- set ns.found = ns.found + 1 %}\n"
    "    {%- if message.role == 'system' %}{% continue %}{% endif %}\n"
    "[{{ message.role }}] {% generation %}{{ message.content | trim }}{% endgeneration %} {{ ns.found }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f<x>", "parameters": {}}}]])
def test_a_template_renders_as_in_transformers(tools: Any) -> None:
    other: Any = importlib.import_module("transformers.utils.chat_template_utils")
    theirs, _ = other.render_jinja_template(
        conversations=[CHAT], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(TEMPLATE, {"bos_token": "<s>"}, "mine").render(CHAT, tools) == theirs[0]


def test_a_model_folder_brings_its_template(tmp_path: Path) -> None:
    tokenizers: Any = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[?]": 0, "<s>": 1}, unk_token="[?]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>"},
        "chat_template": "{{ bos_token }} {{ messages[0].content }} go",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TokenBudget(9, tmp_path).meter(CHAT[:1]).total(["Be very brief"]) == 1 + 3 + 1
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "a b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = template_of_folder(tmp_path)
    assert template is not None and template.render(CHAT) == "a" and template.render(CHAT, [{"name": "f"}]) == "a b"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    template = template_of_folder(tmp_path)
    assert template is not None and template.render(CHAT) == "from the file"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        template_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for message in messages %}", "does not accept"),
        ("{{ messages[9].content + 1 }}", "does not accept"),
        ("{{ 1 / 0 }}", "does not accept"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not accept"),
        ("{{ messages.append(1) }}", "does not accept"),
        ("{{ namespace.__init__.__globals__ }}", "does not accept"),
        ("{% set ns = namespace(__x=1) %}", "does not accept"),
        ("{{ 'a' * 999999999 }}", "too long"),
        ("{{ 9 ** 999999 }}", "too large"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "without end"),
        ("{% for i in range(999999999) %}{% endfor %}", "does not accept"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "round without end"),
        ("{{ 'a'.center(999999999) }}", "too large"),
        ("{{ lipsum(9999) }}", "undefined"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "does not accept"),
    ],
)
def test_a_template_is_not_trusted(source: str, words: str) -> None:
    with pytest.raises(TemplateRefused, match=words):
        ChatTemplate(source, {}, "hostile").render(CHAT)


def test_the_date_a_template_asks_for_is_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "dated")
    assert template.render(CHAT) == template.render(CHAT) == "26 Dec 2026"


def test_chatml_where_no_template_is_known() -> None:
    assert chatml(CHAT[:1]) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"
    assert TokenBudget(9, "bytes").meter(CHAT[:1]).total(["Be brief."]) == len(chatml(CHAT[:1]))


def test_content_that_is_no_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, "odd", {"type": "text", "text": "b"}]
    assert text_of(parts) == "a\nb" and text_of(None) == ""
    assert uncounted([{"role": "user", "content": parts}, {"role": "user", "content": "x"}]) == 2


def test_special_tokens_of_the_template_are_single_tokens() -> None:
    chat = [{"role": "user", "content": "hi"}]
    plain = resolve_tokenizer("embedded")
    meter = TokenBudget(9, "embedded").meter(chat)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert meter.total(["hi"]) - 40 < plain.count(rendered)
    assert meter.total(["hi there"]) == meter.total(["hi"]) + 1


def test_a_content_list_is_text_to_a_template_that_reads_no_lists() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text", "text": "two"}]
    chat: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    plain = ChatTemplate("{% for m in messages %}{{ m['role'] + m['content'] }};{% endfor %}", {}, "plain")
    assert plain.render(chat) == "userone\ntwo;assistant;"
    aware = ChatTemplate(
        "{% for m in messages if m.content %}{% for c in m['content'] %}{{ c.text or '*' }}{% endfor %}{% endfor %}",
        {},
        "aware",
    )
    assert aware.render(chat) == "one*two"


def test_a_template_that_demands_turns_gets_them_at_every_budget(tmp_path: Path) -> None:
    tokenizers: Any = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[?]": 0}, unk_token="[?]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% if turns != messages %}{{ messages[0].content }} {% endif %}"
        "{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
        "{{ m.role }} {{ m.content }} {% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    chat = [
        {"role": "system", "content": "You are helpful. Be kind to people who ask."},
        {"role": "user", "content": "Tell me about the weather in Paris. What do people wear there?"},
        {"role": "assistant", "content": "It is mild there. People wear coats and scarves in winter."},
        {"role": "user", "content": "And in Lyon?"},
        {"role": "assistant", "content": "It is warmer there."},
        {"role": "user", "content": "And in Rome?"},
    ]
    full = TokenBudget(1, tmp_path).meter(chat).total([message["content"] for message in chat])
    fitted = 0
    for limit in range(1, full):
        try:
            capsule = ao.capsule(chat, budget=TokenBudget(limit, tmp_path), mode="extract")
        except ao.BudgetInfeasible as error:
            assert limit < error.minimum
            continue
        fitted += 1
        roles = [message["role"] for message in capsule.messages or ()]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        assert capsule.tokens <= limit
    assert fitted > full / 2
