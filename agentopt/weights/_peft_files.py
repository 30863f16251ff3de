"""The folder format of peft, without peft: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.weights.load import need

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write(folder: str | Path, tensors: dict[str, Any], config: dict[str, Any]) -> Path:
    """Put both files into the folder; each is replaced as a whole."""
    path = Path(folder).expanduser()
    save = need("safetensors.torch").save_file
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary = path / (_TENSORS + ".new")
        save(ready, str(temporary), metadata={"format": "pt"})
        os.replace(temporary, path / _TENSORS)
        temporary = path / (_CONFIG + ".new")
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path / _CONFIG)
    except FileExistsError as error:
        raise UserError(f"adapter {str(path)!r}: found a file, expected a folder (it is made when missing).") from error
    except (OSError, need("safetensors").SafetensorError) as error:
        raise RunError(f"adapter {str(path)!r}: cannot be written ({error}).") from error
    return path


def read(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors (on the CPU) and configuration of an adapter of this `peft_type`.

    Raises:
        UserError: no such folder, a file is missing or unreadable, or it holds another kind of adapter.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"adapter {str(path)!r}: no such folder; expected one with {_CONFIG} and {_TENSORS}.")
    config = _read_config(path)
    if config.get("peft_type") != kind:
        found = config.get("peft_type")
        raise UserError(f"adapter {str(path)!r}: {_CONFIG} has peft_type {found!r}, expected {kind!r}.")
    if not (path / _TENSORS).is_file():
        hint = " adapter_model.bin is a pickle, which is never read: save it again as safetensors with peft."
        found = hint if (path / "adapter_model.bin").is_file() else ""
        raise UserError(f"adapter {str(path)!r}: found no {_TENSORS}.{found}")
    try:
        return need("safetensors.torch").load_file(str(path / _TENSORS)), config
    except (OSError, need("safetensors").SafetensorError) as error:
        raise UserError(f"adapter {str(path)!r}: {_TENSORS} cannot be read ({error}).") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"adapter {str(path)!r}: found no readable {_CONFIG}; expected a folder of peft.") from error
    except ValueError as error:
        raise UserError(f"adapter {str(path)!r}: {_CONFIG} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"adapter {str(path)!r}: {_CONFIG} holds no JSON object.")
    return config  # pyright: ignore[reportUnknownVariableType]


def base_name(model: Any) -> str | None:
    """What the base model was loaded from, as its configuration remembers it."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
