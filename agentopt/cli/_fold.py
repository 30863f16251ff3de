"""`agentopt fold train`: options in, one meta-training run, what a person reads while it goes on and when it is done.

Progress and remarks go to stderr, the result to stdout. Ctrl-C ends the run after the step it is in, with everything
kept; a second Ctrl-C ends it at once, which loses the steps since the last validation.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from agentopt.cli._console import err, out
from agentopt.cli._fold_live import LiveFold
from agentopt.cli._fold_settings import check_free, settings_of
from agentopt.cli._training_live import interruptible
from agentopt.errors import RunError


def train_command(values: Mapping[str, Any], *, resume: bool, config: str | None, as_json: bool, quiet: bool) -> int:
    """Run (or go on with) meta-training; returns the exit code."""
    from agentopt.cli._fold_print import print_training
    from agentopt.cli._fold_run import RESULT, RUN, run_training
    from agentopt.weights.finetuning import Stop

    settings, folder = settings_of(values, resume=resume, config=config)
    report = _finished(folder / RESULT)
    if report is None:
        check_free(folder, mark=RUN, what="run of agentopt fold train")
        stop, live = Stop(), LiveFold(quiet=quiet or as_json)
        try:
            with live, interruptible(stop, live):
                report = run_training(settings, folder, live, stop)
        except KeyboardInterrupt:
            command = f"agentopt fold train --resume --out {shlex.quote(str(folder))}"
            kept = (folder / RUN).exists()
            told = f"what was trained is kept; go on with: {command}" if kept else "nothing was trained yet"
            err().print(Text(f"agentopt: interrupted; {told}"), soft_wrap=True)
            sys.exit(130)
        except RunError as error:
            if "inner learning rate" not in str(error):
                raise
            raise RunError(f"{error} On the command line: a lower --inner-lr, or --rule normalized.") from error
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_training(report, out())
    return 0


def _finished(path: Path) -> dict[str, Any] | None:
    """The result of a run that is done."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
