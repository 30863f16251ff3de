"""Layers of one byte per weight: every code alike in every path, every shape, gradients, and torch's own checks."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import library
from torch.nn import functional

from agentopt.errors import UserError
from agentopt.weights.gg import _tables
from agentopt.weights.gg.kernels import _dispatch, _op, decode, linear, usable
from agentopt.weights.gg.kernels._dispatch import Config
from tests.weights.interpreted import errors_of

ROOT = Path(__file__).parents[4]
FORMATS = ("rf8", "rf8-strict", "e3m4", "rf8-gg")


def table_of(format: str) -> Any:
    if format != "rf8-gg":
        return _tables.table(format)
    return torch.sort(torch.randn(3, 256, generator=torch.Generator().manual_seed(0))).values


def layer(format: str, height: int = 9, width: int = 20) -> tuple[Any, Any, Any, Any]:
    dice = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (height, width), generator=dice, dtype=torch.uint8)
    book_id = torch.arange(height, dtype=torch.uint8).remainder(3)[:, None] if format == "rf8-gg" else None
    return codes, torch.rand(height, 1, generator=dice) + 0.1, table_of(format), book_id


def weight_of(codes: Any, scale: Any, table: Any, book_id: Any) -> Any:
    book = torch.zeros(len(codes), 1, dtype=torch.long) if book_id is None else book_id.long()
    return table[book, codes.long()] * scale


# In Triton's interpreter -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases() -> dict[str, float]:
    """Error of each case over what is allowed."""
    return errors_of("tests.weights.gg.kernels.byte_kernel_cases")


@pytest.mark.parametrize(("part", "count"), [("codes", 60), ("linear", 27), ("edge", 6)])
def test_kernels_give_what_the_reference_gives(cases: dict[str, float], part: str, count: int) -> None:
    found = {name: error for name, error in cases.items() if name.startswith(part)}
    assert len(found) == count
    assert {name: error for name, error in found.items() if not error <= 1} == {}


# The words of four codes, run as a GPU would ----------------------------------------------------------------------


def _prmt(a: int, b: int, select: int) -> int:
    pool = (a | b << 32).to_bytes(8, "little")
    found = 0
    for place in range(4):
        nibble = select >> 4 * place & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        found |= byte << 8 * place
    return found


def _lop3(a: int, b: int, c: int, rule: int) -> int:
    return sum(1 << bit for bit in range(32) if rule >> ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1) & 1)


def _numbers(one: int, dtype: Any) -> Any:
    return torch.tensor([one & 0xFFFF, one >> 16]).to(torch.int32).to(torch.int16).view(dtype)


def _word(numbers: Any, dtype: Any) -> int:
    low, high = numbers.to(dtype).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def _fma(a: int, b: int, c: int) -> int:
    x, y, z = (_numbers(one, torch.bfloat16).double() for one in (a, b, c))
    return _word(x * y + z, torch.bfloat16)


def _mul(a: int, b: int) -> int:
    return _word(_numbers(a, torch.float16).double() * _numbers(b, torch.float16).double(), torch.float16)


PTX: dict[str, Any] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "mov.b32": lambda a: a,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma,
    "mul.rn.f16x2": _mul,
}


def run_ptx(text: str, word: int, dtype: Any) -> list[float]:
    """Four values of a word, by the manual's definition of each instruction."""
    held: dict[str, int] = {"$2": word}
    for line in re.findall(r"[^;{}]+;", text):
        name, *rest = line.strip().rstrip(";").split(None, 1)
        if name == ".reg":
            continue
        target, *given = (one.strip() for one in rest[0].split(","))
        held[target] = PTX[name](*(held[one] if one in held else int(one, 0) for one in given))
    return [*_numbers(held["$0"], dtype).tolist(), *_numbers(held["$1"], dtype).tolist()]


@pytest.mark.parametrize("name", ["RF8_WORDS", "RF8_HALVES", "E3M4_WORDS", "E3M4_HALVES"])
def test_words_of_codes_decode_to_the_table(name: str) -> None:
    """What runs on a GPU in place of the interpreter's arithmetic: all codes, each in every place of a word."""
    pytest.importorskip("triton")
    values: Any = importlib.import_module("agentopt.weights.gg.kernels._values")
    dtype = torch.float16 if name.endswith("HALVES") else torch.bfloat16
    unit = values.RF8_UNIT[str(dtype).removeprefix("torch.")] if name.startswith("RF8") else 1.0
    table = _tables.table("rf8" if name.startswith("RF8") else "e3m4")[0].tolist()
    for code in range(256):
        four = [code, code * 7 + 1 & 255, 255 - code, code * 31 & 255]
        found = run_ptx(getattr(values, name).value, int.from_bytes(bytes(four), "little"), dtype)
        assert [unit * one for one in found] == [table[one] for one in four]


# Compiled, without a GPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def static() -> Any:
    pytest.importorskip("triton")
    return importlib.import_module("benchmarks.gpu.gg_static")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("name", "capability"),
    [("rf8 M<=4", 90), ("e3m4 M<=16", 80), ("rf8-gg M<=8", 90), ("rf8 M<=256", 90)],
)
def test_kernels_compile_for_gpus(static: Any, name: str, capability: int) -> None:
    """Tensor cores, codes by wide copies that run ahead, nothing spilled worth the name."""
    (variant,) = [one for one in static.variants() if one.name == name]
    found = static.build(variant, capability)
    assert found.loop["HMMA"] + found.loop["HGMMA"] > 0
    assert found.loop["LDGSTS"] > 0
    assert "cp.async.cg.shared.global" in found.ptx
    copied = set(re.findall(r"cp\.async\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", found.ptx))
    assert copied == ({"0x10", "0x8"} if name == "rf8 M<=256" else {"0x10"})  # 8 for tiles of large products
    assert found.spilled <= 32
    assert found.shared <= 99 * 1024, "more than a multiprocessor of compute capability 8.6 or 8.9 has"
    if name == "rf8 M<=4":
        assert found.per_weight < 8
    if name.startswith("rf8-gg"):
        assert found.loop["LDG"] == 0, "books are gathered from shared memory"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", ["rf8-gg decode", "rf8-gg M<=4, odd", "sum of parts"])
