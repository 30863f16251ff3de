"""One way to get a causal language model with its tokenizer: a hub id, a folder, a GGUF file, or the embedded model.

    from agentopt.weights import load
    model, tokenizer = load.model("embedded")

The embedded model is the GGUF file that the llama.cpp engine serves, read here as torch weights: the same model can be
trained and then compared with what it was. No engine is started.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.weights._gguf import read_once
from agentopt.weights.gg._checkpoint import BOOK, CODES, METHOD, SCALE

INSTALL = "pip install 'agentopt[weights]'"
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def model(name_or_path: str | Path, *, dtype: Any = None, device: Any = None) -> tuple[Any, Any]:
    """The model (in evaluation mode) and its tokenizer (padding on the left, with a padding token).

    Args:
        name_or_path: `"embedded"`, a folder with `config.json`, a `.gguf` path, `hf:OWNER/REPOSITORY/FILE.gguf`, or the
            id of a hub model.
        dtype: a torch dtype or its name; None for float32, in which every device can train.
        device: a torch device or its name; None for the GPU when torch sees one, else the CPU.

    Raises:
        UserError: torch or transformers is not installed; the name stands for nothing, or for something that is not a
            causal language model.
    """
    source, arguments = _source(str(name_or_path))  # first: a name that stands for nothing is told before torch loads
    torch, transformers = need("torch"), need("transformers")
    number = _dtype(torch, dtype)
    where = _device(torch, device)
    with _quiet(transformers), read_once() if "gguf_file" in arguments else contextlib.nullcontext():
        try:
            config = transformers.AutoConfig.from_pretrained(source, **arguments)
            _check_causal(transformers, config, str(name_or_path))
            codes = _plug_in(config)
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=number, output_loading_info=True, **arguments
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(_explain(str(name_or_path), source, error)) from error
    if codes:
        _check_complete(loaded, info, str(name_or_path))
    if "gguf_file" in arguments:
        _forget_packing(loaded)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return loaded.to(where).eval(), tokenizer


def config(name_or_path: str | Path) -> Any:
    """The configuration that `model` would load with, without any weights.

    Args:
        name_or_path: as for `model`.

    Raises:
        UserError: as for `model`.
    """
    source, arguments = _source(str(name_or_path))
    transformers = need("transformers")
    with _quiet(transformers):
        try:
            found = transformers.AutoConfig.from_pretrained(source, **arguments)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(_explain(str(name_or_path), source, error)) from error
    _check_causal(transformers, found, str(name_or_path))
    return found


def _plug_in(config: Any) -> bool:
    """Let transformers know our formats when the weights are in one of them; whether they are."""
    about = getattr(config, "quantization_config", None)
    if not isinstance(about, dict) or cast("dict[str, Any]", about).get("quant_method") != METHOD:
        return False
    importlib.import_module("agentopt.weights.gg.transformers_plugin")
    return True


def _check_complete(loaded: Any, info: dict[str, Any], name: str) -> None:
    """Nothing of a quantized model may be made up: transformers only warns of it."""
    from agentopt.weights.gg._linear import PACKED

    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(str(one) for one in info.get(what) or ())
        if what == "unexpected_keys":  # others were in the original model as well, where nobody minds them
            found = [one for one in found if one.rpartition(".")[2] in (CODES, SCALE, BOOK)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"model {name!r}: {what.replace('_', ' ')}: found {found[0]}{more}, expected none; its weights and its "
                "config.json do not belong together: fetch it again."
            )
    if not any(isinstance(module, PACKED) for module in loaded.modules()):
        raise UserError(f"model {name!r}: config.json says {METHOD}, but no layer holds codes; fetch it again.")


def _forget_packing(loaded: Any) -> None:
    """A GGUF file is unpacked into ordinary weights; transformers would refuse to save them, as if they were packed."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(loaded, name):
            delattr(loaded, name)
    if hasattr(loaded, "is_quantized"):
        loaded.is_quantized = False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config


@functools.cache
def need(module: str) -> Any:
    """Import one of the packages of the extra `weights`; UserError names the extra when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"working with weights needs {package}, which is not installed: {INSTALL}") from error


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given, and its extra arguments."""
    # Imported here so that torch, transformers and peft alone are enough for everything but named models.
    from agentopt.models._embedded_files import PACKAGED, fetch, resolve
    from agentopt.models._hub import check_on_hub, expected

    spec = PACKAGED if name == "embedded" else name
    if not spec.strip():
        raise UserError("model: found an empty name, expected 'embedded', a folder, a .gguf path or a hub id.")
    if spec.startswith(("embedded/", "hf:")) or spec.endswith(".gguf"):
        _, path = resolve(spec)
        path = fetch(spec) if path is None else path
        return str(path.parent), {"gguf_file": path.name}
    path = Path(spec).expanduser()
    if path.is_dir():
        _check_folder(path, name)
        return str(path), {}
    if path.is_file():
        raise UserError(f"model {name!r}: found a file, expected a model folder, a .gguf file, a hub id or 'embedded'.")
    if _looks_like_path(spec):
        raise UserError(f"model {name!r}: no such folder (looked at {path.absolute()}){expected(spec)}")
    need("huggingface_hub")
    return spec, {"local_files_only": True} if check_on_hub(spec) else {}


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1


def _check_folder(path: Path, name: str) -> None:
    if not (path / "config.json").is_file():
        hint = "an adapter, so load it with what wrote it" if (path / "adapter_config.json").is_file() else ""
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"{', '.join(ggufs)}: give the path of the file" if ggufs else hint
        raise UserError(f"model {name!r}: found a folder without config.json{f' ({hint})' if hint else ''}.")


def _check_causal(transformers: Any, config: Any, name: str) -> None:
    """An encoder also loads as a causal model, with a head of random numbers: refuse it by its architecture."""
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    architectures = list(config.architectures or [])
    if known and (not architectures or any(mark in one for one in architectures for mark in _CAUSAL)):
        return
    found = ", ".join(architectures) or type(config).__name__
    raise UserError(f"model {name!r}: found {found}, expected a causal language model (one that writes text).")


def _dtype(torch: Any, dtype: Any) -> Any:
    if dtype is None:
        return torch.float32
    found: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype: found {dtype!r}, expected float32, bfloat16 or float16.")
    return found


def _device(torch: Any, device: Any) -> Any:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: found {device!r}, expected a torch device such as 'cpu' or 'cuda'.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: found {device!r}, but torch sees no GPU here; expected 'cpu'.")
    return found


def _explain(name: str, source: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"model {name!r} cannot be loaded: {_config_reason(source) or first}"


def _config_reason(source: str) -> str:
    """Why a folder's config.json is unusable; empty when it is not the reason."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return ""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"config.json is not JSON ({error})"
    return ""


@contextlib.contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """No progress bars: the caller shows progress."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # The reader of GGUF files has a bar of its own, which that switch does not reach.
    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(gguf, "tqdm", None)
    if bar is not None:
        gguf.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            gguf.tqdm = bar
        if shown:
            logging.enable_progress_bar()
