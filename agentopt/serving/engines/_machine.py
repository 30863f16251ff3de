"""What the machine can: memory, cores, 16-bit arithmetic. Read from the system, without torch."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

_BF16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}
"""Flags of processors that multiply bfloat16 in hardware (x86, ARM)."""


def has_gpu() -> bool:
    """Whether a GPU's driver is there (NVIDIA, AMD, or through WSL) and not hidden from us."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()


@cache
def has_bf16() -> bool:
    """Whether the processor computes in bfloat16 itself; elsewhere it is emulated, slower than float32."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return found is not None and bool(_BF16 & set(found[1].split()))


def default_dtype() -> str:
    """bfloat16 where a GPU or the processor computes in it, else float32."""
    return "bfloat16" if has_gpu() or has_bf16() else "float32"


def available_gib() -> float:
    """Memory that is free or can be freed, within the container's bound; 4 where that is not told."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[1]) / (1 << 20)  # type: ignore[index]
    except (OSError, TypeError):
        return 4.0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
    except (OSError, ValueError):  # "max": no bound
        return free
    return min(free, (limit - used) / (1 << 30))
