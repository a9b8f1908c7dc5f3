"""How packed weights are unpacked in registers: 16-byte chunks of four 32-bit words.

A word holds P pairs of weights: P = 1 for bf16, 2 for 8 bits, 4 for 4 bits; chunk t of a row holds columns
8 P t to 8 P t + 8 P - 1. Weights of 16 and 8 bits lie in the order of their columns, as the vendor's products
want them. Of 4 bits, pair j of word c of a chunk holds columns 32 t + 8 j + 2 c and the next, so that the
activations that meet pair j of the four words lie in 16 consecutive bytes. `kernels/packed.py` packs.

Two ways of unpacking, chosen by the constant ASM: pairs of float16 by PTX (Nvidia), 1 to 2 instructions a
weight; and plain Triton in float32, which runs everywhere, the interpreter included.
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16, FP8, INT8, INT4 = (tl.constexpr(i) for i in range(4))

# Offset codes become floats by writing them into the mantissa of 1024.0 (0x6400): 1024 + q, exact.
_UNPACK_4 = tl.constexpr("""{
    .reg .b32 high, a, b, c, d;
    shr.u32 high, $4, 8;
    lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
    lop3.b32 c, high, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 d, high, 0x00f000f0, 0x64006400, 0xea;
    .reg .b32 minus_1032, sixteenth, minus_72;
    mov.b32 minus_1032, 0xe408e408;
    mov.b32 sixteenth, 0x2c002c00;
    mov.b32 minus_72, 0xd480d480;
    add.rn.f16x2 $0, a, minus_1032;
    fma.rn.f16x2 $1, b, sixteenth, minus_72;
    add.rn.f16x2 $2, c, minus_1032;
    fma.rn.f16x2 $3, d, sixteenth, minus_72;
}""")
_UNPACK_8 = tl.constexpr("""{
    .reg .b32 offset, a, b, minus_1152;
    xor.b32 offset, $2, 0x80808080;
    prmt.b32 a, offset, 0x64646464, 0x4140;
    prmt.b32 b, offset, 0x64646464, 0x4342;
    mov.b32 minus_1152, 0xe480e480;
    add.rn.f16x2 $0, a, minus_1152;
    add.rn.f16x2 $1, b, minus_1152;
}""")
_UNPACK_FP8 = tl.constexpr("""{
    .reg .b16 a, b;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
}""")
_DOT_2 = tl.constexpr("""{
    .reg .b32 t;
    .reg .b16 a, b;
    .reg .f32 c, d;
    mul.rn.f16x2 t, $1, $3;
    fma.rn.f16x2 t, $2, $4, t;
    mov.b32 {a, b}, t;
    cvt.f32.f16 c, a;
    cvt.f32.f16 d, b;
    add.f32 $0, c, d;
}""")
_DOT_4 = tl.constexpr("""{
    .reg .b32 t;
    .reg .b16 a, b;
    .reg .f32 c, d;
    mul.rn.f16x2 t, $1, $5;
    fma.rn.f16x2 t, $2, $6, t;
    fma.rn.f16x2 t, $3, $7, t;
    fma.rn.f16x2 t, $4, $8, t;
    mov.b32 {a, b}, t;
    cvt.f32.f16 c, a;
    cvt.f32.f16 d, b;
    add.f32 $0, c, d;
}""")
_SUM_PAIR = tl.constexpr("""{
    .reg .b16 a, b;
    .reg .f32 c, d;
    mov.b32 {a, b}, $1;
    cvt.f32.f16 c, a;
    cvt.f32.f16 d, b;
    add.f32 $0, c, d;
}""")
_PAIR = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")


@triton.jit
def low(word):
    """The bfloat16 in the lower half of each word, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(word):
    """The bfloat16 in the upper half of each word, as float32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pair(first, second):
    """Two float32 as a word of two float16."""
    return tl.inline_asm_elementwise(_PAIR, "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def sum_pair(word):
    """The sum of a word's two float16, as float32."""
    return tl.inline_asm_elementwise(_SUM_PAIR, "=f,r", [word], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot_8bit(w, x0, x1, FORMAT: tl.constexpr):
    """float32 products, summed, of a word's four 8-bit weights and two words of float16 activations."""
    if FORMAT == FP8:
        a, b = tl.inline_asm_elementwise(
            _UNPACK_FP8, "=r,=r,r", [w], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        a, b = tl.inline_asm_elementwise(
            _UNPACK_8, "=r,=r,r", [w], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        _DOT_2, "=f,r,r,r,r", [a, b, x0, x1], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def dot_4bit(w, x0, x1, x2, x3):
    """float32 products, summed, of a word's eight 4-bit weights, less 8, and four words of activations."""
    a, b, c, d = tl.inline_asm_elementwise(
        _UNPACK_4,
        "=r,=r,=r,=r,r",
        [w],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return tl.inline_asm_elementwise(
        _DOT_4,
        "=f,r,r,r,r,r,r,r,r",
        [a, b, c, d, x0, x1, x2, x3],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def value(w, index: tl.constexpr, FORMAT: tl.constexpr):
    """Weight `index` of each word in the order of its columns, as float32, by plain Triton. index counts
    2 j + e for the pair j and its element e."""
    if FORMAT == BF16:
        return low(w) if index == 0 else high(w)
    elif FORMAT == INT4:
        # Pair j has its first weight in nibble j and its second in nibble j + 4.
        shift: tl.constexpr = 4 * (index // 2) + 16 * (index % 2)
        return ((w >> shift) & 15).to(tl.float32) - 8.0
    elif FORMAT == INT8:
        return ((w << (24 - 8 * index)) >> 24).to(tl.float32)
    else:
        code = w >> (8 * index)
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        # e4m3 has exponent bias 7, float32 127; denormals come out right as well.
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
