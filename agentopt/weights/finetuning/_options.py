"""What a fine-tuning run is asked to do: one frozen record, checked field by field, kept in the run's folder.

Two records are the same run exactly when their fields are equal; a resume compares them and names the first that
differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentopt.errors import UserError
from agentopt.evaluation._loading import absolute_reference

FIRST_ORDER = {
    "lora": "AdamW on a LoRA adapter, with gradients",
    "adamw": "AdamW on the weights, with gradients",
}
"""Methods that go backward through the model: the baselines beside the zeroth-order ones."""

FIRST_ORDER_RATES = {"full": 1e-5, "lora": 2e-4, "prefix": 1e-2}

Tune = Literal["full", "lora", "prefix"]


class FinetuneOptions(BaseModel):
    """A fine-tuning run. Fields that are None take what the method recommends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """`embedded`, a folder, a .gguf file or a hub id."""
    data: str
    """JSONL rows; split 50/25/25 by content when `val` and `test` are not given."""
    val: str | None = None
    test: str | None = None
    prompt: str | None = None
    """Template with a {field} of the rows for everything that comes before the answer."""
    labels: dict[str, str] | None = None
    """Label of the rows to the word the model is to say."""
    kind: Literal["auto", "classification", "choice", "generation"] = "auto"
    chat: bool = False
    """Put the prompt into the model's chat template, as a user's turn."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest row in tokens; a longer prompt loses its beginning."""

    method: str = "mezo"
    tune: Tune | None = None
    """Which weights: all of them, a LoRA adapter, or a prefix of virtual tokens."""
    steps: int = Field(default=500, ge=1)
    lr: float | Literal["auto"] | None = None
    eps: float | None = Field(default=None, gt=0)
    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the weights that a mask trains."""
    mask_update: Literal["fixed", "dynamic", "stored"] | None = None
    """How a mask by magnitude is kept; "stored" takes one bit per weight."""
    population: int | None = Field(default=None, ge=1)
    batch: int = Field(default=16, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    """Rows in one forward pass; None for the whole batch."""
    objective: str = "loss"
    """`loss`, `accuracy`, the name of a metric, or `module:function` (output, expected, example) -> score."""
    new_tokens: int = Field(default=16, ge=1)
    """Tokens that a generated answer may have."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)

    eval_every: int = Field(default=100, ge=1)
    patience: int = Field(default=3, ge=0)
    """Validations without a new best after which the run stops; 0 for never."""
    rank: int = Field(default=8, ge=1)
    prefix_tokens: int = Field(default=5, ge=1)
    quantize_base: Literal["int8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    workers: int = Field(default=1, ge=1, le=64)
    merge: bool = False
    """Write the model with the adapter added into its weights beside the adapter."""

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ValueError("a finite number that is not negative, or auto")
        return value

    @property
    def first_order(self) -> bool:
        """Whether the method needs gradients."""
        return self.method in FIRST_ORDER

    @property
    def weights(self) -> Tune:
        """Which weights are trained."""
        return self.tune or ("lora" if self.method == "lora" else "full")


def make_options(values: dict[str, Any], where: str = "finetune") -> FinetuneOptions:
    """Options from plain values; None values are absent.

    Raises:
        UserError: the first field that does not fit, or two that do not fit together.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        options = FinetuneOptions.model_validate(given)
    except ValidationError as error:
        raise UserError(_one_sentence(error, where)) from None
    check_together(options)
    return options


def _one_sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        known = ", ".join(FinetuneOptions.model_fields)
        return f"{where}: unknown option {field!r}; known are {known}."
    if first["type"] == "missing":
        return f"{where}: {field} is missing."
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if field == "lr":
        expected = "a number that is not negative, or auto"
    return f"{where}: {field.replace('_', '-')} is {first['input']!r}, expected {expected[0].lower()}{expected[1:]}."


def check_together(options: FinetuneOptions) -> None:
    """Refuse options that contradict each other or would do nothing.

    Raises:
        UserError: the first such pair.
    """
    tune = options.weights
    rules = [
        (
            options.quantize_base is not None and tune == "full",
            "quantize-base int8 freezes the base, so all of its weights cannot be tuned; give --tune lora or prefix.",
        ),
        (
            options.method == "lora" and tune != "lora",
            f"--method lora trains a LoRA adapter, found --tune {tune}; use --method adamw --tune {tune}.",
        ),
        (options.merge and tune != "lora", f"--merge adds a LoRA adapter into the weights; found --tune {tune}."),
        (
            options.merge and options.quantize_base is not None,
            "--merge needs the weights themselves, --quantize-base int8 rounds them; leave one of the two out.",
        ),
        ((options.val is None) != (options.test is None), "--val and --test belong together: give both or neither."),
        (
            options.micro_batch is not None and options.micro_batch > options.batch,
            f"micro-batch is {options.micro_batch}, expected at most the batch of {options.batch}.",
        ),
        (
            options.warmup >= options.steps and options.warmup > 0,
            f"warmup is {options.warmup}, expected fewer than the {options.steps} steps.",
        ),
        (
            options.batch % options.workers != 0,
            f"batch is {options.batch}, expected a multiple of the {options.workers} workers that share it.",
        ),
    ]
    idle = {"rank": ("lora", options.rank), "prefix_tokens": ("prefix", options.prefix_tokens)}
    rules += [
        (
            tune != where and value != FinetuneOptions.model_fields[name].default,
            f"--{name.replace('_', '-')} is for --tune {where}, found --tune {tune}; leave one of the two out.",
        )
        for name, (where, value) in idle.items()
    ]
    if options.first_order:
        unused = {
            "eps": options.eps,
            "density": options.density,
            "mask-update": options.mask_update,
            "population": options.population,
        }
        rules += [
            (value is not None, f"--{name} belongs to zeroth-order methods; --method {options.method} has gradients.")
            for name, value in unused.items()
        ]
        rules += [
            (options.workers > 1, "--workers shares a zeroth-order step; methods with gradients use one process."),
            (
                options.objective != "loss",
                f"--objective {options.objective} has no gradient; use a zeroth-order --method, or --objective loss.",
            ),
            (options.lr == "auto", "--lr auto measures zeroth-order steps; give a rate, for example --lr 1e-4."),
            (
                options.dtype != "float32" and tune == "full",
                f"AdamW in {options.dtype} loses small updates; give --dtype float32, or --method lora.",
            ),
        ]
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def portable(options: FinetuneOptions) -> dict[str, Any]:
    """The options as kept with the run: paths made absolute, so that it can be resumed from any folder."""
    saved: dict[str, Any] = json.loads(options.model_dump_json())
    for key in ("data", "val", "test"):
        if saved[key] is not None:
            saved[key] = str(Path(saved[key]).resolve())
    if Path(saved["model"]).exists():
        saved["model"] = str(Path(saved["model"]).resolve())
    if ":" in saved["objective"]:
        saved["objective"] = absolute_reference(cast("str", saved["objective"]))
    return saved


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The name of the first field that differs, as the command line writes it."""
    for name in FinetuneOptions.model_fields:
        if name != "device" and before.get(name) != now.get(name):
            return name
    return None
