"""trace-opt 0.1.3.8: `OptoPrime` on one trainable instruction, one example a step, best of validation.

The loop of its BigBench-hard example: an answer that is right needs no step; a wrong one gives feedback, one backward
and one step, and every new prompt is evaluated on the validation set; the best of them is what is kept at the end. The
next step starts from the newest prompt, as there. OptoPrime's defaults (no memory), its own litellm client.
Validation runs on eight threads. It has a candidate when that candidate's validation mean is the best so far.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

import litellm
from _peer_world import START, World
from _worker import THREADS, Job, Watch, work
from opto.optimizers import OptoPrime
from opto.trace import bundle, node
from opto.utils.llm import LiteLLM


def run(job: Job, world: World, watch: Watch) -> None:
    os.environ["OPENAI_API_BASE"] = os.environ["OPENAI_BASE_URL"] = job.url

    def ask(instruction: str, case: str) -> str:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": case}]
        reply = litellm.completion(model=f"openai/task.{job.run}", messages=messages)
        return reply.choices[0].message.content

    @bundle()
    def solve(instruction: str, case: str) -> str:
        """Answer the case with a language model that follows the instruction."""
        return ask(instruction, case)

    instruction = node(START, name="instruction", trainable=True)
    optimizer = OptoPrime([instruction], llm=LiteLLM(model=f"openai/proposer.{job.run}"))

    def validate() -> float:
        text = instruction.data
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            return fmean(pool.map(lambda row: world.judge(row.case, ask(text, row.case))[0], world.validation))

    best = validate()
    watch.has(START)
    rng = random.Random(job.seed)
    while True:
        for row in rng.sample(world.train, len(world.train)):
            answer = solve(instruction, row.case)
            score, feedback = world.judge(row.case, answer.data)
            if score == 1.0:
                continue
            optimizer.zero_feedback()
            optimizer.backward(answer, feedback)
            optimizer.step()
            score = validate()
            if score > best:
                best = score
                watch.has(instruction.data)
            watch.check()
        watch.check()


if __name__ == "__main__":
    work(run)
