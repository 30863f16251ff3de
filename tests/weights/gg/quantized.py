"""A folder of codes written by hand, and the same model rebuilt from the weights that the codes stand for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any


def make(kind: str, *, tied: bool = False, bias: bool = False) -> Any:
    """A small random causal model."""
    import torch
    import transformers

    common: Any = {"vocab_size": 29, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
    llama: Any = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    settings: Any = {
        "llama": {**llama, "num_key_value_heads": 2, "attention_bias": bias},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gpt_neox": llama,
        "gemma3_text": {**llama, "num_key_value_heads": 2, "head_dim": 8},
    }[kind]
    config = transformers.AutoConfig.for_model(kind, **common, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(std=0.1)
    return model.eval()


def write(
    folder: Path, model: Any, format: str = "rf8-gg", *, head: bool = False, books: Any = None, scale: str = "channel"
) -> Any:
    """Write the model as a checkpoint of codes; returns it with the decoded weights in the place of its own."""
    import torch
    from safetensors.torch import save_file

    from agentopt.weights.gg import _codec
    from agentopt.weights.gg._books import default_books
    from agentopt.weights.gg._checkpoint import Checkpoint
    from agentopt.weights.gg._guard import guarded

    kind: Any = format
    how: Any = scale
    if format == "rf8-gg" and books is None:
        books = default_books()
    rebuilt = copy.deepcopy(model)
    heads = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    inputs = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    tied = model.config.tie_word_embeddings
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if tied:
        del tensors[f"{heads}.weight"]
    for name, module in rebuilt.named_modules():
        conv = type(module).__name__ == "Conv1D"
        quantized = isinstance(module, torch.nn.Linear) or conv or (tied and head and name == inputs)
        if not quantized or (name == heads and (tied or not head)):
            continue
        weight = module.weight.detach()
        found = _codec.encode(weight.mT if conv else weight, kind, scale=how, books=books)
        decoded = _codec.decode(found).to(weight.dtype)
        module.weight.data.copy_(decoded.mT if conv else decoded)
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = found.codes.contiguous()
        tensors[f"{name}.weight_scale"] = found.scale.expand(found.codes.shape[0], 1).contiguous()
        if found.book_id is not None:
            tensors[f"{name}.book_id"] = found.book_id.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    about = Checkpoint(
        format=kind,
        scale=how,
        books=() if books is None else tuple(tuple(book[:255]) for book in books.tolist()),
        skip=() if head else (heads,),
        head=head,
    )
    config = {**json.loads(model.config.to_json_string()), "quantization_config": about.to_dict()}
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(guarded(config)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return rebuilt


def logits(model: Any) -> Any:
    """What the model says about a fixed text."""
    import torch

    ids = torch.tensor([[3, 7, 1, 12, 5, 20, 2, 9], [4, 4, 28, 0, 15, 16, 11, 6]])
    with torch.no_grad():
        return model(ids).logits
