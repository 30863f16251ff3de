"""textgrad 0.1.8: `TextualGradientDescent` on the system prompt, the loop of its prompt-optimization tutorial.

Batches of 3 shuffled training rows; loss per row by a string function that gives the metric's feedback; summed losses,
one backward, one step; then the tutorial's validation: all 40 rows, and the prompt is put back when the mean fell. The
engine is `ChatExternalClient`, textgrad's way to a local server, with its disk cache. Validation runs on eight threads
(the tutorial uses a pool too); the rows of a batch run one after the other, as there. It has a candidate when the
prompt survived its validation.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

import numpy as np
import textgrad as tg
from _peer_world import START, World
from _worker import THREADS, Job, Watch, work
from openai import OpenAI
from textgrad.autograd.string_based_ops import StringBasedFunction
from textgrad.engine.local_model_openai_api import ChatExternalClient
from textgrad.tasks.base import DataLoader


def run(job: Job, world: World, watch: Watch) -> None:
    client = OpenAI(base_url=job.url, api_key="none")
    task = ChatExternalClient(client=client, model_string=f"task.{job.run}")
    proposer = ChatExternalClient(client=client, model_string=f"proposer.{job.run}")
    tg.set_backward_engine(proposer, override=True)

    def feedback(prediction: tg.Variable, case: tg.Variable) -> str:
        return world.judge(case.value, prediction.value)[1]

    loss = StringBasedFunction(feedback, function_purpose="The feedback on the answer to a case.")
    prompt = tg.Variable(START, requires_grad=True, role_description="system prompt to the language model")
    model = tg.BlackboxLLM(task, system_prompt=prompt)
    optimizer = tg.TextualGradientDescent(engine=proposer, parameters=[prompt])

    def evaluate(row: Any) -> float:
        case = tg.Variable(row.case, requires_grad=False, role_description="query to the language model")
        return world.judge(row.case, model(case).value)[0]

    def validate() -> float:
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            return fmean(pool.map(evaluate, world.validation))

    np.random.seed(job.seed)
    loader = DataLoader(world.train, batch_size=3, shuffle=True)
    loader.data = np.array(world.train, dtype=object)
    best, kept = validate(), START
    watch.has(START)
    while True:
        for batch in loader:
            optimizer.zero_grad()
            losses = []
            for row in batch:
                case = tg.Variable(row.case, requires_grad=False, role_description="query to the language model")
                losses.append(loss(inputs={"prediction": model(case), "case": case}))
            tg.sum(losses).backward()
            optimizer.step()
            score = validate()
            if score < best:
                prompt.set_value(kept)
            else:
                best, kept = score, prompt.value
                watch.has(kept)
            watch.check()


if __name__ == "__main__":
    work(run)