def test_the_other_kernels_compile(static: Any, name: str) -> None:
    (variant,) = [one for one in static.variants() if one.name == name]
    assert static.build(variant, 90).spilled == 0


# In torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_decodes_as_defined(format: str, dtype: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(5, 3)
    _, scale, table, book_id = layer(format, 5)
    found = decode(codes, scale, table, book_id, dtype=dtype, format=format)
    assert torch.equal(found, weight_of(codes, scale, table, book_id).to(dtype))
    x = torch.randn(2, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.ones(5)
    wanted = functional.linear(x, found, bias.to(dtype))
    assert torch.equal(linear(x, codes, scale, table, book_id, bias, format=format), wanted)


def test_decoding_goes_on_over_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = importlib.import_module("agentopt.weights.gg.kernels._lookup")
    monkeypatch.setattr(lookup, "_TILE", {"cpu": 45})
    parts = layer("rf8-gg", 9, 20)
    assert torch.equal(decode(*parts, dtype=torch.float32, format="rf8-gg"), weight_of(*parts))


def test_without_a_gpu_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not usable(torch.zeros(4))


@pytest.mark.parametrize("format", ["rf8", "rf8-gg"])
def test_the_gradient_is_right_twice(format: str) -> None:
    parts = layer(format)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)

    def run(x: Any, bias: Any) -> Any:
        return linear(x, *parts, bias, format=format).square()

    assert torch.autograd.gradcheck(lambda x: run(x, bias.detach()), (x,))
    assert torch.autograd.gradgradcheck(lambda x: run(x, bias.detach()), (x,))
    (found,) = torch.autograd.grad(linear(x, *parts, bias, format=format).sum(), bias)
    assert torch.equal(found, torch.full_like(bias, 6.0))


@pytest.mark.parametrize("given", ["plain", "bias", "empty"])
def test_torch_accepts_the_operators(given: str) -> None:
    parts = layer("rf8-gg")
    x = torch.randn((0, 20) if given == "empty" else (2, 3, 20), requires_grad=True)
    bias = torch.randn(9) if given == "bias" else None
    library.opcheck(torch.ops.agentopt_gg.linear.default, (x, *parts, bias, "rf8-gg"))
    library.opcheck(torch.ops.agentopt_gg.decode.default, (*parts, torch.bfloat16, "rf8-gg"))


def test_it_is_traced_as_one_node_in_one_graph() -> None:
    parts, seen = layer("rf8"), list[str]()

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def run(x: Any) -> Any:
        return linear(x, *parts, format="rf8") * (3 if usable(x) else 2)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    x = torch.randn(4, 20)
    assert torch.equal(compiled(x), 2 * linear(x, *parts, format="rf8"))
    assert "agentopt_gg.linear" in seen


def test_a_second_import_defines_nothing_again() -> None:
    again = importlib.reload(_op)
    x, parts = torch.randn(2, 20), layer("e3m4")
    assert torch.equal(again.linear(x, *parts, format="e3m4"), linear(x, *parts, format="e3m4"))


def test_neither_the_room_nor_the_package_needs_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import agentopt.weights.gg as gg; assert 'torch' not in sys.modules;"
        "import torch; from agentopt.weights.gg import kernels, _tables;"
        "x = kernels.linear(torch.ones(1, 2), torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3, 1),"
        " _tables.table('rf8'), format='rf8'); assert not x.any(); assert not kernels.usable(x)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "rf9"}, "format: found 'rf9'"),
        ({"codes": torch.zeros(9, 20)}, "codes: found torch.float32"),
        ({"scale": torch.ones(9)}, r"scale: found torch.float32 \(9,\)"),
        ({"table": torch.zeros(255)}, "table: found"),
        ({"book_id": torch.zeros(9, 1)}, "book_id: found torch.float32"),
        ({"x": torch.zeros(3, 19)}, "x: found 19 values per row, expected 20"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], told: str) -> None:
    codes, scale, table, _ = layer("rf8")
    given: dict[str, Any] = {
        "x": torch.zeros(3, 20),
        "codes": codes,
        "scale": scale,
        "table": table,
        "format": "rf8",
        **change,
    }
    with pytest.raises(UserError, match=told):
        linear(**given)


# Which way --------------------------------------------------------------------------------------------------------


def test_the_way_follows_the_number_of_tokens() -> None:
    ways = [_dispatch.choose(tokens, 4096, 4096, 132).way for tokens in (1, 16, 32, 33, 256, 257, 4096)]
    assert ways == ["few", "few", "few", "tiled", "tiled", "scratch", "scratch"]
    assert _dispatch.choose(100, 4096, 4096, 132, exact=True).way == "scratch"


def test_columns_are_shared_out_only_where_rows_are_few() -> None:
    assert _dispatch.choose(1, 128_256, 4096, 132).split == 1
    assert _dispatch.choose(1, 512, 14_336, 132).split > 1
    assert _dispatch.choose(1, 16, 64, 132).split == 1


def test_a_way_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch.OVERRIDES, (1, 64, 64), Config("scratch"))
    assert _dispatch.choose(1, 64, 64, 132).way == "scratch"
    assert _dispatch.choose(2, 64, 64, 132).way == "few"
