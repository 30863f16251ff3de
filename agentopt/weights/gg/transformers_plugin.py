"""Importing this lets transformers load, save and make checkpoints in our formats.

    import agentopt.weights.gg.transformers_plugin
    model = AutoModelForCausalLM.from_pretrained("model-rf8")

`RF8Config` quantizes while loading: `from_pretrained(DIR, quantization_config=RF8Config(format="rf8-gg"))`. Its
`keep_packed=True` keeps a quantized model at one byte per weight in memory, at the price of speed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.weights.gg._checkpoint import METHOD
from agentopt.weights.gg._guard import guarded
from agentopt.weights.load import need

transformers = need("transformers")
auto = need("transformers.quantizers.auto")
if not hasattr(auto, "register_quantizer"):
    raise UserError(f"transformers {transformers.__version__} cannot be extended; expected 5.19 or newer.")

from agentopt.weights.gg._hf_quantizer import RF8Config, RF8Quantizer  # noqa: E402  # needs what is checked above

__all__ = ["RF8Config", "RF8Quantizer", "register"]


def register() -> None:
    """Make the format known to transformers; a second call does nothing.

    Raises:
        UserError: something else is registered under the name.
    """
    known = auto.AUTO_QUANTIZER_MAPPING.get(METHOD)
    if known is not None and known is not RF8Quantizer:
        raise UserError(f"transformers: the quantization method {METHOD!r} is taken by {known.__name__}; unload it.")
    if known is None:
        auto.register_quantization_config(METHOD)(RF8Config)
        auto.register_quantizer(METHOD)(RF8Quantizer)
        kinds = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
        if isinstance(kinds, tuple):
            auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*kinds, RF8Config)
    _guard_saving(transformers.PreTrainedConfig)


def _guard_saving(kind: Any) -> None:
    """Saving leaves the guard out, as what names a file of the old folder, and there is no hook to put it back."""
    original = kind.save_pretrained
    if getattr(original, "guards", False):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, save_directory, *args, **kwargs)
        if _is_ours(getattr(self, "quantization_config", None)):
            path = Path(save_directory) / "config.json"
            config = guarded(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return result

    setattr(save_pretrained, "guards", True)  # noqa: B010  # an attribute that functions do not declare
    kind.save_pretrained = save_pretrained


def _is_ours(about: Any) -> bool:
    found = about.to_dict() if isinstance(about, RF8Config) else about
    return isinstance(found, Mapping) and cast("Mapping[str, Any]", found).get("quant_method") == METHOD


register()
