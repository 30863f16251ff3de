"""`python -m agentopt.serving.engines.embedded_server`: llama.cpp's HTTP server on a Unix socket or a loopback port.

Requests share batches: every sequence has a slot with a context of its own, and slots are computed together as they
come and go. Every route but /health asks for the token in AGENTOPT_ENGINE_TOKEN. It has chat, completions, responses,
messages and embeddings (the mean of the last layer over the text: a chat model's, so of modest quality).

Unlike the engine inside a process (`agentopt.models`), several sequences share a batch here, and the last bits of a
probability depend on what else is in it: the same request need not give the same text twice, even at temperature 0.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from agentopt.errors import UserError
from agentopt.models._embedded_engine import engine_threads
from agentopt.models._embedded_files import INSTALL_ENGINE

_TOKEN = "AGENTOPT_ENGINE_TOKEN"


def parameters(told: argparse.Namespace, token: str) -> Any:
    """llama.cpp's parameters for what was asked.

    Raises:
        UserError: it is not installed.
    """
    try:
        llama: Any = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise UserError(f"the embedded engine is not installed: run {INSTALL_ENGINE}") from error
    params = llama.CommonParams()
    params.model.path = str(told.model)
    params.model_alias = {told.served_model_name}
    params.hostnames = [told.uds] if told.uds else [told.host]
    params.port = told.port
    params.api_keys = [token] if token else []
    slots = told.max_num_seqs
    params.n_parallel, params.n_ctx, params.kv_unified = slots, told.max_model_len * slots, False
    params.cont_batching = True
    params.n_gpu_layers, params.cache_ram_mib, params.warmup = 0, 0, False
    threads = told.threads or engine_threads()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embedding = True
    params.pooling_type = llama.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    # Nothing but the API: no page, no state of slots (it holds prompts), and no prompts in the log.
    params.endpoint_metrics = True  # of its counters the supervisor sees whether it still computes
    params.ui, params.endpoint_slots, params.endpoint_props, params.verbosity = False, False, False, 0
    return params


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="embedded_server", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--served-model-name", default="model", help="the name by which the model is asked")
    parser.add_argument("--uds", help="path of a Unix socket; else --host and --port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, printed")
    parser.add_argument("--max-model-len", type=int, default=4096, help="longest prompt and reply together, tokens")
    parser.add_argument("--max-num-seqs", type=int, default=4, help="replies that are written at a time")
    parser.add_argument("--threads", type=int, help="default: physical cores minus one")
    told = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    _say(f"loading model {told.model}")
    try:
        params = parameters(told, os.environ.get(_TOKEN, ""))
        import xllamacpp

        llama: Any = xllamacpp
        server = llama.Server(params)
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except (RuntimeError, ValueError) as error:
        _say(f"error: llama.cpp cannot load {told.model}: {error}")
        return 1
    _say(f"listening at {server.listening_address}")
    stop.wait()
    # Its destructor waits for requests in work; the process is about to end, and they with it.
    os._exit(0)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
