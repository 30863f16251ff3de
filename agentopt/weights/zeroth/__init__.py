"""Zeroth-order fine-tuning: weights tuned by forward passes alone, at the memory of inference.

    from agentopt.weights import load, zeroth
    model, tokenizer = load.model("embedded")
    zo = zeroth.ZerothOrder.preset("sparse-mezo", model, lr=1e-6)
    result = zo.step(loss_fn)              # loss_fn(model) -> a number, or a loss per example

Importing this loads no torch.
"""

from __future__ import annotations

from agentopt.weights.zeroth._estimators import Coefficients
from agentopt.weights.zeroth._exchange import Alone, SocketExchange, WorkerLost, verify
from agentopt.weights.zeroth._executor import run_local
from agentopt.weights.zeroth._fingerprint import fingerprint
from agentopt.weights.zeroth._log import Log
from agentopt.weights.zeroth._log_header import Header, header_of
from agentopt.weights.zeroth._lr_range import LrRange, LrTrial, Snapshot, grid, lr_range
from agentopt.weights.zeroth._optimizer import NonFiniteLoss, ZerothOrder
from agentopt.weights.zeroth._philox import probe_seed
from agentopt.weights.zeroth._presets import PRESETS, Preset, preset
from agentopt.weights.zeroth._replay import log_to, replay, resume
from agentopt.weights.zeroth._rules import METHODS
from agentopt.weights.zeroth._schedule import Schedule
from agentopt.weights.zeroth._types import Exchange, Objective, Probe, Shift, StepResult, Variant

__all__ = [
    "METHODS",
    "PRESETS",
    "Alone",
    "Coefficients",
    "Exchange",
    "Header",
    "Log",
    "LrRange",
    "LrTrial",
    "NonFiniteLoss",
    "Objective",
    "Preset",
    "Probe",
    "Schedule",
    "Shift",
    "Snapshot",
    "SocketExchange",
    "StepResult",
    "Variant",
    "WorkerLost",
    "ZerothOrder",
    "fingerprint",
    "grid",
    "header_of",
    "log_to",
    "lr_range",
    "preset",
    "probe_seed",
    "replay",
    "resume",
    "run_local",
    "verify",
]
