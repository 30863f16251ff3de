"""Memory: how much was needed, and one sentence that says what would fit when it was not there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from agentopt.errors import RunError
from agentopt.weights.finetuning._options import FinetuneOptions
from agentopt.weights.load import need

_GIB = 2**30
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B|\d+ bytes)")


def peak_memory(device: Any) -> int:
    """Peak bytes of this process: on the GPU where the model is there, else resident in main memory."""
    if str(device).startswith("cuda"):
        return int(need("torch").cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available(device: Any) -> int | None:
    """Bytes that are free now; None where the system does not say."""
    if str(device).startswith("cuda"):
        return int(need("torch").cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found.split()[1]) * 1024


def check_room(options: FinetuneOptions, device: Any, *, trained: int, weight_bytes: int) -> None:
    """Refuse what cannot fit before the system ends the process for it: gradients and two moments per trained weight.

    Raises:
        RunError: less memory is free than that.
    """
    free = available(device)
    needed = 12 * trained if options.first_order else 0
    if free is None or needed <= free:
        return
    advice = what_fits(options, doing="training", weight_bytes=weight_bytes, longest=0)
    raise RunError(
        f"--method {options.method} needs {size(needed)} for gradients and moments beside the weights and {size(free)} "
        f"are free: {advice}."
    )


def size(number: float) -> str:
    """Bytes as a person reads them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}" if number < 100 * limit else f"{number / limit:.0f} {unit}"
    return f"{number:.0f} B"


@contextlib.contextmanager
def explained(doing: str, options: FinetuneOptions, *, weight_bytes: int = 0, longest: int = 0) -> Generator[None]:
    """Out of memory, on the GPU or the CPU, becomes a RunError that says what would fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        asked = _ASKED.search(str(error))
        needed = f" ({asked[1]} more were asked for)" if asked else ""
        advice = what_fits(options, doing=doing, weight_bytes=weight_bytes, longest=longest)
        raise RunError(
            f"out of memory while {doing}{needed}: {advice}. The log and the last good weights are kept."
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "not enough memory" in text
        or "can't allocate memory" in text
    )


def what_fits(options: FinetuneOptions, *, doing: str, weight_bytes: int, longest: int) -> str:
    """The changes that lower the peak, the one that costs least first."""
    advice: list[str] = []
    micro = options.micro_batch or options.batch
    if options.first_order:
        advice.append("a zeroth-order --method (it keeps no activations, gradients or moments)")
    if doing != "loading the model":
        if micro > 1:
            advice.append(f"--micro-batch {micro // 2}")
        if longest > 16:
            advice.append(f"--max-tokens {max(16, longest // 2)} (the longest row has {longest})")
    if options.weights == "full":
        advice.append("--tune lora")
    if options.quantize_base is None:
        quarter = f" (weights of about {size(weight_bytes / 4)}, not {size(weight_bytes)})" if weight_bytes else ""
        with_lora = "--tune lora --quantize-base int8" if options.weights == "full" else "--quantize-base int8"
        advice.append(f"{with_lora}{quarter}")
    if options.dtype == "float32" and not options.first_order:
        advice.append("--dtype bfloat16")
    return f"what needs less: {'; '.join(advice)}" if advice else "give a smaller model or a machine with more memory"
