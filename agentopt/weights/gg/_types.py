"""The nouns of the room: a fit, an encoded weight, what is asked of a quantization and what it tells. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from agentopt.errors import UserError
from agentopt.weights._events import Event

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["rf8", "rf8-strict", "rf8-gg", "e3m4"]
FORMATS: tuple[Format, ...] = ("rf8", "rf8-strict", "rf8-gg", "e3m4")
"""Formats of our own, one byte per weight. `rf8-strict` is decoded like `rf8`; only its rounding differs."""

Export = Literal["fp8", "int8"]
EXPORTS: tuple[Export, ...] = ("fp8", "int8")
"""Stock formats, written for loaders that know compressed-tensors."""

Scale = Literal["channel", "tensor_pow2"]
SCALES: tuple[Scale, ...] = ("channel", "tensor_pow2")


@dataclass(frozen=True, slots=True)
class GGFit:
    """A generalized Gaussian of mean 0, `f(x) = nu / (2 beta Gamma(1/nu)) exp(-(|x| / beta)^nu)`, or one per row.

    Attributes:
        nu: shape: 2 for a Gaussian, 1 for a Laplacian; a float, or a tensor (rows,).
        beta: scale, in the unit of the data.
        sigma: standard deviation, `beta sqrt(Gamma(3/nu) / Gamma(1/nu))`.
    """

    nu: Any
    beta: Any
    sigma: Any


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight of one byte each. `decode(codes) = table[book_id, codes] * scale`, in float32.

    Attributes:
        codes: uint8, the shape of the weight.
        scale: float32, positive and finite; the shape of the weight with every axis but `axis` of length 1
            (all of length 1 for one scale of the whole tensor).
        format: one of `FORMATS`.
        axis: the axis of the rows that have a scale (and a book) each; None for one scale.
        books: float32 (K, 256), sorted levels of unit variance padded with zeros beyond the last; None where the
            format's table is a formula.
        book_id: uint8, the shape of `scale`; None for one book, or none.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    axis: int | None = 0
    books: Tensor | None = None
    book_id: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What `quantize` may be told beside the format.

    Attributes:
        skip: linear layers that stay as they are: names, or dotted parts of names.
        head: quantize the output head too; when it is tied, the embedding that it is.
        scale: "channel", a float32 per row; "tensor_pow2", a power of two per tensor (`rf8` and `rf8-strict` only).
        refine: `rf8-gg`: move the levels of the books towards the model's weights (Lloyd); False keeps the formula's.
        calibrate: a text file (.txt, or .jsonl with the column `text`): the first half of it weighs the input columns
            of every layer by their mean square activation, the rest measures perplexity and KL divergence.
        calibrate_tokens: tokens of that text that are read, for both halves together.
        sequence: tokens of one row of that text.
        dynamic_activations: `fp8` and `int8`: let the loader quantize activations too, per token, as it runs (W8A8
            instead of W8A16): faster on processors with 8-bit arithmetic, and what vLLM on a CPU needs.
        shard_bytes: size above which a new safetensors file is begun.
        seed: of the rows that are sampled for the books.
    """

    skip: tuple[str, ...] = ()
    head: bool = False
    scale: Scale = "channel"
    refine: bool = True
    calibrate: str | None = None
    calibrate_tokens: int = 16_384
    sequence: int = 512
    dynamic_activations: bool = False
    shard_bytes: int = 1 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):  # a tuple of its letters otherwise
            raise UserError(f"skip: found the text {self.skip!r}, expected a tuple of names: ({self.skip!r},).")
        if self.scale not in SCALES:
            raise UserError(f"scale: found {self.scale!r}, expected {' or '.join(SCALES)}.")
        for name, least in (("calibrate_tokens", 4), ("sequence", 2), ("shard_bytes", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}, expected {least} or more.")


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of weights in equal bins from `low` to `high`; what lies outside is in the outermost bins."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one weight.

    Attributes:
        name: the layer.
        shape: (out, in).
        nu, beta, sigma: the fitted generalized Gaussian.
        sqnr_db: signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2); infinite where nothing was lost.
        entropy_bits: of the codes, bits per weight: what an entropy coder could reach.
        stored_bits: bits per weight in the file, scales included.
        seconds: spent on it.
        histogram: of the original weight.
    """

    name: str
    shape: tuple[int, ...]
    nu: float
    beta: float
    sigma: float
    sqnr_db: float
    entropy_bits: float
    stored_bits: float
    seconds: float
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class Quality:
    """The quantized model against the original on the same text.

    Attributes:
        tokens: predicted tokens.
        perplexity_before, perplexity_after: exp of the mean negative log-likelihood per token.
        kl: mean over tokens of KL(original || quantized), nats.
        same_top: share of tokens whose most likely next token is the same.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float
    same_top: float


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What a quantization did.

    Attributes:
        out: the new folder.
        format: of the new weights.
        tensors: one report per quantized weight, in the order of the files.
        kept: names of the tensors that were copied.
        bytes_before: of all tensors, as stored in the source.
        bytes_16: of all tensors at 16 bits each: what the original takes on a GPU.
        bytes_after: of all tensors in the new folder.
        seconds: wall clock.
        quality: None without a calibration text.
        source: the model, as it was given.
        warnings: what was told about the plan.
    """

    out: str
    format: str
    tensors: tuple[TensorReport, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_16: int
    bytes_after: int
    seconds: float
    quality: Quality | None = None
    source: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values (an infinite SQNR becomes null)."""
        found = asdict(self)
        for row in found["tensors"]:
            if row["sqnr_db"] == float("inf"):
                row["sqnr_db"] = None
        return found


@dataclass(frozen=True, slots=True)
class Planned(Event):
    """What is about to be done: `tensors` are quantized, with `weights` numbers in all; `kept` others are copied."""

    kind: ClassVar[str] = "planned"
    tensors: int
    kept: int
    weights: int
    bytes_before: int


@dataclass(frozen=True, slots=True)
class TensorDone(Event):
    """One weight is quantized (or was, by a run before this one)."""

    kind: ClassVar[str] = "tensor"
    report: TensorReport
    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class ShardWritten(Event):
    """A file of the new checkpoint is complete."""

    kind: ClassVar[str] = "shard"
    path: str
    bytes: int
    tensors: int = field(default=0)
