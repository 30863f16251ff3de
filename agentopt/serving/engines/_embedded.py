"""The embedded engine: llama.cpp's own HTTP server over a GGUF file, as a process."""

from __future__ import annotations

import os
import re
from pathlib import Path

from agentopt.errors import UserError
from agentopt.serving._types import FORWARDED, Abilities
from agentopt.serving.engines._launch import TOKEN, Launch, common_hint, engine_environment, module_command
from agentopt.serving.engines._options import EngineOptions

CONTEXT, SEQUENCES = 4096, 4
_MODULE = "agentopt.serving.engines.embedded_server"


def launch_embedded(model: Path, name: str, options: EngineOptions | None = None) -> Launch:
    """llama.cpp over one GGUF file.

    Args:
        model: the file.
        name: the model's name.
        options: `context`, `sequences`, `threads` and `extra` (`embedded_server --help`) are used.

    Raises:
        UserError: an option that it does not have.
    """
    asked = options or EngineOptions()
    if asked.resident:
        raise UserError(
            "engine embedded: found adapters, and it loads none; use --engine vllm or --engine transformers for them."
        )
    for option in ("dtype", "kv_gib", "compiled"):
        if getattr(asked, option) is not None:
            raise UserError(f"{option}: is not for the embedded engine, whose file says how it computes; leave it out.")
    context = asked.context or CONTEXT
    arguments = ["--model", str(model), "--served-model-name", name, "--max-model-len", str(context)]
    arguments += ["--max-num-seqs", str(asked.sequences or SEQUENCES)]
    if asked.threads is not None:
        arguments += ["--threads", str(asked.threads)]
    return Launch(
        name="embedded",
        model=name,
        command=module_command(_MODULE, arguments, asked.extra),
        env=engine_environment(**{k: v for k, v in os.environ.items() if k == "AGENTOPT_ENGINE_LOCK"}),
        token_env=TOKEN,
        abilities=Abilities(routes=FORWARDED, model=name, adapters=False, context=context),
        stages=((re.compile(r"loading (?:the )?model"), "loading weights"),),
        hint=common_hint,
        counters=re.compile(r"^llamacpp:(?:prompt_tokens|tokens_predicted)_total .*$", re.MULTILINE),
    )
