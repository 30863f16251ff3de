"""The plug-in by which vLLM serves a folder that `agentopt quantize` wrote. Importing this loads no vLLM and no torch.

vLLM finds `register` through the entry point `agentopt_rf8` of the group `vllm.general_plugins` and calls it in every
process that it starts; a checkpoint asks for the format by `quant_method` in its config.json, so that no option is
needed. `check_environment` says beforehand what would keep that from working.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import METHOD

GROUP = "vllm.general_plugins"
NAME = "agentopt_rf8"
"""Of the entry point: what `VLLM_PLUGINS` has to list where it is set."""

_METHODS = "agentopt.weights.gg._vllm_method"


def register() -> None:
    """Make vLLM know the method "rf8". Calling it again does nothing."""
    known: Any = importlib.import_module("vllm.model_executor.layers.quantization")
    if METHOD not in known.QUANTIZATION_METHODS:
        importlib.import_module(_METHODS)
    elif known.get_quantization_config(METHOD).__module__ != _METHODS:
        logging.getLogger(__name__).warning(
            "another plug-in has registered the quantization method %r: agentopt's is not used", METHOD
        )


def check_environment(environ: Mapping[str, str] | None = None) -> None:
    """Refuse an environment in which a vLLM that is started now would not know our checkpoints.

    Args:
        environ: the variables that it will be started with; those of this process by default.

    Raises:
        UserError: `VLLM_PLUGINS` leaves our plug-in out, or the installed package does not declare it.
    """
    allowed = (os.environ if environ is None else environ).get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        wanted = f"{allowed},{NAME}" if allowed.strip() else NAME
        raise UserError(
            f"VLLM_PLUGINS: found {allowed!r}, expected {NAME} in the list: without it vLLM does not know "
            f"quant_method {METHOD!r}. Unset the variable, or set VLLM_PLUGINS={wanted}."
        )
    if NAME not in entry_points(group=GROUP).names:
        raise UserError(
            f"agentopt: found no entry point {NAME} in {GROUP}, so vLLM will not find the plug-in: the installed "
            "package is older than its files, or an old agentopt.egg-info in the current folder hides it. Install "
            "agentopt again in the environment that vLLM runs in."
        )
