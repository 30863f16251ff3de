"""A double of an engine that misbehaves as it is told, in the standard library alone, so that it starts at once.

python tiny_engine.py --uds PATH | --host H --port N [--does BEHAVIOUR] [--pids FILE] [--sick FILE] [--stuck FILE]
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


HELPER = """
import signal, sys, time
def clean_up(number, frame):
    time.sleep(0.1)
    print("helper cleaned up", file=sys.stderr, flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, clean_up)
print("prepared", flush=True)
time.sleep(600)
"""
sick = ""
"""While this file exists its health is bad; one that says "once" is removed by the first bad answer."""


stuck = ""
"""While this file exists it writes no token; one that says "busy" lets its counters grow all the same."""
bad: list[bool] = []
tokens: list[int] = []


def health() -> tuple[int, object]:
    try:
        with open(sick, encoding="utf-8") as file:
            once = file.read() == "once"
    except OSError:
        if bad:
            bad.clear()
            print("well again", flush=True)
        return 200, {}
    bad.append(True)
    if once:
        os.remove(sick)
    return 503, {}


def stuck_on() -> str | None:
    try:
        with open(stuck, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return None


def end_in_order(number: int, frame: object) -> None:
    print("ended in order", flush=True)
    os._exit(0)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(*health())
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": {"message": "no"}})
        elif self.path == "/metrics":
            if stuck_on() == "busy":
                tokens.append(1)
            while stuck_on() == "silent":
                time.sleep(0.02)
            self.answer(200, "counted", text=f"# of tiny\ntokens_total {len(tokens)}\nlooks_total {time.time()}\n")
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "tiny", "max_model_len": 77}]})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        print("asked for a token", flush=True)
        while stuck_on() is not None:
            time.sleep(0.02)
        tokens.append(1)
        self.answer(200, {})

    def answer(self, status: int, body: object, text: str | None = None) -> None:
        data = (json.dumps(body) if text is None else text).encode()
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


def children(does: str) -> list[int]:
    if does == "has_children":
        return [subprocess.Popen(SLEEP).pid, subprocess.Popen(SLEEP, start_new_session=True).pid]
    if does == "orderly":
        return [subprocess.Popen(["sleep", "600"]).pid]
    if does == "has_helper":
        helper = subprocess.Popen([sys.executable, "-I", "-S", "-c", HELPER], stdout=subprocess.PIPE)
        assert helper.stdout is not None
        helper.stdout.readline()
        return [helper.pid]
    return []


def main() -> None:
    global sick, stuck
    parser = argparse.ArgumentParser(prog="tiny_engine")
    parser.add_argument("--uds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--does", default="well")
    parser.add_argument("--pids")
    parser.add_argument("--sick", default="")
    parser.add_argument("--stuck", default="")
    parser.add_argument("--fails-while", default="")
    told = parser.parse_args()
    if os.path.exists(told.fails_while):
        parser.error("argument --colour: expected one argument")
    sick, stuck = told.sick, told.stuck
    if told.does == "ignores_term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if told.does == "orderly":
        signal.signal(signal.SIGTERM, end_in_order)
    if told.does == "never_ready":
        time.sleep(600)
    if told.does == "raises":
        raise ValueError("the weights are of another model")
    if told.does == "talks":
        for number in range(4000):
            print(f"line {number} {'x' * 60}")
        print(f"my token is {TOKEN}", flush=True)
    pids = [os.getpid(), *children(told.does)]
    if told.pids:
        with open(told.pids + ".new", "w", encoding="utf-8") as file:
            json.dump(pids, file)
        os.replace(told.pids + ".new", told.pids)
    print("loading weights 50%", flush=True)
    server = UnixServer(told.uds, Handler) if told.uds else Server((told.host, told.port), Handler)
    server.serve_forever()


if __name__ == "__main__":
    main()
