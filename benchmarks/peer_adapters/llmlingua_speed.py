"""LLMLingua-2 of mBERT's size with random weights: how fast and how large, never how good.

Runs in the peers' environment. Standard input: {"texts": [...]}; answer: one line, RESULT and the figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path


def main() -> None:
    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None and litellm.submodule_search_locations
    shipped = Path(litellm.submodule_search_locations[0]) / "litellm_core_utils" / "tokenizers"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(shipped)
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    import torch
    from llmlingua import PromptCompressor
    from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast, logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts: list[str] = json.load(sys.stdin)["texts"]
    words = sorted({word for text in texts for word in text.replace(".", " ").split()})
    letters = sorted({letter for word in words for letter in word} | {"."})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with tempfile.TemporaryDirectory() as root:
        # LLMLingua-2 takes one of two vocabularies by the model's name.
        folder = Path(root) / "bert-base-multilingual-cased"
        folder.mkdir()
        vocabulary = list(dict.fromkeys([*special, *letters, *("##" + letter for letter in letters), *words]))
        (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
        config = BertConfig(
            vocab_size=119_547,
            hidden_size=768,
            intermediate_size=3_072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
            num_labels=2,
            architectures=["BertForTokenClassification"],
        )
        BertForTokenClassification(config).save_pretrained(folder)
        compressor = PromptCompressor(
            str(folder), device_map="cpu", use_llmlingua2=True, model_config={"dtype": torch.float32}
        )
    parameters = sum(parameter.numel() for parameter in compressor.model.parameters())
    compressor.compress_prompt([texts[0][:1_000]], rate=0.33)
    rates: list[float] = []
    for text in texts:
        began = time.process_time()
        compressor.compress_prompt([text], rate=0.33)
        rates.append(len(text.encode()) / 1e6 / (time.process_time() - began))
    figures = {
        "rate": max(rates),
        "rates": rates,
        "characters": max(map(len, texts)),
        "parameters": parameters,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print("RESULT " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
