"""What a code is worth, inside a kernel: arithmetic on bits for RF8 and E3M4, a gather for books.

Four codes are decoded at a time where the result has 16 bits on a GPU: a word of four bytes becomes two words of two
numbers each, in instructions that work on all bytes of a word. They are written in PTX, because the compiler of the
kernels only sees single elements. RF8 comes out too large by a power of two there, which goes into the row's scale at
no cost: the bit that says "not zero" is then an exponent bit by itself.
"""
# A kernel is written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

RF8, E3M4, BOOKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

RF8_WORDS = tl.constexpr("""{
.reg .b32 zero, high, low, r, up;
and.b32 zero, $2, 0x7f7f7f7f;
add.u32 zero, zero, 0x7f7f7f7f;
shr.u32 zero, zero, 1;
shr.u32 up, $2, 4;
and.b32 high, up, 0x07070707;
lop3.b32 high, zero, 0x40404040, high, 0xEA;
lop3.b32 high, $2, 0x80808080, high, 0xEA;
lop3.b32 r, $2, 0x0f0f0f0f, up, 0xE2;
and.b32 r, r, 0x77777777;
prmt.b32 r, r, 0, 0x4420;
prmt.b32 r, 0x20100800, 0x78706040, r;
shl.b32 low, $2, 4;
lop3.b32 low, low, 0x80808080, r, 0xEA;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
}""")
"""Per byte `s eeee rrr`: the high byte of a bfloat16 is `s n 000 eee`, n for "not zero"; the low byte is the last bit
of e before the significand, which `prmt` looks up by r for four codes at once."""

E3M4_WORDS = tl.constexpr("""{
.reg .b32 high, low, factor, nothing;
shr.u32 high, $2, 5;
and.b32 high, high, 0x03030303;
lop3.b32 high, $2, 0x80808080, high, 0xEA;
shl.b32 low, $2, 3;
and.b32 low, low, 0xf8f8f8f8;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
mov.b32 factor, 0x7d807d80;
mov.b32 nothing, 0x80008000;
fma.rn.bf16x2 $0, $0, factor, nothing;
fma.rn.bf16x2 $1, $1, factor, nothing;
}""")
"""Seven bits moved into place, times 2^124 before anything is summed: codes with a zero exponent are subnormal until
then. The product adds -0, which keeps the sign of zero."""


RF8_HALVES = tl.constexpr("""{
.reg .b32 zero, high, low, r, up;
and.b32 zero, $2, 0x7f7f7f7f;
add.u32 zero, zero, 0x7f7f7f7f;
shr.u32 zero, zero, 2;
and.b32 zero, zero, 0x20202020;
shr.u32 high, $2, 1;
and.b32 high, high, 0x3c3c3c3c;
add.u32 high, high, zero;
lop3.b32 high, $2, 0x80808080, high, 0xEA;
shr.u32 up, $2, 4;
lop3.b32 r, $2, 0x0f0f0f0f, up, 0xE2;
and.b32 r, r, 0x77777777;
prmt.b32 r, r, 0, 0x4420;
prmt.b32 low, 0x00804000, 0xc0800000, r;
prmt.b32 r, 0x01000000, 0x03030302, r;
or.b32 high, high, r;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
}""")
"""To float16: the high byte is `s`, e + 8 in five bits (e where the code is zero), and the first two bits of the
significand; the low byte is its other two."""

E3M4_HALVES = tl.constexpr("""{
.reg .b32 high, low, factor;
shr.u32 high, $2, 2;
and.b32 high, high, 0x1f1f1f1f;
lop3.b32 high, $2, 0x80808080, high, 0xEA;
shl.b32 low, $2, 6;
and.b32 low, low, 0xc0c0c0c0;
prmt.b32 $0, low, high, 0x5140;
prmt.b32 $1, low, high, 0x7362;
mov.b32 factor, 0x6c006c00;
mul.rn.f16x2 $0, $0, factor;
mul.rn.f16x2 $1, $1, factor;
}""")
"""To float16, times 2^12."""

RF8_UNIT = {"bfloat16": 2.0**-16, "float16": 2.0**-8}
"""What words of RF8 have to be multiplied by."""


@triton.jit
def rf8(codes):
    """RF8 (any shape, uint8) as float32."""
    code = codes.to(tl.int32)
    rest = code & 7
    sixteenths = (0xFEC84210 >> (4 * rest).to(tl.uint32)).to(tl.int32) & 15
    bits = ((code & 0x78) << 20) + (112 << 23) + (sixteenths << 19)
    bits = tl.where((code & 127) == 0, 0, bits) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e3m4(codes):
    """E3M4 (any shape, uint8) as float32."""
    code = codes.to(tl.int32)
    bits = ((code & 0x7F) << 19) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 21267647932558653966460912964485513216.0  # 2^124


@triton.jit
def looked_up(codes, first, table, lut, GATHER: tl.constexpr):
    """Values of codes (any shape) in the books that begin at `first` (broadcast to them).

    GATHER takes them from `lut`, all books as one row, which the compiler keeps in shared memory: a gather there costs
    the same however many books the rows of a tile have. Otherwise they are loads, for more books than a program holds.
    """
    index = codes.to(tl.int32) + first
    if GATHER:
        size: tl.constexpr = index.numel
        return tl.reshape(tl.gather(lut, tl.reshape(index, (size,)), 0), index.shape)
    else:
        return tl.load(table + index).to(lut.dtype)


@triton.jit
def books(table, BOOKS_PADDED: tl.constexpr, count, GATHER: tl.constexpr, TYPE: tl.constexpr):
    """All books as one row of TYPE; of one book where they are loaded one value at a time."""
    if GATHER:
        entry = tl.arange(0, BOOKS_PADDED * 256)
        return tl.load(table + entry, mask=entry < count * 256, other=0.0).to(TYPE)
    else:
        return tl.zeros((16,), TYPE)


@triton.jit
def values(codes, first, table, lut, FORMAT: tl.constexpr, WORDS: tl.constexpr, GATHER: tl.constexpr):
    """Weights before their scale, in the type of `lut`; RF8 over its unit with WORDS.

    WORDS decodes four codes at a time to bfloat16 or float16: on a GPU only.
    """
    if FORMAT == BOOKS:
        return looked_up(codes, first, table, lut, GATHER)
    elif WORDS:
        half: tl.constexpr = lut.dtype == tl.float16
        asm: tl.constexpr = (
            (RF8_HALVES if half else RF8_WORDS) if FORMAT == RF8 else (E3M4_HALVES if half else E3M4_WORDS)
        )
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=lut.dtype, is_pure=True, pack=4)
    elif FORMAT == RF8:
        return rf8(codes).to(lut.dtype)
    else:
        return e3m4(codes).to(lut.dtype)
