"""The module that puts a trained prefix into the key-value cache. Only functions that need torch import this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agentopt.errors import UserError
from agentopt.weights import _peft_files

KEY = "prompt_embeddings"


class Prefix(nn.Module):
    """A frozen model with virtual tokens before every row; made by `prefix.attach` and `prefix.load`.

    Call it as the model is called. What it lacks, it takes from the model (`config`, `get_output_embeddings`...).

    Attributes:
        model: the frozen model.
        prefix: the one parameter, (tokens, layers * 2 * heads * head size): per token and layer the keys, then the
            values, as peft orders them.
    """

    def __init__(self, model: Any, start: Tensor, heads: int) -> None:
        super().__init__()
        self.heads, self.tokens = heads, int(start.shape[0])
        self._thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        self.model = model
        self.prefix = nn.Parameter(start.clone())
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's output after the prefix; takes what the model takes."""
        return self.functional(self.prefix, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def functional(self, prefix: Tensor, **kwargs: Any) -> Any:
        """The same with another prefix, (tokens, ...) or (n, tokens, ...): n equal chunks of rows, in order."""
        return self.model(**self._prepared(prefix, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with the prefix in its cache."""

        def before(
            _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if kwargs.get("use_cache") is False:
                # Every step reads the whole text again, and is handed what the step before left in the cache.
                kwargs.pop("past_key_values", None)
            return args, self._prepared(self.prefix, kwargs)

        hook = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            hook.remove()

    def _prepared(self, prefix: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model: a cache that begins with the prefix, mask and positions that count it."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        given: Any = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if given is None:
            raise UserError("prefix: found neither input_ids nor inputs_embeds; give them by name.")
        rows = int(given.shape[0])
        cache: Any = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            kwargs["past_key_values"] = self._fill(cache, prefix, rows)
        mask: Any = kwargs.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise UserError(f"prefix: attention_mask has {mask.dim()} axes, expected (rows, tokens).")
            kwargs["attention_mask"] = torch.cat([mask.new_ones(rows, self.tokens), mask], dim=1)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + self.tokens
        return kwargs

    def _fill(self, cache: Any, prefix: Tensor, rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config) if cache is None else cache
        several = prefix if prefix.dim() == 3 else prefix.unsqueeze(0)
        if rows % several.shape[0]:
            count = several.shape[0]
            raise UserError(
                f"prefix: found a batch of {rows} rows for {count} prefixes, expected a multiple of {count}."
            )
        whole = several.repeat_interleave(rows // several.shape[0], dim=0)
        whole = whole.to(self.model.get_input_embeddings().weight.dtype)
        # (rows, tokens, layers * 2, heads, size) -> layers * 2 times (rows, heads, tokens, size)
        parts = whole.view(rows, self.tokens, -1, self.heads, self._size()).permute(2, 0, 3, 1, 4)
        for layer in range(parts.shape[0] // 2):
            cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
        return cache

    def _size(self) -> int:
        return int(self.prefix.shape[1]) // (2 * self.layers * self.heads)

    @property
    def layers(self) -> int:
        """Layers of the model that hold keys and values."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    def save(self, folder: str | Path) -> Path:
        """Write the prefix in the prefix-tuning format of peft."""
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": _peft_files.base_name(self.model),
            "inference_mode": True,
            "num_virtual_tokens": self.tokens,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "token_dim": self.heads * self._size(),
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }
        return _peft_files.write(folder, {KEY: self.prefix.clone()}, config)

    def load(self, folder: str | Path) -> None:
        """Take the numbers of a stored prefix of as many tokens.

        Raises:
            UserError: it has another shape.
        """
        tensors, _ = _peft_files.read(folder, "PREFIX_TUNING")
        found = tuple(tensors[KEY].shape) if KEY in tensors else "no tensor of this name"
        if found != tuple(self.prefix.shape):
            raise UserError(f"prefix {str(folder)!r}: {KEY} is {found}, expected {tuple(self.prefix.shape)}.")
        with torch.no_grad():
            self.prefix.copy_(tensors[KEY])

    def detach_model(self) -> Any:
        """The model without the prefix, as trainable as it was."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        return self.model
