"""Programs that Ray workers load by their path; the tests' processes load them too."""

from __future__ import annotations

import os
from pathlib import Path

import agentopt as ao

instruction = ao.prompt("Say yes or no: {text}", name="ray.instruction")


@ao.agent
async def ask(text: str) -> str:
    """One model call; leaves its process id in the folder that the run was started from."""
    Path(f"worker-{os.getpid()}").touch()
    reply = await ao.lm("agent").complete(user=instruction.format(text=text))
    return reply.text


@ao.agent
def shout(text: str) -> str:
    """No model at all."""
    ao.report_usage(tokens=7, usd=0.5)
    return instruction.format(text=text).upper()


@ao.agent
def crash(text: str) -> str:
    """Takes its process down on one example."""
    if "3" in instruction.format(text=text):
        os._exit(1)
    return "yes"


@ao.agent
def client(text: str) -> str:
    """An OpenAI client of its own, which the capture endpoint of the worker sees."""
    import openai

    messages = [{"role": "user", "content": instruction.format(text=text)}]
    reply = openai.OpenAI().chat.completions.create(model="any", messages=messages)  # pyright: ignore[reportArgumentType]
    return reply.choices[0].message.content or ""


def length(output: str, expected: object, example: object) -> tuple[float, str]:
    """A metric by reference."""
    return float(len(output)), "longer is better"
