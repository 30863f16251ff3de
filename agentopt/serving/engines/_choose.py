"""Which engine serves a model: vLLM where it is installed, else llama.cpp for GGUF files, else transformers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from agentopt.errors import UserError
from agentopt.models._embedded_files import INSTALL_ENGINE, PACKAGED, engine_installed, resolve
from agentopt.models._hub import expected
from agentopt.serving.engines._interpreters import VLLM_PYTHON, Interpreter, converter, own, vllm_interpreter

ENGINES = ("auto", "vllm", "transformers", "embedded", "fake")
GGUF, FOLDER, ARCHIVE, HUB = "gguf", "folder", "archive", "hub"
NEEDS = {
    GGUF: ("agentopt", "torch", "transformers", "safetensors", "gguf"),
    ARCHIVE: ("agentopt", "torch", "safetensors"),
    HUB: ("agentopt", "transformers"),
    FOLDER: ("agentopt", "torch", "transformers", "safetensors"),
}
"""What it takes to make a folder for vLLM or transformers of each kind (of a folder: to quantize it)."""
_INSTALL_VLLM = (
    "make serve sets it up for a CPU in .venv-serve; else pip install vllm in an environment of its own and set "
    f"{VLLM_PYTHON} to its python"
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """An engine for a model.

    Attributes:
        engine: vllm, transformers, embedded or fake.
        why: one clause for people.
        python: the interpreter that the engine runs in; None for this one.
        cpu: vLLM is a build for CPUs.
    """

    engine: str
    why: str
    python: str | None = None
    cpu: bool = False


def model_kind(model: str) -> str:
    """What a model's name stands for: gguf, folder, archive or hub.

    Raises:
        UserError: nothing.
    """
    if not model.strip():
        raise UserError("model: found an empty name, expected 'embedded', a folder, a .gguf file or a hub id.")
    if is_gguf(model):
        gguf_file(model)
        return GGUF
    path = Path(model).expanduser()
    if path.suffix == ".ggz":
        if not path.is_file():
            raise UserError(f"model {model!r}: no such file (looked at {path.absolute()}).")
        return ARCHIVE
    if path.is_dir():
        _check_folder(path, model)
        return FOLDER
    if path.is_file():
        raise UserError(f"model {model!r}: found a file, expected a model folder, a .gguf or .ggz file, or a hub id.")
    if model.startswith((".", "~", "/")) or model.count("/") != 1:
        raise UserError(f"model {model!r}: no such folder (looked at {path.absolute()}){expected(model)}")
    return HUB


def is_gguf(model: str) -> bool:
    """Whether the name is one of a GGUF file."""
    return model == "embedded" or model.startswith(("embedded/", "hf:")) or model.endswith(".gguf")


def gguf_file(model: str) -> Path | None:
    """The file; None for one on the hub that has to be fetched.

    Raises:
        UserError: it is not there, or is no GGUF file.
    """
    return resolve(PACKAGED if model == "embedded" else model)[1]


def choose_engine(model: str, wanted: str = "auto") -> Chosen:
    """The engine for a model, and why.

    Args:
        model: "embedded", a folder, a .gguf or .ggz file, `hf:OWNER/REPOSITORY/FILE.gguf`, or a hub id.
        wanted: auto, vllm, transformers, embedded or fake.

    Raises:
        UserError: there is no such model, or no engine for it is installed.
    """
    if wanted not in ENGINES:
        raise UserError(f"engine: found {wanted!r}, expected {', '.join(ENGINES)}.")
    if wanted == "fake":
        return Chosen("fake", "a double that repeats what it is told")
    kind = model_kind(model)
    if wanted == "vllm":
        return _vllm(kind)
    if wanted == "embedded":
        return _embedded(model, kind)
    if wanted == "transformers":
        return _transformers()
    return _auto(model, kind)


def _auto(model: str, kind: str) -> Chosen:
    found = vllm_interpreter()
    without = "vLLM is not installed"
    if found is not None:
        try:
            return _with_vllm(found, kind)
        except UserError as error:
            without = f"vLLM is there, but {error}"
    if kind == GGUF and engine_installed():
        return Chosen("embedded", f"{without}; llama.cpp reads GGUF files")
    if _has_transformers():
        return Chosen("transformers", f"{without}; transformers is in this environment")
    own_way = f"{INSTALL_ENGINE} (llama.cpp, for GGUF files), or " if kind == GGUF else ""
    raise UserError(
        f"no engine for model {model!r} is installed: {own_way}pip install 'agentopt[weights]' (transformers), or "
        f"vLLM: {_INSTALL_VLLM}."
    )


def _vllm(kind: str) -> Chosen:
    found = vllm_interpreter()
    if found is None:
        raise UserError(f"engine vllm: vLLM is not installed: {_INSTALL_VLLM}.")
    return _with_vllm(found, kind)


def _with_vllm(found: Interpreter, kind: str) -> Chosen:
    if kind in (GGUF, ARCHIVE):  # said now, not when everything else has been looked at
        converter(found.python, NEEDS[kind])
    build = " for CPUs" if found.cpu else ""
    return Chosen("vllm", f"vLLM {found.vllm}{build} is in {found.where}", found.python, found.cpu)


def _embedded(model: str, kind: str) -> Chosen:
    if kind != GGUF:
        raise UserError(
            f"engine embedded: found the model {model!r}, expected 'embedded' or a .gguf file, which is what llama.cpp "
            "reads; use --engine vllm or --engine transformers."
        )
    if not engine_installed():
        raise UserError(f"engine embedded: llama.cpp is not installed: {INSTALL_ENGINE}.")
    return Chosen("embedded", "asked for; llama.cpp reads GGUF files")


def _transformers() -> Chosen:
    if not _has_transformers():
        lacks = sorted({"torch", "transformers", "safetensors"} - own().modules)
        raise UserError(
            f"engine transformers: found no {', '.join(lacks)} in this environment: pip install 'agentopt[weights]'."
        )
    return Chosen("transformers", "asked for; transformers is in this environment")


def _has_transformers() -> bool:
    return all(importlib.util.find_spec(one) is not None for one in ("torch", "transformers", "safetensors"))


def _check_folder(path: Path, model: str) -> None:
    if (path / "config.json").is_file():
        return
    hint = "an adapter: serve its base, and give it as --adapter" if (path / "adapter_config.json").is_file() else ""
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"with {', '.join(ggufs)}: give the path of the file" if ggufs else hint
    raise UserError(f"model {model!r}: found a folder without config.json{f' ({hint})' if hint else ''}.")
