"""The integer specification: what the accelerator computes, in numpy, to the last bit.

Nothing here is a float except the tables and constants made once. Shifts are arithmetic, so right shifts
round down; `round_shift` rounds half up. The numbers:

    words        signed, with a fixed number of fractional bits (`Fractions`); sums saturate at 32 bits,
                 results of linears at 27 (the wide port of a DSP48E2)
    codes        int8 in [-127, 127], one scale a token (activations), or a token and head (q, k, v)
    scales       mantissa << exponent with a mantissa of 12 bits, rounded up: no code exceeds 127
    weights      integer codes and one scale a group, relative to the exponent of their tensor
    multipliers  16-bit mantissa and a right shift, joined from everything that is known only at run time

A linear sums codes * codes * scales exactly and multiplies once:
    y = round_shift(sum over groups of dot * scale, mantissa, shift).

Legend: T tokens, S positions seen, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Integers = np.ndarray
"""int64 arrays unless said otherwise."""

NARROW, WIDE = 27, 32
MANTISSA = 12
CODE = 127
PROBABILITY = 16
SPREAD = 3
"""Chunks of activations are spread over the codes by up to this many bits."""
WEIGHT_SHIFT = 17
"""A probability times the scale of v keeps 26 of its 43 bits."""
SIGMOID_RANGE, SIGMOID_STEPS = 16, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Fractions:
    """Fractional bits of each kind of word."""

    residual: int = 15
    square: int = 10
    linear: int = 16
    score: int = 16


FRACTIONS = Fractions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A positive real number as mantissa * 2**-shift, mantissa in [2**15, 2**16)."""

    mantissa: int
    shift: int


def constant(value: float) -> Constant:
    """The nearest Constant of `value` > 0."""
    mantissa, exponent = math.frexp(value)
    rounded = round(mantissa * 65536)
    if rounded == 65536:
        return Constant(mantissa=32768, shift=15 - exponent)
    return Constant(mantissa=rounded, shift=16 - exponent)


@dataclass(frozen=True, slots=True, eq=False)
class Multiplier:
    """mantissa in [0, 2**16) and right shift, one for each row of codes."""

    mantissa: Integers
    shift: Integers


def round_shift(x: Integers, shift: int | Integers) -> Integers:
    """floor(x / 2**shift + 1/2) for shift >= 1."""
    rounded: Integers = (x + (np.int64(1) << (shift - np.int64(1)))) >> shift
    return rounded


