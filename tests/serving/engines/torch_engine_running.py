"""Our engine over transformers around a tiny random model, listening in this process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.weights.tiny import tiny

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TOKEN = "secret"


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens at a Unix socket."""

    model: Any
    tokenizer: Any
    worker: Any
    path: str

    @contextlib.contextmanager
    def client(self, token: str = TOKEN) -> Generator[openai.OpenAI]:
        """OpenAI's own client."""
        with self.http() as http:
            yield openai.OpenAI(base_url="http://engine/v1", api_key=token, http_client=http, max_retries=0)

    @contextlib.contextmanager
    def http(self) -> Generator[httpx.Client]:
        """Any HTTP."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.path), base_url="http://engine", timeout=60) as found:
            yield found


@contextlib.contextmanager
def running(place: Path, *, most: int = 4, context: int = 64, part: int | None = None) -> Generator[Running]:
    """The server, stopped afterwards."""
    import uvicorn

    from agentopt.serving.engines.torch_engine._app import EngineApp
    from agentopt.serving.engines.torch_engine._slots import Slots
    from agentopt.serving.engines.torch_engine._worker import Worker

    model, tokenizer = tiny()
    tokenizer.chat_template = TEMPLATE
    worker = Worker(model, tokenizer, Slots(model, most=2, rank=8), most=most, context=context, part=part)
    app: Any = EngineApp(worker, "tiny", token=TOKEN, adapters=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / "e.sock"))
        listening.listen()
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Running(model, tokenizer, worker, str(place / "e.sock"))
        finally:
            server.should_exit = True
            thread.join()
            worker.close()
