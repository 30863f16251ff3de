"""agentopt: `ao.tune` as a user calls it, with the driver and optimizer that `peers.py` names (`--driver auto` first).

Same rows for training and validation, no test set, the cap as rollout budget, a fresh store (LM cache on, as always),
eight rollouts at a time. It has a candidate when that candidate was accepted with all validation rows and leads the
pool (`CandidateAccepted`), which is what the run would return.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from _peer_world import START, Row, World
from _worker import THREADS, Job, Reached, Watch, work

import agentopt as ao
from agentopt.store import Store

instruction = ao.prompt(START, name="instruction")


@ao.agent
async def solve(case: str) -> str:
    """Give the tag of a shipping case."""
    reply = await ao.lm("agent").complete(system=instruction, user=case)
    return reply.text


def _rows(part: list[Row]) -> list[dict[str, str]]:
    return [{"case": row.case, "expected": row.answer} for row in part]


def run(job: Job, world: World, watch: Watch) -> None:
    def metric(output: str, expected: str, example: Any) -> tuple[float, str]:
        return world.judge(example.inputs["case"], output)

    server = f"openai-compatible:{job.url}"
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "peers.db") as store:
        best = -1.0
        run_id = ""

        def on_event(event: Any) -> None:
            nonlocal best, run_id
            kind = event.kind
            if kind == "run_started":
                run_id = event.run_id
            elif kind == "baseline_done":
                best = event.mean
                watch.has(START)
            elif kind == "candidate_accepted" and event.validation > best:
                best = event.validation
                found = store.candidates(run_id)[event.candidate]
                watch.has(str(found["values"].get("instruction", START)))
            elif kind == "spend" and watch.over:
                raise Reached
            if watch.reached:
                raise Reached

        ao.tune(
            solve,
            train=_rows(world.train),
            val=_rows(world.validation),
            metric=metric,
            optimizer=job.options.get("optimizer", "auto"),
            driver=job.options.get("driver", "auto"),
            budget=ao.Budget(rollouts=job.cap),
            seed=job.seed,
            models={"agent": f"{server}#task.{job.run}", "optimizer": f"{server}#proposer.{job.run}"},
            options=ao.TuneOptions(concurrency=THREADS),
            store=store,
            on_event=on_event,
        )


if __name__ == "__main__":
    work(run)
