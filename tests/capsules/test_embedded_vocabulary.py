"""The packaged model's vocabulary and template count as transformers has them, which takes seconds to convert them."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest

from agentopt.capsules import TokenBudget
from agentopt.capsules.counting._tokenizers import resolve_tokenizer
from agentopt.models._embedded_files import packaged_file
from tests.capsules.test_templates import CHAT
from tests.capsules.test_tokenizers import TEXTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other() -> Any:
    transformers: Any = importlib.import_module("transformers")
    path = packaged_file()
    assert path is not None
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def test_the_template_counts_as_transformers_applies_it(other: Any) -> None:
    for chat in (CHAT, CHAT[1:], CHAT[1:2]):
        ids = other.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        meter = TokenBudget(9, "embedded").meter(chat)
        assert meter.total([message["content"] for message in chat]) == len(ids)


def test_counts_are_those_of_the_other_conversion(other: Any) -> None:
    """transformers rebuilds the same vocabulary; it leaves out that digits stand apart, so only other texts compare."""
    theirs = other.backend_tokenizer
    theirs.encode_special_tokens = True
    ours = resolve_tokenizer("embedded")
    rng = random.Random(2)
    pool = "".join(character for character in "".join(TEXTS) if not character.isnumeric())
    texts = [*TEXTS[2:], *("".join(rng.choice(pool) for _ in range(rng.randint(1, 60))) for _ in range(500))]
    compared = [text for text in texts if not any(character.isnumeric() for character in text)]
    assert len(compared) > 500
    try:
        assert ours.count_many(compared) == [len(theirs.encode(text, add_special_tokens=False)) for text in compared]
    finally:
        theirs.encode_special_tokens = False
    assert ours.count("7 x 1234") == 7  # 7 | _ x | _ | 1 | 2 | 3 | 4
