"""The whole way round: a client's session is captured and judged, shown, tuned on, and the result is served."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import openai
import pytest

from agentopt.serving._types import CHAT, Abilities, Address
from agentopt.serving.capture import FeedbackStore, Recorder
from agentopt.serving.fake_engine import Ready
from agentopt.serving.gateway import Gateway, serving
from agentopt.serving.variants import load_candidates
from tests.serving.gateway.kit import Names

Run = Callable[..., subprocess.CompletedProcess[str]]

COLOURS = {"sky": "blue", "sea": "blue", "grass": "green", "leaf": "green", "rose": "red", "blood": "red"}


class Model(BaseHTTPRequestHandler):
    """An engine that knows every colour, and says it only when it is shown or told what an answer looks like."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        *before, last = [str(turn["content"]) for turn in body["messages"] if turn["content"]]
        thing = next((word for word in COLOURS if word in last), "sky")
        told = sum(label in " ".join(before) for label in ("blue", "green", "red"))
        message = {"role": "assistant", "content": COLOURS[thing] if told >= 2 else "What a colourful thing!"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        reply = {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


async def traffic(port: int, recorder: Recorder, days: int) -> None:
    """A client's afternoon: sessions of two questions, the right answer given as feedback to each reply."""
    names = Names()
    names.choices = {"desk": names.choices["fake"]}
    sink = FeedbackStore(recorder)
    ready = Ready(Address(port=port), Abilities(routes=frozenset({CHAT}), model="m"))
    recorder.start()
    gateway = Gateway(ready, names, observers=[recorder], feedback=sink)
    async with serving(gateway) as server:
        url = f"http://127.0.0.1:{server.port}"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            for day in range(days):
                for thing in list(COLOURS)[day % 3 * 2 :][:2]:
                    ask = client.with_options(default_headers={"X-Agentopt-Session": f"day-{day}"})
                    question = f"The {thing} of day {day}, asks someone@example.com"
                    turns: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
                    raw = await ask.chat.completions.with_raw_response.create(model="desk", messages=turns)
                    request = raw.headers["x-request-id"]
                    said = {"request_id": request, "score": "down", "expected": COLOURS[thing]}
                    given = await client.post(
                        raw.headers["x-agentopt-feedback"].removeprefix("/v1"), cast_to=object, body=said
                    )
                    assert given
    gateway.close()
    assert await recorder.aclose() == 0


@pytest.mark.slow
def test_a_captured_session_is_shown_tuned_on_and_served(agentopt: Run, project: Path, engine: int) -> None:
    about = {"base_url": "http://localhost:9/v1"}
    recorder = Recorder(project / ".agentopt" / "agentopt.db", model="desk", about=about)
    anyio.run(traffic, engine, recorder, 30)

    listed = agentopt("runs", "ls")
    assert recorder.run_id in listed.stdout and "serve desk" in listed.stdout and "done" in listed.stdout
    shown = agentopt("runs", "show", recorder.run_id)
    assert shown.returncode == 0, shown.stderr
    assert "exchanges captured: 60, dropped: 0; pieces of feedback: 60" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    # On the model that was served: without it the default one would be tuned.
    assert "--metric f1 \\\n  --model 'agent=openai-compatible:http://localhost:9/v1#desk'" in shown.stdout
    trace = next(line.split()[-1] for line in shown.stdout.splitlines() if line.startswith("agentopt trace show"))
    tree = agentopt("trace", "show", trace)
    assert tree.returncode == 0, tree.stderr
    assert "2 LM calls, 22 tokens" in tree.stdout and "session" in tree.stdout and "What a colourful" in tree.stdout
    call = agentopt("trace", "show", trace, "--op", "0").stdout
    assert "[email]" in call and "someone@" not in call and "Be kind." in call and "req_" in call
    for command in ("resume", "diff"):
        refused = agentopt("runs", command, recorder.run_id)
        assert refused.returncode == 2 and "traffic of a server" in refused.stderr

    url = f"openai-compatible:http://127.0.0.1:{engine}/v1#m"
    tuned = agentopt(
        *("tune", "agentopt.serving.chat:reply", "--train", "captured:desk", "--metric", "exact_match"),
        *("--model", f"agent={url}", "--budget", "rollouts=160", "--freeze", "served.cue", "--json"),
    )
    assert tuned.returncode == 0, tuned.stderr
    result = json.loads(tuned.stdout)
    assert result["validation"]["baseline"] == 0.0 and result["validation"]["best"] == 1.0
    best = project / ".agentopt" / "runs" / result["run_id"] / "best.json"

    (model,) = load_candidates([f"desk={best}"], warn=pytest.fail)
    variant = model.variants[0]
    assert variant.rewrite is not None
    sent = variant.rewrite(CHAT, {"model": "desk", "messages": [{"role": "user", "content": "The rose of day 99"}]})
    with openai.OpenAI(base_url=f"http://127.0.0.1:{engine}/v1", api_key="none") as client:
        done = client.chat.completions.create(model="m", messages=sent["messages"])
    assert done.choices[0].message.content == "red"
