"""One safetensors file from which a run that was killed goes on as if it had not been."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agentopt.capsules.training._policy import Policy
from agentopt.errors import UserError
from agentopt.weights.load import need

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write(path: Path, policy: Policy, optimizer: Any, state: dict[str, Any]) -> None:
    """Everything that the next step depends on; the file is replaced as a whole."""
    safetensors = need("safetensors.torch")
    tensors: dict[str, Any] = {}
    for number, weight in enumerate(policy.trained):
        tensors[f"weight.{number}"] = weight.detach().contiguous().clone()
        moments = optimizer.state.get(weight, {})
        for name in _MOMENTS:
            if name in moments:
                tensors[f"{name}.{number}"] = moments[name].contiguous()
        if "step" in moments:
            state["optimizer_steps"] = int(moments["step"])
    for number, weight in enumerate(policy.reference):
        tensors[f"reference.{number}"] = weight.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    safetensors.save_file(tensors, str(temporary), metadata={"state": json.dumps(state)})
    os.replace(temporary, path)


def state_of(path: Path) -> dict[str, Any]:
    """What `write` was given as state."""
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error}); delete it to start anew.") from error


def read(path: Path, policy: Policy, optimizer: Any, state: dict[str, Any]) -> None:
    """Put the weights, the reference and the optimizer's moments back."""
    torch = policy.torch
    tensors: dict[str, Any] = need("safetensors.torch").load_file(str(path), device=str(policy.device))
    with torch.no_grad():
        for number, weight in enumerate(policy.trained):
            weight.copy_(tensors[f"weight.{number}"])
            if f"exp_avg.{number}" in tensors:
                moments = {name: tensors[f"{name}.{number}"] for name in _MOMENTS}
                optimizer.state[weight] = {"step": torch.tensor(float(state["optimizer_steps"]))} | moments
    policy.reference = [
        tensors[name] for name in sorted((n for n in tensors if n.startswith("reference.")), key=_number)
    ]


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])
