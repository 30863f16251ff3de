"""LLMLingua 0.2.2 on jobs of given lengths, with small models of random weights: lengths only, never quality.

Runs in the peers' environment. Jobs are read from standard input as JSON, [{"text", "size", "target"}]; the answer is
one line, RESULT and the cells. Both of its paths are run: the causal one (perplexity by a causal LM) and LLMLingua-2
(a token classifier). Each is counted with the tokenizer that the path itself counts targets with. Its start fetches a
tiktoken vocabulary, so tiktoken is given the folder that litellm ships, the first argument.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def main() -> None:
    shipped = Path(sys.argv[1])
    os.environ["TIKTOKEN_CACHE_DIR"] = str(shipped)
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    import tiktoken
    import torch
    from llmlingua import PromptCompressor
    from transformers import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    jobs: list[dict[str, Any]] = json.load(sys.stdin)
    cl100k = tiktoken.get_encoding("cl100k_base")
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        causal = causal_model(Path(folder) / "tiny-causal", shipped / "anthropic_tokenizer.json")
        classifier = classifier_model(Path(folder) / "bert-base-multilingual-cased", [job["text"] for job in jobs])
        one = PromptCompressor(causal, device_map="cpu")
        two = PromptCompressor(classifier, device_map="cpu", use_llmlingua2=True)
        own = one.tokenizer
        paths: list[tuple[str, Any, dict[str, Any], Any]] = [
            ("LLMLingua", one, {}, lambda text: len(own(text)["input_ids"])),
            ("LLMLingua-2", two, {}, lambda text: len(cl100k.encode(text))),
            ("LLMLingua-2, digits kept", two, digits(), lambda text: len(cl100k.encode(text))),
        ]
        for name, compressor, extra, count in paths:
            for job in jobs:
                cells.append(
                    {"path": name, "size": job["size"], "target": job["target"], **ask(compressor, job, extra, count)}
                )
            print(f"{name}: {len(jobs)} jobs", file=sys.stderr, flush=True)
    print("RESULT " + json.dumps(cells), flush=True)


def digits() -> dict[str, Any]:
    return {"force_reserve_digit": True, "force_tokens": ["\n", ".", "?", "!", ","], "drop_consecutive": True}


def ask(compressor: Any, job: dict[str, Any], extra: dict[str, Any], count: Any) -> dict[str, Any]:
    """One prompt; a crash is what it is."""
    try:
        found = compressor.compress_prompt([job["text"]], target_token=job["target"], **extra)
    except Exception as error:  # noqa: BLE001 - a crash is a result
        return {"before": count(job["text"]), "got": None, "error": f"{type(error).__name__}: {error!s:.100}"}
    return {"before": count(job["text"]), "got": count(found["compressed_prompt"]), "error": None}


def causal_model(folder: Path, vocabulary: Path) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), eos_token="<EOT>", pad_token="<EOT>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4_096,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def classifier_model(folder: Path, prose: list[str]) -> str:
    """LLMLingua-2 asks for one of two vocabularies by name; a WordPiece one is made from the words of the jobs."""
    from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

    folder.mkdir()
    words = sorted({word for text in prose for word in text.split()})
    letters = sorted({letter for word in words for letter in word})
    plain = [word for word in words if word.isalpha()]
    vocabulary = list(dict.fromkeys([*WORDPIECE, *letters, *("##" + letter for letter in letters), *plain]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        num_labels=2,
        architectures=["BertForTokenClassification"],
    )
    BertForTokenClassification(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
