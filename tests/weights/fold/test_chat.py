"""Chat turns become the same tokens here and in a server, whatever the tokenizer and the folder's format."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from agentopt.weights.fold import FoldFormat
from agentopt.weights.fold._chat import chat_template, read_chat
from agentopt.weights.fold._codec import Codec

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be short.\n\nAda {owns} a lamp.\r\n"},
    {"role": "user", "content": "What does Bo own?"},
    {"role": "assistant", "content": 'A "rope" 🪢 \\n'},
    {"role": "user", "content": " Who owns a lamp?\nSay it."},
]


def tokenizer(kind: str) -> Any:
    """Bytes with begin of text in front, or words with their spaces as some models of SentencePiece have them."""
    alphabet = (
        sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else ["▁", "\n", *map(chr, range(32, 127))]
    )
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@pytest.mark.parametrize(
    "format",
    [
        FoldFormat(),
        FoldFormat(fact="- {fact} ({fact}) 🪢", question='{{ "Q" }} {question}\t{% A: %}'),
        FoldFormat(fact="{fact}", question="{question}"),
    ],
)
def test_a_template_makes_the_prompt_of_the_folder(kind: str, format: FoldFormat) -> None:
    codec = Codec(tokenizer(kind), format)
    lines, question = read_chat(TURNS)
    assert lines == ["Be short.", "Ada {owns} a lamp.", "What does Bo own?", 'A "rope" 🪢 \\n']
    served = codec.tokenizer.apply_chat_template(TURNS, chat_template=chat_template(codec), return_dict=False)
    assert served == [*codec.lead, *codec.question(question, lines)]
    assert bool(codec.lead) == (kind == "bytes")
    alone = codec.tokenizer.apply_chat_template(TURNS[-1:], chat_template=chat_template(codec), return_dict=False)
    assert alone == [*codec.lead, *codec.question(question)]


def test_lines_that_are_read_as_facts_are_the_same_tokens_where_a_line_begins_without_a_space_of_its_own() -> None:
    codec = Codec(tokenizer("bytes"), FoldFormat())
    lines, question = read_chat(TURNS)
    assert [*codec.context(lines), *codec.question(question)] == [*codec.lead, *codec.question(question, lines)]
