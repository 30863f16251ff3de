"""Make the recordings in this folder: run the agent with the embedded model and save each run as a trace.

`python traces/ticket_triage/record.py` writes recordings/NAME.trace.jsonl; nothing else is touched.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from triage import triage  # the file beside this one

import agentopt as ao

HERE = Path(__file__).parent
TICKETS = ("T001", "T004", "T009", "T017")


async def main() -> None:
    """Record the chosen training tickets, one file each."""
    ao.configure(models={"agent": "embedded/smollm2-135m-instruct"})
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    (HERE / "recordings").mkdir(exist_ok=True)
    for row in rows:
        if row["id"] not in TICKETS:
            continue
        with ao.record(name=row["id"]) as recording:
            await triage(row["ticket"])
        recording.trace.save(HERE / "recordings" / f"{row['id']}.trace.jsonl")
        print(f"{row['id']}: {len(recording.trace)} ops, queue {recording.trace.output}")


if __name__ == "__main__":
    asyncio.run(main())
