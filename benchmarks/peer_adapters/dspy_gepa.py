"""dspy 3.4.1 `dspy.GEPA`: the same algorithm through DSPy, with its defaults (merge on, minibatch of 3).

The program is one `dspy.Predict("case -> answer")`; the metric returns score and feedback. Eight threads. DSPy's own
cache is on. It has a candidate as gepa has (see `gepa_`).
"""

from __future__ import annotations

import logging
from typing import Any

import dspy
from _peer_world import START, World
from _worker import THREADS, Job, Watch, work

logging.disable(logging.WARNING)


class _Best:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_valset_evaluated(self, event: Any) -> None:
        if event["is_best_program"]:
            self._watch.has(next(iter(event["candidate"].values())))


def models(job: Job) -> tuple[dspy.LM, dspy.LM]:
    server = {"api_base": job.url, "api_key": "none"}
    return dspy.LM(f"openai/task.{job.run}", **server), dspy.LM(f"openai/proposer.{job.run}", **server)


def run(job: Job, world: World, watch: Watch) -> None:
    def rows(part: Any) -> list[dspy.Example]:
        return [dspy.Example(case=row.case, answer=row.answer).with_inputs("case") for row in part]

    def metric(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        score, feedback = world.judge(gold.case, pred.answer)
        return dspy.Prediction(score=score, feedback=feedback)

    task, proposer = models(job)
    optimizer = dspy.GEPA(
        metric=metric,
        max_metric_calls=job.cap,
        reflection_lm=proposer,
        num_threads=THREADS,
        seed=job.seed,
        gepa_kwargs={"stop_callbacks": lambda _: watch.done, "callbacks": [_Best(watch)]},
    )
    with dspy.context(lm=task):
        optimizer.compile(
            dspy.Predict(dspy.Signature("case -> answer", START)),
            trainset=rows(world.train),
            valset=rows(world.validation),
        )


if __name__ == "__main__":
    work(run)
