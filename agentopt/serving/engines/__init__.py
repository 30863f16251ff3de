"""Engines behind the endpoint: chosen, prepared, started, watched, started again. Importing this loads nothing heavy.

chosen = choose_engine("embedded")
prepared = await prepare("embedded", chosen, cache=Path(".agentopt/cache"))
async with Supervisor(launch(chosen, prepared), run_dir=Path(".agentopt/serve/8000")) as engine:
await engine.ready()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentopt.serving.engines._choose import Chosen as Chosen
    from agentopt.serving.engines._choose import choose_engine as choose_engine
    from agentopt.serving.engines._embedded import launch_embedded as launch_embedded
    from agentopt.serving.engines._events import Died as Died
    from agentopt.serving.engines._events import Event as Event
    from agentopt.serving.engines._events import Failed as Failed
    from agentopt.serving.engines._events import Hung as Hung
    from agentopt.serving.engines._events import ModelReady as ModelReady
    from agentopt.serving.engines._events import OnEvent as OnEvent
    from agentopt.serving.engines._events import Progress as Progress
    from agentopt.serving.engines._events import Ready as Ready
    from agentopt.serving.engines._events import Starting as Starting
    from agentopt.serving.engines._events import Stopped as Stopped
    from agentopt.serving.engines._events import Waiting as Waiting
    from agentopt.serving.engines._events import Warned as Warned
    from agentopt.serving.engines._events import Working as Working
    from agentopt.serving.engines._external import ExternalEngine as ExternalEngine
    from agentopt.serving.engines._launch import Hint as Hint
    from agentopt.serving.engines._launch import Launch as Launch
    from agentopt.serving.engines._launch import launch_fake as launch_fake
    from agentopt.serving.engines._launch import launch_transformers as launch_transformers
    from agentopt.serving.engines._launching import launch as launch
    from agentopt.serving.engines._options import EngineOptions as EngineOptions
    from agentopt.serving.engines._options import SupervisorOptions as SupervisorOptions
    from agentopt.serving.engines._prepare import Prepared as Prepared
    from agentopt.serving.engines._prepare import prepare as prepare
    from agentopt.serving.engines._probe import fetch as fetch
    from agentopt.serving.engines._supervisor import Supervisor as Supervisor
    from agentopt.serving.engines._vllm import launch_vllm as launch_vllm

_LAZY = {
    **dict.fromkeys(("Chosen", "choose_engine"), "_choose"),
    "launch_embedded": "_embedded",
    **dict.fromkeys(
        (
            *("Died", "Event", "Failed", "Hung", "ModelReady", "OnEvent", "Progress", "Ready", "Starting", "Stopped"),
            *("Waiting", "Warned", "Working"),
        ),
        "_events",
    ),
    "ExternalEngine": "_external",
    **dict.fromkeys(("Hint", "Launch", "launch_fake", "launch_transformers"), "_launch"),
    "launch": "_launching",
    **dict.fromkeys(("EngineOptions", "SupervisorOptions"), "_options"),
    **dict.fromkeys(("Prepared", "prepare"), "_prepare"),
    "fetch": "_probe",
    "Supervisor": "_supervisor",
    "launch_vllm": "_vllm",
}

__all__ = [
    "Chosen",
    "Died",
    "EngineOptions",
    "Event",
    "ExternalEngine",
    "Failed",
    "Hint",
    "Hung",
    "Launch",
    "ModelReady",
    "OnEvent",
    "Prepared",
    "Progress",
    "Ready",
    "Starting",
    "Stopped",
    "Supervisor",
    "SupervisorOptions",
    "Waiting",
    "Warned",
    "Working",
    "choose_engine",
    "fetch",
    "launch",
    "launch_embedded",
    "launch_fake",
    "launch_transformers",
    "launch_vllm",
    "prepare",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(f"agentopt.serving.engines.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
