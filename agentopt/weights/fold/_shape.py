"""What a model's configuration says about its size: linear layers, heads, window. Enough to count operations and bytes.

Only the configuration is read: no weights are needed, so a model can be judged before it is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentopt.errors import UserError

_PLAIN_MLP = frozenset(
    ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "starcoder2", "codegen", "mpt")
)
"""Model types whose feed-forward block has two matrices; the others gate it with a third."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a block."""

    name: str
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        """Weights of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a causal language model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int | None
    """Most tokens that it reads; None when the configuration names no number."""
    linears: tuple[Linear, ...]
    """Of one block; of a mixture, those that one token passes."""
    gate_width: int
    """Numbers per token in the feed-forward block."""
    number_bytes: int | None
    """Bytes of a number as the configuration says."""

    @property
    def kv_numbers(self) -> int:
        """Numbers that one token leaves in the cache: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def block(self) -> int:
        """Weights of the linear layers of one block."""
        return sum(one.size for one in self.linears)

    def adapted(self, targets: str | Sequence[str]) -> tuple[Linear, ...]:
        """The linear layers of a block that an adapter stands beside.

        Raises:
            UserError: a target names none of them.
        """
        if targets == "all-linear":
            return self.linears
        wanted = [targets] if isinstance(targets, str) else list(targets)
        last = [one.rpartition(".")[2] for one in wanted]
        unknown = [target for target, end in zip(wanted, last, strict=True) if end not in self._names()]
        if unknown or not wanted:
            found = unknown[0] if unknown else ""
            raise UserError(f"targets: found {found!r}, expected 'all-linear' or one of {', '.join(self._names())}.")
        return tuple(one for one in self.linears if one.name in last)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(one.name for one in self.linears))


def shape_of(config: Any) -> Shape:
    """Read the sizes from a configuration of transformers.

    Raises:
        UserError: it lacks one of them.
    """
    own = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    hidden = _number(own, "hidden_size", "n_embd", "d_model")
    heads = _number(own, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _known(own, "num_key_value_heads") or heads
    head_dim = _known(own, "head_dim") or hidden // heads
    width = _known(own, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    kind = str(getattr(own, "model_type", ""))
    return Shape(
        layers=_number(own, "num_hidden_layers", "n_layer", "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=_number(own, "vocab_size"),
        window=window_of(config),
        linears=_linears(own, kind, hidden, heads * head_dim, kv_heads * head_dim, width),
        gate_width=width * (2 if kind in _PLAIN_MLP else 3),
        number_bytes=_bytes_of(getattr(own, "dtype", None) or getattr(config, "dtype", None)),
    )


def window_of(config: Any) -> int | None:
    """Most tokens that a model with this configuration reads; None when it names no number."""
    own = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return _known(own, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def number_bytes(dtype: Any) -> int:
    """Bytes of one number of this type: a count of bytes, a name such as "bfloat16", or a torch dtype.

    Raises:
        UserError: it is none of them.
    """
    found = dtype if isinstance(dtype, int) and dtype > 0 else _bytes_of(dtype)
    if found is None:
        raise UserError(f"dtype: found {dtype!r}, expected float32, bfloat16, float16 or float8.")
    return found


def _bytes_of(dtype: Any) -> int | None:
    name = str(dtype).removeprefix("torch.")
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
    return next((size for known, size in sizes.items() if name.startswith(known)), None)


def _linears(own: Any, kind: str, hidden: int, queries: int, keys: int, width: int) -> tuple[Linear, ...]:
    if kind == "gpt2":
        return (
            Linear("c_attn", hidden, 3 * hidden),
            Linear("c_proj", hidden, hidden),
            Linear("c_fc", hidden, width),
            Linear("c_proj", width, hidden),
        )
    attention = (
        Linear("q_proj", hidden, queries),
        Linear("k_proj", hidden, keys),
        Linear("v_proj", hidden, keys),
        Linear("o_proj", queries, hidden),
    )
    if kind in _PLAIN_MLP:
        return (*attention, Linear("fc_in", hidden, width), Linear("fc_out", width, hidden))
    # In a mixture every token passes some of the experts, each of a width of its own.
    experts = _known(own, "num_experts_per_tok", "num_experts_per_token") or 1
    width = _known(own, "moe_intermediate_size") or width
    block = (
        Linear("gate_proj", hidden, width),
        Linear("up_proj", hidden, width),
        Linear("down_proj", width, hidden),
    )
    return (*attention, *block * experts)


def _known(config: Any, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _number(config: Any, *names: str) -> int:
    found = _known(config, *names)
    if found is None:
        raise UserError(
            f"model: its configuration ({type(config).__name__}) has no {names[0]}, expected that of a causal language "
            "model."
        )
    return found
