"""A key in config.json that makes a loader without the plug-in stop, with words that help. No torch here.

transformers only warns of a `quant_method` that it does not know, and goes on with random weights. It does refuse a
`transformers_weights` (the name of the weights' file) that names no safetensors file, and prints what it found: so the
key holds a sentence. The plug-in takes the key away before the files are looked up; vLLM does not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GUARD = "transformers_weights"
SENTENCE = (
    "these weights are 8-bit codes of agentopt: run `import agentopt.weights.gg.transformers_plugin` before "
    "from_pretrained (pip install agentopt)"
)


def guarded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the key, as every folder of our formats has it."""
    return {**config, GUARD: SENTENCE}


def unguarded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the key, for a model whose weights are no codes any more."""
    return {key: value for key, value in config.items() if key != GUARD}
