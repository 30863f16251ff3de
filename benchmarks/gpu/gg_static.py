"""What the compiler makes of the byte kernels: registers, spills and instructions per weight. Nothing is timed.

    python benchmarks/gpu/gg_static.py [--capability 80 90 100]

Needs Triton, which brings ptxas and nvdisasm, and no GPU. `per weight` counts the instructions of the innermost loop of
the kernel over the weights that a thread decodes in it: all of them, and those on the integer unit, which takes half a
warp per cycle and quarter of a multiprocessor. `bound` is what these two rates and the memory allow of an H100 SXM
(3.35 TB/s, 132 multiprocessors, 1.755 GHz) as a share of its bandwidth; it is a model, no measurement.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

FORMATS = ("rf8", "e3m4", "rf8-gg")
BYTES_PER_CLOCK = 3.35e12 / 132 / 1.755e9
"""Of a multiprocessor at full bandwidth: one weight each."""

INTEGER = {"LOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "ISETP", "SEL", "SGXT", "VIADDMNMX", "PLOP3", "BFE", "I2F"}
GATHER_PASSES = 3.3
"""Of shared memory for a warp's gather from eight books: the fullest of 32 banks, in a simulation with normal weights.
From one book it is 2.6."""


@dataclass
class Compiled:
    """A kernel as compiled for one GPU.

    Attributes:
        loop: instructions of the loop that decodes, by name without suffixes.
        weights: decoded by a thread in one pass of it.
    """

    name: str
    capability: int
    registers: int
    shared: int
    spilled: int
    sass: str
    ptx: str
    weights: float
    loop: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def per_weight(self) -> float:
        """Instructions."""
        return self.loop.total() / self.weights

    @property
    def integer(self) -> float:
        """Instructions per weight on the integer unit."""
        return sum(self.loop[name] for name in INTEGER) / self.weights

    @property
    def bound(self) -> float:
        """Share of an H100's bandwidth at which the first of its units is full."""
        issue = self.per_weight / 128
        whole = self.integer / 64
        shared = self.loop["LDS"] / self.weights / 32 * (GATHER_PASSES if "rf8-gg" in self.name else 1)
        return min(1.0, 1 / (BYTES_PER_CLOCK * max(issue, whole, shared)))


@dataclass(frozen=True)
class Variant:
    """A kernel as `linear` or `decode` launches it; `weights` are those of a thread in one step."""

    name: str
    kernel: str
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int = 4
    weights: float = 1.0
    aligned: bool = True


def variants() -> Iterator[Variant]:
    """Everything that `linear` and `decode` launch: in bfloat16, and some in float16, in float32 and in odd shapes."""
    dispatch = importlib.import_module("agentopt.weights.gg.kernels._dispatch")
    for format in FORMATS:
        for most, config in dispatch.CONFIGS:
            yield _linear(f"{format} M<={most}", format, config)
        constants = {**_of(format), "ROWS": 16, "COLUMNS": 256, "ROUND": False}
        yield Variant(f"{format} decode", "decode_kernel", constants, {"out": "*bf16"})
    for most, config in dispatch.CONFIGS:
        yield _linear(f"rf8 float16 M<={most}", "rf8", config, "*fp16")
    for most, config in dispatch.EXACT_CONFIGS:
        yield _linear(f"rf8 float32 M<={most}", "rf8", config, "*fp32")
    yield _linear("rf8-gg M<=4, odd", "rf8-gg", dispatch.CONFIGS[0][1], odd=True)
    yield Variant("sum of parts", "finish_kernel", {"BIAS": True, "SPLIT": 4, "BLOCK": 512}, {"out": "*bf16"})


def _of(format: str) -> dict[str, Any]:
    code, books = {"rf8": 0, "e3m4": 1, "rf8-gg": 2}[format], format == "rf8-gg"
    return {"FORMAT": code, "GATHER": True, "BOOKS_PADDED": 8 if books else 1, "ONE_BOOK": not books}


