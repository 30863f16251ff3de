"""What `agentopt quantize` was asked: `[quantize]` of agentopt.toml below the command line, and which job that is.

MODEL and the options say what happens: a folder in a serving format, the result of one that is there, an archive, what
is in an archive, or a check of one. An option that would do nothing in that job is an error.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentopt.cli._settings import table_of
from agentopt.errors import UserError
from agentopt.weights.gg import EXPORTS, FORMATS, QuantizeOptions
from agentopt.weights.gg._types import Export, Format

ARCHIVE = ".ggz"
RESULT = "quantize.json"
"""What a quantized folder holds beside the weights: the result, which can be shown again."""
DEFAULT = "rf8-gg"
Job = Literal["quantize", "show", "pack", "unpack", "verify"]

_TEXT, _WHOLE, _SWITCH, _NUMBER = "text", "a whole number", "true or false", "a number"
_KINDS = {
    "model": _TEXT,
    "out": _TEXT,
    "format": _TEXT,
    "calibrate": _TEXT,
    "calibrate_tokens": _WHOLE,
    "report": _TEXT,
    "skip": "a list of names",
    "head": _SWITCH,
    "scale": _TEXT,
    "refine": _SWITCH,
    "dynamic_activations": _SWITCH,
    "shard_size": "a size such as 1GB",
    "seed": _WHOLE,
    "archive": _SWITCH,
    "step": "a number, or a power such as 2^-10",
    "sqnr": _NUMBER,
    "lossless": _SWITCH,
    "dtype": _TEXT,
    "verify": _SWITCH,
}
_OF: dict[Job, tuple[str, ...]] = {
    "quantize": (
        "format", "calibrate", "calibrate_tokens", "report", "skip", "head", "scale", "refine", "dynamic_activations",
        "shard_size", "seed",
    ),
    "show": ("report",),
    "pack": ("step", "sqnr", "lossless"),
    "unpack": ("dtype", "shard_size"),
    "verify": (),
}  # fmt: skip
_WHY: dict[Job, str] = {
    "quantize": "without --archive",
    "show": "without --out, when a quantized folder is shown",
    "pack": "when an archive is packed",
    "unpack": "when an archive is unpacked",
    "verify": "with --verify",
}
_SAME = ("head", "scale", "refine", "calibrate", "calibrate_tokens", "dynamic_activations", "seed")
"""Options that the library knows by the same name."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWER = re.compile(r"2(?:\^|\*\*)(-?\d+)")
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """One command, checked as far as it can be without opening the model.

    Attributes:
        job: what is done.
        model: what it is done to.
        out: the folder or the archive that is written; empty for `show` and `verify`.
        format: of the new weights (`quantize`).
        report: the HTML file, or None.
        options: of `quantize`.
        step, sqnr, lossless: how an archive is packed; at most one of them.
        dtype: what an archive is unpacked to; None as it was.
    """

    job: Job
    model: str
    out: str
    format: Format | Export
    report: str | None
    options: QuantizeOptions
    step: float | None = None
    sqnr: float | None = None
    lossless: bool = False
    dtype: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], place: str) -> QuantizeSettings:
        """Check names, types and what belongs together; `place` names where the values stand.

        Raises:
            UserError: unknown, missing, of another type or out of range, or an option that would do nothing.
        """
        for name, value in given.items():
            _check_kind(name, value, place)
        if not given.get("model"):
            raise UserError(
                "MODEL is missing: give embedded, a model folder, a .gguf file, a hub id or a .ggz archive."
            )
        model = str(given["model"])
        job = _job(given, model)
        _refuse_idle(given, job)
        if job not in ("show", "verify") and not given.get("out"):
            what = "archive that is written, e.g. --out model.ggz" if job == "pack" else "new folder, e.g. --out DIR"
            raise UserError(f"--out is missing: give the {what}.")
        out = str(given.get("out") or "")
        _check_out(out, job)
        options = _options(given) if job in ("quantize", "unpack") else QuantizeOptions()
        return cls(
            job,
            model,
            out,
            _format(str(given.get("format") or DEFAULT)),
            _report(given.get("report")),
            options,
            step=_step(given.get("step")),
            sqnr=_above_zero("sqnr", given.get("sqnr"), "decibels above 0, e.g. --sqnr 40"),
            lossless=bool(given.get("lossless")),
            dtype=_dtype(given.get("dtype")),
        )


def settings_of(values: Mapping[str, Any], config: str | None) -> QuantizeSettings:
    """The settings of a command above those of the configuration file.

    Raises:
        UserError: see `QuantizeSettings.of`; or the file is missing or not TOML.
    """
    given = {name: value for name, value in values.items() if value is not None}
    table = table_of(config, "quantize", paths=("out", "calibrate", "report"))
    return QuantizeSettings.of({**table, **given}, "[quantize]" if table else "command line")


def _check_kind(name: str, value: Any, place: str) -> None:
    if name not in _KINDS:
        close = difflib.get_close_matches(name, list(_KINDS), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see agentopt quantize --help."
        raise UserError(f"{place}: unknown option {name!r}; {hint}")
    kind = _KINDS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        _TEXT: isinstance(value, str),
        _WHOLE: number and isinstance(value, int),
        _NUMBER: number,
        _SWITCH: isinstance(value, bool),
        "a list of names": isinstance(value, list) and all(isinstance(one, str) for one in value),  # pyright: ignore[reportUnknownVariableType]
    }.get(kind, isinstance(value, str) or number)
    if not fits:
        raise UserError(f"{place}: {name} is {json.dumps(value, default=str)}, expected {kind}.")