def saturate(x: Integers, bits: int) -> Integers:
    """x limited to signed `bits` bits."""
    limited: Integers = np.clip(x, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return limited


def bit_length(x: Integers) -> Integers:
    """Binary digits of x >= 0."""
    return np.frexp(x.astype(np.longdouble))[1].astype(np.int64)


def scale_above(largest: Integers) -> tuple[Integers, Integers]:
    """(mantissa, exponent) of the least scale that is not below `largest`; a scale is at least 1."""
    largest = np.maximum(largest, 1)
    exponent = np.maximum(bit_length(largest) - MANTISSA, 0)
    mantissa = (largest + (np.int64(1) << exponent) - 1) >> exponent
    carried = mantissa == 1 << MANTISSA
    return np.where(carried, 1 << (MANTISSA - 1), mantissa), exponent + carried


def normalised(mantissa: Integers, exponent: Integers) -> tuple[Integers, Integers]:
    """The same scale with its mantissa in [2**11, 2**12); the exponent may be negative."""
    missing = MANTISSA - bit_length(mantissa)
    return mantissa << missing, exponent - missing


def quantise(words: Integers) -> tuple[Integers, Integers, Integers]:
    """words (..., K) as codes (..., K) and the scale (mantissa, exponent) (...), not normalised."""
    mantissa, exponent = scale_above(np.abs(words).max(axis=-1))
    full, power = normalised(mantissa, exponent)
    inverse = (np.int64(CODE) << 19) // full
    return round_shift(words * inverse[..., None], (power + 19)[..., None]), mantissa, exponent


def quantise_chunks(words: Integers, chunk: int) -> tuple[Integers, Integers, Integers]:
    """words (T, K) as (codes << SPREAD - spread, mantissa, exponent) with one scale a token.

    Chunks of quieter inputs are made up to 2**SPREAD times as large before they are rounded, which costs the
    hardware a shift: codes << SPREAD - spread are what a linear sums, at SPREAD more fractional bits.
    """
    mantissa, exponent = scale_above(np.abs(words).max(axis=-1))
    full, power = normalised(mantissa, exponent)
    inverse = (np.int64(CODE) << 19) // full
    largest = np.abs(words).reshape(len(words), -1, chunk).max(axis=-1)
    limit = (mantissa << exponent)[:, None]
    spread = sum((largest << s <= limit).astype(np.int64) for s in range(1, SPREAD + 1))
    spread = np.repeat(spread, chunk, axis=-1)
    codes = round_shift(words * inverse[:, None], (power + 19)[:, None] - spread)
    return codes << (SPREAD - spread), mantissa, exponent


def multiplier_of(mantissa: Integers, exponent: Integers, factor: int) -> Multiplier:
    """A scale times the 16-bit mantissa of a Constant."""
    full, power = normalised(mantissa, exponent)
    return Multiplier((full * factor) >> MANTISSA, -power)


def norm(
    words: Integers, gamma: Integers, gamma_shift: int, epsilon: int, factor: int, chunk: int
) -> tuple[Integers, Multiplier]:
    """RMSNorm of words (T, D) as spread codes: the root only scales, so it goes into the multiplier."""
    scaled = saturate(round_shift(words * gamma, gamma_shift), WIDE)
    codes, mantissa, exponent = quantise_chunks(scaled, chunk)
    squares = (round_shift(words, FRACTIONS.residual - FRACTIONS.square) ** 2).sum(axis=-1) + epsilon
    halvings = -((32 - bit_length(squares)) // 2)
    fitted = (squares >> np.maximum(2 * halvings, 0)) << np.maximum(-2 * halvings, 0)
    root = np.sqrt(fitted.astype(np.float64)).astype(np.int64)  # exact: below 2**32
    plain = multiplier_of(mantissa, exponent, factor)
    return codes, Multiplier((plain.mantissa << 15) // root, plain.shift + halvings)


def multiply(sums: Integers, by: Multiplier, base_shift: int, bits: int = NARROW) -> Integers:
    """sums (T, N) times the multiplier of each token, limited to `bits` bits."""
    shift = (by.shift + base_shift)[:, None]
    return saturate(round_shift(sums * by.mantissa[:, None], shift), bits)


def rotate(words: Integers, cos: Integers, sin: Integers) -> Integers:
    """RoPE on words (T, heads, E) with cos and sin (T, E/2) of 14 fractional bits."""
    first, second = np.split(words, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return saturate(round_shift(turned, 14), NARROW)


def exp2_table() -> Integers:
    """65535 * 2**(-i/256) for i = 0..256."""
    return np.rint(65535 * 2.0 ** (-np.arange(257) / 256)).astype(np.int64)


def sigmoid_table() -> Integers:
    """65536 * sigmoid(i/32) for i = 0..512, at most 65535."""
    values = 65536 / (1 + np.exp(-np.arange(SIGMOID_STEPS + 1) * SIGMOID_RANGE / SIGMOID_STEPS))
    return np.minimum(np.rint(values), 65535).astype(np.int64)


EXP2, SIGMOID = exp2_table(), sigmoid_table()


def exp2_below(distance: Integers) -> Integers:
    """65535 * 2**-(distance / 2**16) for distance >= 0: table, straight line, shift."""
    index, rest = (distance >> 8) & 255, distance & 255
    value = EXP2[index] - (((EXP2[index] - EXP2[index + 1]) * rest) >> 8)
    power: Integers = value >> np.minimum(distance >> 16, 63)
    return power


def silu_product(gate: Integers, up: Integers) -> Integers:
    """silu(gate) * up at 32 bits."""
    size = np.abs(gate)
    step = FRACTIONS.linear - 5
    index = np.minimum(size >> step, SIGMOID_STEPS - 1)
    rest = np.where(size >> step < SIGMOID_STEPS, (size >> (step - 8)) & 255, 255)
    value = SIGMOID[index] + (((SIGMOID[index + 1] - SIGMOID[index]) * rest) >> 8)
    silu = round_shift(gate * np.where(gate < 0, 65536 - value, value), 16)
    return saturate(round_shift(silu * up, FRACTIONS.linear), WIDE)


def weigh(probabilities: Integers, mantissa: Integers, exponent: Integers) -> Integers:
    """Probabilities times the scales of v, 26 bits."""
    return round_shift((probabilities * mantissa) << exponent, WEIGHT_SHIFT)


def divide_by_sum(sums: Integers, total: Integers, factor: Constant) -> Integers:
    """sums (..., E) * factor * 2**WEIGHT_SHIFT / total (...), at 27 bits."""
    excess = bit_length(total) - 16
    inverse = (np.int64(factor.mantissa) << 15) // (total >> excess)
    shift = excess + (factor.shift + 15 - WEIGHT_SHIFT)
    return saturate(round_shift(sums * inverse[..., None], shift[..., None]), NARROW)
