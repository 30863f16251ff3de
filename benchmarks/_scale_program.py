"""The programs that scale.py runs, loaded by their path in this process and in Ray's workers."""

from __future__ import annotations

import hashlib

import agentopt as ao

instruction = ao.prompt("Answer the customer in one sentence: {ticket}", name="scale.instruction")
WORK = 40_000
"""Hash rounds of `compute`: some 15 ms of pure Python on one core."""


@ao.agent
async def ask(ticket: str) -> str:
    """One model call."""
    reply = await ao.lm("agent").complete(user=instruction.format(ticket=ticket))
    return reply.text


@ao.agent
def compute(ticket: str) -> str:
    """No model, one core's full time."""
    digest = instruction.format(ticket=ticket).encode()
    for _ in range(WORK):
        digest = hashlib.sha256(digest).digest()
    return "ok" if digest else ""
