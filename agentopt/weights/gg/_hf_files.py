"""What stands in the files of a checkpoint, before any of it is put into a model.

transformers takes what it finds: a scale that is missing becomes memory that nobody wrote. So every layer's tensors are
looked up first, and what is wrong is told with its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import BOOK, CODES, SCALE, Checkpoint
from agentopt.weights.load import need


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file: where, its shape, and its number type as safetensors writes it."""

    file: str
    shape: tuple[int, ...]
    kind: str


def survey(files: Iterable[str]) -> dict[str, Stored]:
    """All tensors of safetensors files by name.

    Raises:
        UserError: a file is missing, cut off or not a safetensors file.
    """
    safetensors = need("safetensors")
    found: dict[str, Stored] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise UserError(f"{file}: expected a safetensors file; codes are stored in no other.")
        try:
            with safetensors.safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  # not a mapping
                    part = handle.get_slice(name)
                    found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file, though the checkpoint's index names it; fetch it again.") from None
        except (OSError, safetensors.SafetensorError) as error:
            size = Path(file).stat().st_size
            raise UserError(f"{file}: damaged or cut off ({size:,} bytes; {error}); fetch it again.") from error
    return found


def check_codes(stored: Mapping[str, Stored], checkpoint: Checkpoint) -> None:
    """Every layer of codes has its scales (and books) beside it, in the shapes that belong together.

    Raises:
        UserError: one has not.
    """
    several = len(checkpoint.books) > 1
    for name, codes in stored.items():
        layer, _, last = name.rpartition(".")
        if last in (SCALE, BOOK) and f"{layer}.{CODES}" not in stored:
            raise UserError(f"{codes.file}: found {name} without {layer}.{CODES}; the checkpoint is incomplete.")
        if last != CODES:
            continue
        if len(codes.shape) != 2 or codes.kind != "U8":
            raise UserError(f"{codes.file}: {name} is {codes.kind} {codes.shape}, expected U8 (out, in).")
        rows = (codes.shape[0], 1)
        _check(stored, f"{layer}.{SCALE}", "F32", rows, codes.file)
        if several:
            _check(stored, f"{layer}.{BOOK}", "U8", rows, codes.file)
        elif f"{layer}.{BOOK}" in stored:
            raise UserError(f"{codes.file}: found {layer}.{BOOK}, but config.json has no several codebooks.")


def _check(stored: Mapping[str, Stored], name: str, kind: str, shape: tuple[int, int], file: str) -> None:
    found = stored.get(name)
    if found is None:
        raise UserError(f"{file}: {name} is missing; the checkpoint is incomplete: fetch it again.")
    if (found.kind, found.shape) != (kind, shape):
        raise UserError(f"{found.file}: {name} is {found.kind} {found.shape}, expected {kind} {shape}.")
