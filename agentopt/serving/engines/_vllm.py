"""vLLM as this endpoint has to start it: on a socket, offline, with room for adapters, sized for the machine."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.models._embedded_engine import engine_threads
from agentopt.serving._types import CHAT, COMPLETIONS, COUNT, MESSAGES, RESPONSES, Abilities, Address
from agentopt.serving.adapters import BaseFacts
from agentopt.serving.engines._choose import Chosen
from agentopt.serving.engines._interpreters import ask
from agentopt.serving.engines._launch import Hint, Launch, common_hint, engine_environment, listen
from agentopt.serving.engines._machine import available_gib, default_dtype, has_gpu
from agentopt.serving.engines._options import EngineOptions
from agentopt.weights.gg import vllm_plugin

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks that vLLM can be started with."""
CPU_CONTEXT, CPU_SEQUENCES = 8192, 16
NO_DOMAIN = "none.invalid"
"""A name that is never anybody's (RFC 2606)."""
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Small layers that choose experts: adapters do not change them, and vLLM cannot wrap all of them."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def launch_vllm(model: Path, name: str, options: EngineOptions | None = None, chosen: Chosen | None = None) -> Launch:
    """VLLM's OpenAI server over a model folder.

    Args:
        model: the folder.
        name: the model's name.
        options: what it is told.
        chosen: which Python has it.

    Raises:
        UserError: the environment, the folder or an option is not as vLLM needs it.
    """
    asked = options or EngineOptions()
    python = chosen.python if chosen is not None and chosen.python is not None else sys.executable
    cpu = (chosen is not None and chosen.cpu) or not has_gpu()
    config = read_config(model)
    env = _environment(python, asked, cpu=cpu)
    if _method(config) == "rf8":
        _check_plugin(python, env)
    dtype = asked.dtype or (default_dtype() if cpu else None)
    arguments = ["--model", str(model), "--served-model-name", name, "--disable-uvicorn-access-log"]
    if dtype is not None:
        arguments += ["--dtype", dtype]
    context, sequences = asked.context, asked.sequences
    if cpu:
        context, sequences = _cpu_sizes(config, asked, dtype or "float32", env)
        if not asked.compiled:
            arguments.append("--enforce-eager")
    elif asked.compiled is False:
        arguments.append("--enforce-eager")
    for option, value in (("--max-model-len", context), ("--max-num-seqs", sequences)):
        if value is not None:
            arguments += [option, str(value)]
    arguments += adapter_arguments(model, asked, cpu=cpu)
    # Otherwise whoever may ask could have the engine fetch addresses of the network that it stands in.
    arguments += ["--allowed-media-domains", NO_DOMAIN]

    def command(address: Address) -> list[str]:
        program = [python, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        return [*program, *listen(address), *arguments, *asked.extra]

    return Launch(
        name="vllm",
        model=name,
        command=command,
        env=env,
        token_env="VLLM_API_KEY",
        abilities=Abilities(
            routes=frozenset({CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT}),
            model=name,
            adapters=asked.resident > 0,
            context=context,
        ),
        stages=_STAGES,
        hint=vllm_hint,
        counters=re.compile(r"^vllm:(?:prompt|generation)_tokens_total\b.*$", re.MULTILINE),
    )


def adapter_arguments(model: Path, options: EngineOptions, *, cpu: bool) -> list[str]:
    """What makes vLLM take LoRA adapters while it runs; nothing without `resident`.

    Raises:
        UserError: a rank that vLLM does not have, or the folder is no model.
    """
    if not options.resident:
        return []
    rank = next((one for one in RANKS if one >= options.max_rank), None)
    if rank is None:
        raise UserError(f"max_rank: found {options.max_rank}, expected at most {RANKS[-1]}, vLLM's largest.")
    # Rows without an adapter are computed with what is in the last slot when vLLM runs on a CPU (vllm#48421), so one
    # slot stays empty. Named layers keep the output head out of it, which a request for prompt_logprobs would stop the
    # engine with (vllm#29955); with the base's own names no layer is forgotten, and with short ones none that it packs.
    slots = options.resident + 1 if cpu else options.resident
    targets = [name for name in BaseFacts.of(model, rank).ends if name not in _ROUTERS]
    arguments = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    return [*arguments, "--lora-target-modules", *targets] if targets else arguments


def _environment(python: str, options: EngineOptions, *, cpu: bool) -> dict[str, str]:
    more = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cpu:
        # Threads spin between layers; one without a core stalls all others, and the server needs some time as well.
        more["OMP_NUM_THREADS"] = str(engine_threads())
    env = engine_environment(python, **more)
    if options.threads is not None:
        env["OMP_NUM_THREADS"] = str(options.threads)
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env.pop("VLLM_API_KEY", None)
    if options.resident:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        env.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    return env


def _check_plugin(python: str, env: Mapping[str, str]) -> None:
    """A quantized folder needs our plug-in there, and leave to load it.

    Raises:
        UserError: it is missing.
    """
    found = ask(python)
    if found is not None and found.plugin and (python != sys.executable):
        allowed = env.get("VLLM_PLUGINS")
        if allowed is None or vllm_plugin.NAME in allowed.split(","):
            return
    elif found is not None and not found.plugin and python != sys.executable:
        raise UserError(
            f"engine vllm: the model is quantized by agentopt, which is not installed in {python}, where vLLM is: "
            "pip install agentopt there."
        )
    vllm_plugin.check_environment(env)


def _cpu_sizes(config: Mapping[str, Any], asked: EngineOptions, dtype: str, env: dict[str, str]) -> tuple[int, int]:
    """Context, sequences, and the memory for their keys and values, which must always be said on a CPU."""
    longest = config.get("max_position_embeddings")
    longest = longest if isinstance(longest, int) and longest > 0 else CPU_CONTEXT
    context = asked.context or min(longest, CPU_CONTEXT)
    sequences = asked.sequences or CPU_SEQUENCES
    gib = asked.kv_gib
    if gib is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        need = kv_bytes(config, dtype) * context * sequences / (1 << 30)
        gib = max(1, min(math.ceil(need), int(available_gib() * 0.4)))
    if gib is not None:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(gib)
        fits = int(gib * (1 << 30) / max(1, kv_bytes(config, dtype)))
        if asked.context is None:
            context = max(256, min(context, fits // 64 * 64))
    return context, sequences


def kv_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of keys and values of one token, from config.json."""

    def number(name: str, default: int) -> int:
        value = config.get(name)
        return value if isinstance(value, int) and value > 0 else default

    heads = number("num_attention_heads", number("n_head", 32))
    width = number("hidden_size", number("n_embd", 4096))
    shared = number("num_key_value_heads", heads)
    layers = number("num_hidden_layers", number("n_layer", 32))
    return 2 * layers * shared * number("head_dim", width // heads) * _BYTES[dtype]


def read_config(model: Path) -> dict[str, Any]:
    """config.json of a model folder; of a model with several parts the one that writes text.

    Raises:
        UserError: there is none.
    """
    path = model / "config.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a JSON object.")
    whole = cast("dict[str, Any]", found)
    inner = whole.get("text_config")
    return {**whole, **cast("dict[str, Any]", inner)} if isinstance(inner, dict) else whole


def _method(config: Mapping[str, Any]) -> str | None:
    about = config.get("quantization_config")
    return cast("dict[str, Any]", about).get("quant_method") if isinstance(about, dict) else None


_STAGES = (
    (re.compile(r"Loading safetensors checkpoint shards:\s+(\d+%)"), r"loading weights, \1"),
    (re.compile(r"Initializing a V1 LLM engine|non-default args"), "reading the model's configuration"),
    (re.compile(r"Starting to load model|Loading weights"), "loading weights"),
    (re.compile(r"Compiling a graph|Dynamo bytecode|torch\.compile takes"), "compiling"),
    (re.compile(r"[Cc]apturing .*graph"), "capturing graphs"),
    (re.compile(r"KV cache size|Available KV cache memory"), "reserving memory for keys and values"),
    (re.compile(r"Started server process|Application startup"), "opening the API"),
)

_HINTS: tuple[tuple[str, str, bool], ...] = (
    (
        r"Unknown quantization method: '?(\w+)",
        "vLLM does not know the quantization {0}: agentopt is not installed where vLLM is, or VLLM_PLUGINS leaves "
        "agentopt_rf8 out",
        True,
    ),
    (
        r"torchvision::nms does not exist",
        "torchvision is built for CUDA and torch is not: pip uninstall torchvision torchaudio torchcodec in vLLM's "
        "environment",
        True,
    ),
    (
        r"max_model_len \((\d+)\) is greater than the derived max_model_len \(max_position_embeddings=(\d+)",
        "the model takes {1} tokens of context, asked for were {0}",
        True,
    ),
    (
        r"is larger than the available KV cache memory|larger than the maximum number of tokens that can be stored",
        "one request of the full context does not fit into the memory for keys and values: ask for less context "
        "(--max-model-len), or give it more memory (VLLM_CPU_KVCACHE_SPACE, --gpu-memory-utilization)",
        True,
    ),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|No available memory for the cache blocks|"
        r"Free memory on device .* is less than desired",
        "the GPU's memory is too small or in use: lower --gpu-memory-utilization or --max-model-len, or quantize the "
        "model (--quantize rf8-gg)",
        False,
    ),
    (
        r"less than desired CPU memory utilization|not enough memory for KV cache|Cannot allocate memory",
        "memory is too small or in use: ask for less context, or lower VLLM_CPU_KVCACHE_SPACE",
        False,
    ),
    (
        r"Model architectures? \[?'?([\w', ]+?)'?\]? (?:are|is) not supported",
        "vLLM has no model {0}; try --engine transformers",
        True,
    ),
    (
        r"Head size \d+ is not supported|head_size.{0,20}not supported",
        "vLLM's attention does not take this model's head size",
        True,
    ),
    (
        r"(?:gcc|g\+\+|C\+\+ compiler).{0,40}(?:not found|No such file)",
        "compiling needs a C++ compiler: leave the compilation out",
        True,
    ),
    (r"Address already in use", "its address is in use", False),
)
"""Pattern in the log, words for a person, whether another start would end in the same way."""


def vllm_hint(lines: Sequence[str], code: int | None) -> Hint | None:
    """What vLLM's last lines mean: failures that are known, then what any Python program says."""
    for pattern, words, fatal in _HINTS:
        for line in reversed(lines):
            found = re.search(pattern, line)
            if found is not None:
                return Hint(words.format(*(group or "" for group in found.groups())), fatal)
    # The server's own error only says that its core has one: that was printed before.
    return common_hint([line for line in lines if "Engine core initialization failed" not in line], code)