def _job(given: Mapping[str, Any], model: str) -> Job:
    packed = model.endswith(ARCHIVE)
    if given.get("verify"):
        if not packed:
            raise UserError(f"--verify: found {model!r}, expected a {ARCHIVE} archive, whose checksums it reads.")
        return "verify"
    if given.get("archive"):
        return "unpack" if packed else "pack"
    return "show" if not given.get("out") and (Path(model) / RESULT).is_file() else "quantize"


def _refuse_idle(given: Mapping[str, Any], job: Job) -> None:
    """An option that would do nothing is an error: what was asked for would silently not happen."""
    everywhere = ("model", "archive", "verify", *(("out",) if job not in ("show", "verify") else ()))
    for name, value in given.items():
        if name in everywhere or name in _OF[job] or value is False:
            continue
        option = "--no-refine" if name == "refine" else f"--{name.replace('_', '-')}"
        hint = "add --archive" if job == "quantize" and name in _OF["pack"] else "leave it out"
        raise UserError(f"{option} does nothing {_WHY[job]}; {hint}.")
    asked = [f"--{name}" for name in _OF["pack"] if given.get(name) not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: each says how fine the archive is; give one of them.")
    format = given.get("format") or DEFAULT
    if given.get("refine") is False and format != DEFAULT:
        raise UserError(f"--no-refine does nothing with --format {format}, which has no books; leave it out.")
    if given.get("dynamic_activations") and format not in EXPORTS:
        raise UserError(
            f"--dynamic-activations is for fp8 and int8; with --format {format} activations stay as they are."
        )
    if given.get("scale") == "tensor_pow2" and format not in ("rf8", "rf8-strict"):
        raise UserError(f"--scale tensor_pow2 is for rf8 and rf8-strict; --format {format} has a scale per row.")
    if given.get("calibrate_tokens") is not None and not given.get("calibrate"):
        raise UserError("--calibrate-tokens does nothing without --calibrate; give a text file.")


def _check_out(out: str, job: Job) -> None:
    path = Path(out)
    if job == "pack":
        if path.suffix != ARCHIVE:
            raise UserError(f"--out: found {out!r}, expected the name of an archive that ends in {ARCHIVE}.")
        if path.is_dir():
            raise UserError(f"--out: found the folder {out!r}, expected the name of a file.")
        if path.exists():  # it may be the only copy of other weights
            raise UserError(f"--out: found the archive {out!r}, expected a new name; or delete the old one.")
    elif path.suffix == ARCHIVE:
        hint = "add --archive to pack MODEL into one" if job == "quantize" else "MODEL is unpacked into a folder"
        raise UserError(f"--out: found {out!r}, the name of an archive, expected that of a folder; {hint}.")
    elif job == "quantize" and (path / RESULT).is_file():
        raise UserError(
            f"--out {out!r}: found a folder that is done; agentopt quantize {shlex.quote(out)} shows what was made, "
            "and another --out makes a new one."
        )
    elif out and path.is_file():
        raise UserError(f"--out: found the file {out!r}, expected a folder to write into.")


def _format(format: str) -> Format | Export:
    known: list[Format | Export] = [*FORMATS, *EXPORTS]
    for one in known:
        if one == format:
            return one
    close = difflib.get_close_matches(format, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "docs/quantize.md says which one is for what."
    raise UserError(f"--format: found {format!r}, expected {', '.join(known)}; {hint}")


def _dtype(name: str | None) -> str | None:
    if name is None or name in _DTYPES:
        return name
    raise UserError(f"--dtype: found {name!r}, expected one of {', '.join(_DTYPES)}.")


def _report(path: Any) -> str | None:
    if path is None:
        return None
    if Path(path).is_dir():
        raise UserError(f"--report: found the folder {path!r}, expected the name of an HTML file.")
    return str(path)


def _options(given: Mapping[str, Any]) -> QuantizeOptions:
    calibrate = given.get("calibrate")
    if calibrate is not None and not Path(calibrate).is_file():
        found = "a folder" if Path(calibrate).is_dir() else "no such file"
        raise UserError(f"--calibrate {calibrate!r}: {found}; give a .txt file, or .jsonl with the column text.")
    fields: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    if "skip" in given:
        fields["skip"] = tuple(part.strip() for one in given["skip"] for part in one.split(",") if part.strip())
    if "shard_size" in given:
        fields["shard_bytes"] = bytes_of(given["shard_size"])
    try:
        return QuantizeOptions(**fields)
    except UserError as error:  # the library's names as they are on the command line
        name, colon, rest = str(error).partition(":")
        option = {"shard_bytes": "shard-size"}.get(name, name.replace("_", "-"))
        raise UserError(f"--{option}{colon}{rest}") from None


def bytes_of(size: str | float) -> int:
    """`1GB`, `500 MB`, `2GiB` or a number of bytes.

    Raises:
        UserError: it is none of these.
    """
    found = _SIZE.fullmatch(str(size).strip())
    if found is None:
        raise UserError(f"--shard-size: found {size!r}, expected a size such as 1GB, 500MB or 2GiB.")
    number, unit, binary = found.groups()
    return round(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def _step(step: Any) -> float | None:
    if step is None:
        return None
    power = _POWER.fullmatch(str(step).replace(" ", ""))
    if power is not None:
        return 2.0 ** max(-1022, min(1023, int(power[1])))
    try:
        return _above_zero("step", float(step), "the distance of two levels, e.g. --step 2^-10")
    except ValueError:
        raise UserError(f"--step: found {step!r}, expected a number above 0 or a power such as 2^-10.") from None


def _above_zero(name: str, value: Any, expected: str) -> float | None:
    if value is None:
        return None
    if not 0 < float(value) < float("inf"):
        raise UserError(f"--{name}: found {value:g}, expected {expected}.")
    return float(value)
