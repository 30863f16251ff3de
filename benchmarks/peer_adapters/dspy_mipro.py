"""dspy 3.4.1 `MIPROv2(auto="light")`, its default, compiled again on its own best program until the target or the cap.

MIPROv2 writes all its instructions up front from the starting one and shows its proposer no feedback, so one run can
add one rule at most; DSPy's documentation recommends giving the produced program to MIPROv2 again, and so does this
adapter, with a new seed each time. To let the proposer know the rules at all, the training rows carry the metric's
remark as a field `remark`, which its data summary reads. Demonstrations are on (4 + 4), eight threads, DSPy's cache on.
With 40 validation rows every trial is a full evaluation. It has a candidate when a trial's score beats its best.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import dspy
from _peer_world import START, World
from _worker import THREADS, Job, Watch, work

logging.disable(logging.WARNING)


class Watched(dspy.MIPROv2):
    """MIPROv2 that tells of every new best program."""

    watch: Watch

    def _log_normal_eval(self, score: float, best_score: float, *rest: Any) -> None:
        super()._log_normal_eval(score, best_score, *rest)
        program = rest[-2]
        text = program.predictors()[0].signature.instructions
        if score == best_score and score > self.best:
            self.best = score
            self.watch.has(text)
        self.watch.check()


def models(job: Job) -> tuple[dspy.LM, dspy.LM]:
    server = {"api_base": job.url, "api_key": "none"}
    return dspy.LM(f"openai/task.{job.run}", **server), dspy.LM(f"openai/proposer.{job.run}", **server)


def run(job: Job, world: World, watch: Watch) -> None:
    def rows(part: Any) -> list[dspy.Example]:
        return [dspy.Example(case=row.case, answer=row.answer, remark=row.remark).with_inputs("case") for row in part]

    def metric(gold: Any, pred: Any, trace: Any = None) -> float:
        return world.judge(gold.case, pred.answer)[0]

    task, proposer = models(job)
    program: Any = dspy.Predict(dspy.Signature("case -> answer", START))
    best = 0.0
    for again in itertools.count():
        seed = 1000 * (job.seed + 1) + again
        optimizer = Watched(
            metric=metric, prompt_model=proposer, task_model=task, num_threads=THREADS, seed=seed, verbose=False
        )
        optimizer.watch, optimizer.best = watch, best
        with dspy.context(lm=task):
            found = optimizer.compile(program, trainset=rows(world.train), valset=rows(world.validation))
        best = max(best, found.score)
        # A bare copy: the compiled program carries every program that was tried, and the next run would copy them all.
        program = dspy.Predict(found.signature)
        program.demos = found.demos
        watch.check()


if __name__ == "__main__":
    work(run)
