"""An agent for a web shop's support desk: which queue gets the ticket, and how soon must someone answer?

Three steps: a language model chooses the queue, a tool looks up the order that the ticket names, and plain code sets
the priority. `agentopt tune` may change what the first step says to the model, and how it reads the answer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import agentopt as ao

LABELS = ("billing", "shipping", "technical", "account")

# Deliberately the first thing that comes to mind: tuning starts from here.
instruction = ao.prompt("Route the ticket.", name="triage.instruction")
examples = ao.demos(name="triage.examples", max_items=8)
cue = ao.prompt("", name="triage.cue")  # the first words of the answer, written for the model; none to start with
# How the queues' probabilities are read: as they are, or divided by what the prompt gives to an empty ticket.
calibrate = ao.choice(["none", "content_free"], name="triage.calibrate")

_ORDERS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("orders.json").read_text(encoding="utf-8"))
_ORDER_ID = re.compile(r"\bOM-\d{5}\b")
_URGENT = re.compile(
    r"\b(urgent\w*|immediately|at once|today|tomorrow|hacked|smoke|stuck|alarm|afraid|outside|hospital|pharmacy)\b",
    re.IGNORECASE,
)
_QUESTION = re.compile(r"\b(can i|could|do you|does|is there|how do i|where do i|asks|which)\b", re.IGNORECASE)


@ao.step
async def choose_queue(ticket: str) -> str:
    """Let the model pick one of the queues."""
    turns = [{"role": "user", "content": ticket}]
    if beginning := cue.value:
        turns.append({"role": "assistant", "content": beginning})
    # Only the embedded model knows this option, so it is sent only when it is on.
    options = ao.LMOptions() if calibrate.value == "none" else ao.LMOptions(extra={"calibrate": calibrate.value})
    reply = await ao.lm("agent").complete(turns, system=instruction, demos=examples, choices=LABELS, options=options)
    return reply.text


@ao.tool
def lookup_order(order_id: str) -> dict[str, Any]:
    """Product, status and total of an order, e.g. OM-10112."""
    order = _ORDERS.get(order_id)
    return {"found": False} if order is None else {"found": True, **order}


@ao.step
def set_priority(ticket: str, order: dict[str, Any] | None) -> str:
    """urgent, normal or low, by rules that the desk can read and change."""
    if _URGENT.search(ticket):
        return "urgent"
    if order is not None and order["found"]:
        return "normal"  # something about a real order: never low
    return "low" if len(ticket.split()) < 30 and _QUESTION.search(ticket) else "normal"


@ao.agent
async def triage(ticket: str) -> dict[str, Any]:
    """Route one ticket: its queue, priority and the order it is about (None when it names none)."""
    queue = await choose_queue(ticket)
    named = _ORDER_ID.search(ticket)
    order = lookup_order(named.group()) if named else None
    return {
        "queue": queue,
        "priority": set_priority(ticket, order),
        "order_id": named.group() if named else None,
        "order": order,
    }
