"""A hub of models on the loopback: one repository, its files given as the Hugging Face hub gives them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NOBODY = "http://127.0.0.1:9"
"""An address at which nobody listens."""
COMMIT = "0123456789012345678901234567890123456789"


class Hub(BaseHTTPRequestHandler):
    """Files of one repository as the hub gives them."""

    files: Mapping[str, bytes]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        owner, _, file = self.path.removeprefix("/").removeprefix("api/models/").partition("/resolve/main/")
        if owner == "broken/model":
            return self.say(503, {}, b"")
        if not owner.startswith("owner/model"):
            return self.say(404, {"X-Error-Code": "RepoNotFound"}, b"")
        content = self.files.get(file)
        if content is None:
            return self.say(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.say(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, content, shown=body)

    def say(self, status: int, headers: dict[str, str], content: bytes, *, shown: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if shown:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Make this process ask the hub at the address."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(cache.parent)


@contextmanager
def hub_of(files: Mapping[str, bytes]) -> Generator[str]:
    """The address of a hub that has `owner/model` with these files; `broken/model` is a 503."""
    handler = type("Handler", (Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
