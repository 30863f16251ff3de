"""What may lie in an adapter's folder: files of its own, none of which a loader could run, of a bounded size."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator
from pathlib import Path

from agentopt.errors import UserError
from agentopt.serving.adapters._config import CONFIG, WEIGHTS

LARGEST = 4 << 30
"""Bytes of an adapter's weights."""
MOST_FILES = 1000
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".model")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")


def check_files(path: Path) -> None:
    """Nothing in the folder but files of its own, none of which a loader could run, and not too large.

    Raises:
        UserError: there is something else.
    """
    where = f"adapter {str(path)!r}"
    if not path.is_dir():
        raise UserError(f"{where}: no such folder; expected one with {CONFIG} and {WEIGHTS}.")
    root = path.resolve()
    for count, (file, about) in enumerate(_walk(path)):
        inner = file.relative_to(path).as_posix()
        if count >= MOST_FILES:
            raise UserError(f"{where}: holds more than {MOST_FILES} files, expected an adapter's few.")
        if stat.S_ISLNK(about.st_mode) and root not in file.resolve().parents:
            raise UserError(f"{where}: {inner} is a link out of the folder; put the file itself there.")
        if not stat.S_ISREG(about.st_mode) and not (stat.S_ISLNK(about.st_mode) and file.is_file()):
            raise UserError(f"{where}: {inner} is no ordinary file; expected {CONFIG} and {WEIGHTS}.")
        ends = "".join(file.suffixes[-1:]).lower()
        if ends in _PICKLED and not (ends == ".model" and file.name == "tokenizer.model"):
            raise UserError(
                f"{where}: {inner} may be a pickle, which can run code when loaded; keep safetensors alone."
            )
        if ends in _CODE:
            raise UserError(f"{where}: {inner} is program code; expected {CONFIG} and {WEIGHTS}.")
        if _begins_as_pickle(file):
            raise UserError(f"{where}: {inner} is a pickle, which can run code when loaded; keep safetensors alone.")
    if not (path / WEIGHTS).is_file():
        whole = "a whole model: serve it as one" if (path / "config.json").is_file() else f"expected peft's {CONFIG}"
        raise UserError(f"{where}: found no {WEIGHTS} ({whole}).")
    size = (path / WEIGHTS).stat().st_size
    if size > LARGEST:
        raise UserError(f"{where}: {WEIGHTS} has {size:,} bytes, expected at most {LARGEST:,}.")


def _walk(path: Path) -> Generator[tuple[Path, os.stat_result]]:
    for folder, names, files in os.walk(path, followlinks=False):
        for name in sorted([*files, *(one for one in names if (Path(folder) / one).is_symlink())]):
            file = Path(folder) / name
            yield file, file.lstat()


def _begins_as_pickle(file: Path) -> bool:
    """A pickle of protocol 2 or later, or torch's archive of one, whatever it is called."""
    try:
        with file.open("rb") as opened:
            lead = opened.read(2)
    except OSError:
        return False
    return lead == b"PK" or (
        lead[:1] == b"\x80" and lead[1:] in (b"\x02", b"\x03", b"\x04", b"\x05") and _is_short(file)
    )


def _is_short(file: Path) -> bool:
    """A safetensors file may begin with the same two bytes, when its header is just so long."""
    try:
        with file.open("rb") as opened:
            lead = opened.read(9)
    except OSError:
        return False
    return not (len(lead) == 9 and lead[8:] == b"{" and lead[4:8] == b"\0\0\0\0")


def read_small(path: Path, file: str, most: int) -> bytes:
    """One file of a folder that is expected to be small.

    Raises:
        UserError: it is not there, cannot be read or is too long.
    """
    try:
        with (path / file).open("rb") as opened:
            text = opened.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"adapter {str(path)!r}: found no {file}; expected a folder as peft writes it.") from None
    except OSError as error:
        raise UserError(f"adapter {str(path)!r}: {file} cannot be read ({error.strerror or error}).") from None
    if len(text) > most:
        raise UserError(f"adapter {str(path)!r}: {file} has more than {most:,} bytes, expected a small JSON file.")
    return text


def digest_of(config: bytes, weights: Path) -> str:
    """sha256 of a configuration and the weights that belong to it."""
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    with weights.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
