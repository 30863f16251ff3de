"""The worker of `prepare` with jobs that need no model: what it makes says how often it was made.

The source is a text file in place of the GGUF file's weights; "slow" in it makes the work last until a file appears.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from agentopt.errors import RunError, UserError
from agentopt.serving.engines import prepare_worker as worker


def convert(job: dict[str, Any], out: Path) -> None:
    text = Path(job["source"]).read_bytes().decode("utf-8", "replace")
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(exist_ok=True)
    with (Path(job["source"]).parent / "made").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    worker.say(what="half of it", done=1, total=2)
    if "refused" in text:
        raise UserError("the model is refused.")
    if "broken" in text:
        raise RunError("the disk is full.")
    while "slow" in text and not (Path(job["source"]).parent / "go").exists():
        time.sleep(0.01)
    (partial / "config.json").write_text('{"made": true}', encoding="utf-8")
    os.replace(partial, out)


worker._JOBS.update(convert=convert, quantize=convert)
worker.main()
