"""From an engine that was chosen and a model that was prepared to what is started."""

from __future__ import annotations

from agentopt.serving.engines._choose import Chosen
from agentopt.serving.engines._launch import Launch, launch_fake, launch_transformers
from agentopt.serving.engines._options import EngineOptions
from agentopt.serving.engines._prepare import Prepared


def launch(
    chosen: Chosen, prepared: Prepared, options: EngineOptions | None = None, *, name: str | None = None
) -> Launch:
    """What `Supervisor` starts.

    Args:
        chosen: the engine.
        prepared: its model.
        options: what it is told.
        name: by which the model is known; None: `prepared.name`.

    Raises:
        UserError: the engine does not have an option, or the environment lacks something.
    """
    known, asked = name or prepared.name, options or EngineOptions()
    if chosen.engine == "vllm":
        from agentopt.serving.engines._vllm import launch_vllm

        return launch_vllm(prepared.path, known, asked, chosen)
    if chosen.engine == "embedded":
        from agentopt.serving.engines._embedded import launch_embedded

        return launch_embedded(prepared.path, known, asked)
    if chosen.engine == "transformers":
        return launch_transformers(prepared.path, known, asked)
    return launch_fake(*asked.extra, model=known)
