"""A small run in a process of its own, for the kill tests: `python resumable.py DB LOG RUN_ID DRIVER [KILL_AFTER]`.

Every reply that the counting models give is appended to LOG as `role key`, flushed at once: those are the paid calls.
With KILL_AFTER the process kills itself with SIGKILL when that many calls were paid. Prints the final candidate's hash.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import agentopt.graph as graph
from agentopt.evaluation import Dataset, Example, load_program
from agentopt.graph import SetText
from agentopt.models import LM, FunctionLM, LMOptions, ModelsConfig, Request, lm
from agentopt.models import LMSettings as Settings
from agentopt.optimizers import ProposeContext, Update
from agentopt.search import Budget, TuneOptions, tune_program
from agentopt.store import Store

instruction = graph.prompt("Say yes or no: {text}", name="resumable.instruction")
NAMES = ("agent", "optimizer")


@graph.agent
async def program(text: str) -> str:
    reply = await lm("agent").complete(user=instruction.format(text=text), options=LMOptions(temperature=0.0))
    return reply.text


class Writer:
    """Asks its model for a few texts; a pure function of the context."""

    name = "writer"

    async def propose(self, context: ProposeContext) -> list[Update]:
        model = context.lm
        if not isinstance(model, LM):
            raise TypeError("no model")
        updates: list[Update] = []
        for place in range(min(3, context.count)):
            reply = await model.complete(user=f"{context.iteration} {context.parent.hash} {place}")
            updates.append(Update((SetText("resumable.instruction", f"{reply.text} {{text}}"),), source="writer"))
        return updates


def number(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


class Counting:
    """Pure functions of the request that log every call."""

    def __init__(self, log: Path, kill_after: int | None) -> None:
        self.log = log
        self.kill_after = kill_after
        self.paid = 0

    def _pay(self, role: str, request: Request) -> None:
        self.paid += 1
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{role} {request.key()}\n")
            file.flush()
            os.fsync(file.fileno())
        if self.kill_after is not None and self.paid >= self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    async def agent(self, request: Request) -> str:
        await asyncio.sleep(0)
        prompt = str(request.messages[-1]["content"])
        self._pay("agent", request)
        skill = 0.35 + 0.5 * number(prompt.split("item")[0])
        return "yes" if (number(prompt) < skill) == (int(prompt.split()[-1]) % 2 == 0) else "no"

    async def optimizer(self, request: Request) -> str:
        self._pay("optimizer", request)
        return f"Words {hashlib.sha256(request.key().encode()).hexdigest()[:6]}"


def data(name: str, count: int) -> Dataset:
    items = (Example(inputs={"text": f"item {name} {i}"}, expected="yes" if i % 2 == 0 else "no") for i in range(count))
    return Dataset(name, items)


async def main(db: str, log: Path, run_id: str, driver: str, kill_after: int | None) -> dict[str, Any]:
    counting = Counting(log, kill_after)
    with Store.open(db) as store:
        models = ModelsConfig(
            {
                "agent": FunctionLM(counting.agent, name="counting-agent"),
                "optimizer": FunctionLM(counting.optimizer, name="counting-optimizer"),
            },
            Settings(cache=store),
        )
        known = store.run(run_id) is not None
        result = await tune_program(
            load_program(program),
            data("train", 24),
            data("validation", 20),
            data("test", 30),
            "exact_match",
            optimizer=Writer(),
            driver=driver,
            budget=Budget(rollouts=330),
            seed=1,
            store=store,
            run_id=None if known else run_id,
            resume=run_id if known else None,
            models=models,
            options=TuneOptions(screen_size=8, concurrency=4),
        )
        events = [event.kind for event in store.events(run_id)]
    return {"best": result.best.hash, "claim": result.claim.to_dict(), "events": events, "stop": result.stop_reason}


if __name__ == "__main__":
    stop_after = int(sys.argv[5]) if len(sys.argv) > 5 else None
    print(json.dumps(asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], stop_after))))