def _linear(name: str, format: str, config: Any, x: str = "*bf16", odd: bool = False) -> Variant:
    """Columns shared by two programs; an odd one has them for itself, and masks them."""
    constants = {
        **_of(format),
        "WORDS": x != "*fp32",
        "EXACT": x == "*fp32",
        "BIAS": True,
        "EVEN": not odd,
        "SPLIT": 1 if odd else 2,
        "OUT": config.out,
        "TOKENS": config.tokens,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
    }
    tile = config.out * config.columns
    if config.way == "few":
        constants["PARTS"] = config.parts
        tile *= config.parts
    types = {"x": x, "bias": x, "out": x if odd else "*fp32"}
    return Variant(name, f"{config.way}_kernel", constants, types, config.parts, tile / 32 / config.parts, not odd)


_TYPES = {
    "unit": "fp32",
    "parts": "*fp32",
    "codes": "*u8",
    "scale": "*fp32",
    "table": "*fp32",
    "book_id": "*u8",
    "bias": "*bf16",
}


def build(variant: Variant, capability: int) -> Compiled:
    """Compile one kernel; pointers and, unless it is an odd one, sizes are multiples of 16."""
    triton: Any = importlib.import_module("triton")
    target: Any = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    function: Any = getattr(importlib.import_module("agentopt.weights.gg.kernels._triton"), variant.kernel)
    constants = dict(variant.constants)
    if constants.get("ONE_BOOK"):
        constants["book_id"] = None
    kinds = {**_TYPES, **variant.types}
    names: list[str] = function.arg_names
    signature = {one: "constexpr" if one in constants else kinds.get(one, "i32") for one in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, one in enumerate(names)
        if signature[one].startswith("*") or (variant.aligned and one in ("width", "height", "stride"))
    }
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    made: Any = triton.compile(source, target=target, options={"num_warps": variant.warps})
    registers, spilled, sass = _read(made.asm["cubin"])
    ptx: str = made.asm["ptx"]
    return Compiled(
        variant.name,
        capability,
        registers,
        int(made.metadata.shared),
        spilled,
        sass,
        ptx,
        variant.weights,
        _loop(sass),
    )


def _read(binary: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack and the disassembly."""
    triton: Any = importlib.import_module("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        usage = _output(tools / "cuobjdump", "-res-usage", path)
        sass = _output(tools / "nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no registers: {usage[:200]}")
    return int(found[1]), int(found[2]), sass


def _output(*command: Any) -> str:
    return subprocess.run([str(one) for one in command], capture_output=True, text=True, check=True).stdout


def _loop(sass: str) -> collections.Counter[str]:
    """Instructions of the longest innermost loop."""
    labels: dict[str, int] = {}
    names: list[str] = []
    best: list[str] = []
    for line in sass.splitlines():
        text = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := re.match(r"(\.L_\S+):", text):
            labels[label[1]] = len(names)
        elif word := re.match(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text):
            names.append(word[1])
            back = re.search(r"BRA.*`\((\.L_\S+)\)", text)
            if back and back[1] in labels and len(names) - labels[back[1]] > len(best):
                best = names[labels[back[1]] :]
    return collections.Counter(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    given = parser.parse_args()
    print("| kernel | GPU | registers | spilled | shared | per weight | integer | products | bound |")
    print("|---|---|---|---|---|---|---|---|---|")
    for variant in variants():
        for capability in given.capability:
            found = build(variant, capability)
            loop = found.loop
            products = next((one for one in ("HGMMA", "HMMA", "UTCHMMA") if loop[one]), "-")
            part = (f"{found.per_weight:.1f}", f"{found.integer:.1f}", products, f"{found.bound:.0%}")
            if not any(loop[one] for one in ("HGMMA", "HMMA", "UTCHMMA", "FFMA")):
                part = ("-", "-", "-", "-")
            cells = (found.name, f"sm_{capability}", found.registers, found.spilled, found.shared, *part)
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
