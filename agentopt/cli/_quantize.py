"""`agentopt quantize`: one command for weights of a byte each, archives of weights, and what is in them.

Progress and remarks go to stderr, the result to stdout. Ctrl-C ends a quantization at once; every complete file is
kept and the same command goes on.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.text import Text

from agentopt.cli._console import err, out
from agentopt.cli._quantize_live import LiveQuantize
from agentopt.cli._quantize_settings import QuantizeSettings, settings_of

if TYPE_CHECKING:
    from agentopt.weights.gg import QuantizeResult


def quantize_command(
    values: Mapping[str, Any], *, tensors: bool, config: str | None, as_json: bool, quiet: bool
) -> int:
    """Do what the options say; returns the exit code."""
    from agentopt.cli._quantize_archive import archive_command

    settings = settings_of(values, config)
    live = LiveQuantize(quiet=quiet or as_json)
    seen: list[int] = []
    try:
        with live, _noted_interrupts(seen):
            if settings.job in ("pack", "unpack", "verify"):
                return archive_command(settings, live, tensors=tensors, as_json=as_json)
            result = _result(settings, live)
            report = _report(settings, result, live)
    except (KeyboardInterrupt, Exception) as error:
        if not seen and not isinstance(error, KeyboardInterrupt):
            raise
        err().print(Text(f"agentopt: interrupted; {_how_to_go_on(settings)}"), soft_wrap=True)
        sys.exit(130)
    if as_json:
        print(json.dumps(_as_json(result, report), ensure_ascii=False, indent=2))
    else:
        from agentopt.cli._quantize_print import print_quantized

        print_quantized(result, out(), report=report, tensors=tensors)
    return 0


@contextmanager
def _noted_interrupts(seen: list[int]) -> Generator[None]:
    """Ctrl-C as ever, and noted: inside torch's reading of tensors it may come out as another error."""
    taken = signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # ignored, in the background
    if taken or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _result(settings: QuantizeSettings, live: LiveQuantize) -> QuantizeResult:
    """Of a new folder, or of the one that is shown."""
    if settings.job == "show":
        from agentopt.cli._quantize_saved import saved_result

        return saved_result(settings.model)
    from agentopt.weights.gg import quantize

    return quantize(settings.model, settings.out, settings.format, options=settings.options, on_event=live)


def _report(settings: QuantizeSettings, result: QuantizeResult, live: LiveQuantize) -> Path | None:
    """The page, when one is wanted."""
    if settings.report is None:
        return None
    from agentopt.observe import write_quantize_report

    live.show("writing the report")
    made = this_command() if settings.job == "quantize" else ""
    return write_quantize_report(result, settings.report, command=made)


def _as_json(result: QuantizeResult, report: Path | None) -> dict[str, Any]:
    from agentopt.observe._quantize_summary import gpu_bytes

    before, after = gpu_bytes(result)
    return {
        **result.to_dict(),
        "gpu_bytes": {"before": before, "after": after},
        "report": None if report is None else str(report),
    }


def this_command() -> str:
    """What was typed, to be copied."""
    return shlex.join(["agentopt", *sys.argv[1:]])


def _how_to_go_on(settings: QuantizeSettings) -> str:
    if settings.job in ("show", "verify"):
        return "nothing was changed"
    out = Path(settings.out)
    if settings.job == "quantize" and out.with_name(f"{out.name}.partial").exists():
        return f"every complete file is kept; go on with the same command: {this_command()}"
    return "nothing was written; start again with the same command"
