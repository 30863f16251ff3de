"""gepa 0.1.4: `gepa.optimize` with its default adapter, models through its own litellm client, all defaults.

Defaults: Pareto selection, minibatch of 3, strict improvement, full validation of what passes, no merge. Threads: 8
(its default is 10). It has a candidate when that candidate has been evaluated on the whole validation set and is gepa's
own best, the one that `GEPAResult.best_candidate` would be (`on_valset_evaluated` with `is_best_program`).
"""

from __future__ import annotations

from typing import Any

import gepa
from _peer_world import START, World
from _worker import THREADS, Job, Watch, work
from gepa.adapters.default_adapter.default_adapter import DefaultAdapter, EvaluationResult


class _Quiet:
    def log(self, message: str) -> None:
        pass


class _Best:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_valset_evaluated(self, event: Any) -> None:
        if event["is_best_program"]:
            self._watch.has(event["candidate"]["instruction"])


def run(job: Job, world: World, watch: Watch) -> None:
    def rows(part: Any) -> list[dict[str, Any]]:
        return [{"input": row.case, "additional_context": {}, "answer": row.answer} for row in part]

    def evaluator(data: Any, response: str) -> EvaluationResult:
        return EvaluationResult(*world.judge(data["input"], response))

    server = {"api_base": job.url, "api_key": "none"}
    gepa.optimize(
        seed_candidate={"instruction": START},
        trainset=rows(world.train),
        valset=rows(world.validation),
        adapter=DefaultAdapter(
            model=f"openai/task.{job.run}",
            evaluator=evaluator,
            max_litellm_workers=THREADS,
            litellm_batch_completion_kwargs=server,
        ),
        reflection_lm=f"openai/proposer.{job.run}",
        reflection_lm_kwargs=server,
        stop_callbacks=lambda _: watch.done,
        callbacks=[_Best(watch)],
        logger=_Quiet(),
        seed=job.seed,
    )


if __name__ == "__main__":
    work(run)
