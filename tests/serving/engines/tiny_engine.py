"""A double of an engine that misbehaves as it is told, in the standard library alone, so that it starts at once.

python tiny_engine.py --uds PATH | --host H --port N [--does BEHAVIOUR] [--pids FILE]
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import time

TOKEN = os.environ.get("AGENTOPT_ENGINE_TOKEN", "")
SLEEP = [
    sys.executable,
    "-I",
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": {"message": "no"}})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "tiny", "max_model_len": 77}]})
        else:
            self.answer(404, {})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "socket"

    def log_message(self, format: str, *_: object) -> None:
        pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class UnixServer(Server):
    address_family = socket.AF_UNIX


def main() -> None:
    parser = argparse.ArgumentParser(prog="tiny_engine")
    parser.add_argument("--uds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--does", default="well")
    parser.add_argument("--pids")
    told = parser.parse_args()
    if told.does == "ignores_term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if told.does == "never_ready":
        time.sleep(600)
    if told.does == "raises":
        raise ValueError("the weights are of another model")
    if told.does == "leaks":
        print(f"my token is {TOKEN}", flush=True)
    if told.does == "talks":
        for number in range(4000):
            print(f"line {number} {'x' * 60}", flush=True)
    pids = [os.getpid()]
    if told.does == "has_children":
        pids.append(subprocess.Popen(SLEEP).pid)
        pids.append(subprocess.Popen(SLEEP, start_new_session=True).pid)
    if told.pids:
        with open(told.pids + ".new", "w", encoding="utf-8") as file:
            json.dump(pids, file)
        os.replace(told.pids + ".new", told.pids)
    print("loading weights 50%", flush=True)
    server = UnixServer(told.uds, Handler) if told.uds else Server((told.host, told.port), Handler)
    server.serve_forever()


if __name__ == "__main__":
    main()
