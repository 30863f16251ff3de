"""`python -m agentopt.serving.engines.transformers_server --model DIR --uds PATH`: a model over transformers, by HTTP.

The engine of `agentopt serve` where vLLM is not installed: OpenAI's chat completions and completions, streams, JSON
schemas (with llguidance), several LoRA adapters at once. It is meant to stand behind the gateway: on a Unix socket or
on loopback, with a token from the environment variable AGENTOPT_ENGINE_TOKEN.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from agentopt.errors import AgentoptError, UserError

TOKEN = "AGENTOPT_ENGINE_TOKEN"
_WINDOW = 4096
"""Tokens, where the model's configuration does not say how long a text it reads."""


def main() -> int:
    """Load the model, then listen; returns the exit code."""
    parser = argparse.ArgumentParser(prog="transformers_server")
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, a hub id or 'embedded'")
    parser.add_argument("--served-model-name", default="model", help="the name by which the model is asked")
    parser.add_argument("--uds", help="path of a Unix socket to listen at")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="cpu or cuda; the GPU when there is one")
    parser.add_argument("--chat-template", type=Path, help="a jinja file in place of the model's own template")
    parser.add_argument("--max-model-len", type=int, help="longest prompt and reply together, tokens")
    parser.add_argument("--max-num-seqs", type=int, default=8, help="replies that are written at a time")
    parser.add_argument(
        "--chunked-prefill-size",
        type=int,
        help="tokens of a prompt that are read at a time; 128 on a CPU, 512 elsewhere",
    )
    parser.add_argument("--enable-lora", action="store_true", help="adapters can be loaded while it runs")
    parser.add_argument("--max-loras", type=int, default=8, help="adapters at a time")
    parser.add_argument("--max-lora-rank", type=int, default=64)
    asked = parser.parse_args()
    try:
        with _listen(asked) as listening:
            return asyncio.run(_serve(asked, listening))
    except AgentoptError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def _listen(asked: argparse.Namespace) -> socket.socket:
    """Bound, but not listening: nobody is kept waiting while the model is loaded."""
    if asked.uds is None:
        found = socket.socket(socket.AF_INET6 if ":" in asked.host else socket.AF_INET)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place: Any = (asked.host, asked.port)
    else:
        found = socket.socket(socket.AF_UNIX)
        place = asked.uds
        Path(asked.uds).unlink(missing_ok=True)
    try:
        before = os.umask(0o177)
        try:
            found.bind(place)
        finally:
            os.umask(before)
    except OSError as error:
        found.close()
        raise UserError(f"{place}: cannot be listened at ({error.strerror or error}).") from None
    return found


async def _serve(asked: argparse.Namespace, listening: socket.socket) -> int:
    import uvicorn

    from agentopt.serving.engines.torch_engine._app import EngineApp
    from agentopt.serving.engines.torch_engine._worker import Worker

    worker: Worker = await asyncio.to_thread(_load, asked)
    try:
        app = EngineApp(
            worker, asked.served_model_name, token=os.environ.get(TOKEN) or None, adapters=asked.enable_lora
        )
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]  # its own types of messages are narrower
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        sys.stderr.write(f"{asked.served_model_name}: ready, {worker.context} tokens\n")
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn ends in order and then raises the signal again: that is no failure.
            signal.signal(number, _pass)
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        await asyncio.to_thread(worker.close)
    return 0


def _pass(number: int, frame: object) -> None:
    """A signal that was obeyed already."""


def _load(asked: argparse.Namespace) -> Any:
    from agentopt.serving.engines.torch_engine._slots import Slots
    from agentopt.serving.engines.torch_engine._worker import Worker
    from agentopt.weights import load

    model, tokenizer = load.model(asked.model, dtype=asked.dtype, device=asked.device)
    if asked.chat_template is not None:
        try:
            tokenizer.chat_template = asked.chat_template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--chat-template {asked.chat_template}: cannot be read ({error}).") from None
    about = model.config.get_text_config(decoder=True)
    window = getattr(about, "max_position_embeddings", None) or _WINDOW
    context = asked.max_model_len or int(window)
    if not 1 < context <= int(window):
        raise UserError(f"--max-model-len: found {context}, expected 2 to the model's {window}.")
    if asked.max_num_seqs < 1:
        raise UserError(f"--max-num-seqs: found {asked.max_num_seqs}, expected at least 1.")
    if asked.chunked_prefill_size is not None and asked.chunked_prefill_size < 1:
        raise UserError(f"--chunked-prefill-size: found {asked.chunked_prefill_size}, expected at least 1.")
    slots = Slots(model, most=asked.max_loras, rank=asked.max_lora_rank)
    return Worker(model, tokenizer, slots, most=asked.max_num_seqs, context=context, part=asked.chunked_prefill_size)


if __name__ == "__main__":
    sys.exit(main())
