"""From integers to what the accelerator reads: one memory image and one program.

The memory is counted in beats of `Shape.lanes` bytes. A linear is one run of beats: a beat of scales, then
the beats that they scale. A beat of weights is one chunk of one 8-bit row, or of two 4-bit rows. Keys and
values of a head are blocks of the same form, so that a cache is streamed like a weight. L layers, G key/value
heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError, ResourceError
from flatout.fpga import model as integers
from flatout.fpga.model import IntegerLinear, IntegerModel, KeyValues
from flatout.fpga.program import mode, op, setting
from flatout.fpga.spec import FRACTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one generated accelerator can hold. lanes: 8-bit weights in a beat, columns: tokens (or query
    heads) that share a beat, group_heads: query heads that share a key head, head_chunks: beats of a head,
    1 to 4. The rest: sizes of memories, in powers of two."""

    lanes: int = 64
    columns: int = 4
    group_heads: int = 4
    head_chunks: int = 4
    program_log2: int = 10
    rows_log2: int = 8
    codes_log2: int = 6
    context_log2: int = 11
    fifo_log2: int = 9
    burst_log2: int = 6
    heads_log2: int = 5

    @property
    def words(self) -> int:
        """Words in a row of the vector memory."""
        return self.lanes // 2

    @property
    def weighing(self) -> int:
        """Units that weigh values by the softmax: one for each query head of a group that has a column."""
        return min(self.group_heads, self.columns)

    @property
    def column_log2(self) -> int:
        return max(1, (self.columns - 1).bit_length())


def shape_for(spec: ModelSpec, lanes: int = 64, columns: int = 4) -> Shape:
    """An accelerator that attends as models of this spec do, and no more."""
    return Shape(
        lanes=lanes, columns=columns, group_heads=spec.num_heads // spec.num_kv_heads,
        head_chunks=min(4, -(-spec.head_dim // lanes)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compiled:
    """image: uint8 (beats, lanes) with room for keys and values at its end. names: what an instruction makes,
    by its place. block_tokens: tokens of a block of keys. stream_beats: beats of each linear."""

    shape: Shape
    model: IntegerModel
    program: list[int]
    names: dict[int, str]
    image: np.ndarray
    context: int
    block_tokens: int
    head_chunks: int
    stream_beats: dict[str, int]


def check_shape(model: IntegerModel, shape: Shape, context: int) -> None:
    """Raise ConfigError or ResourceError naming every limit that `model` exceeds."""
    spec, lanes = model.spec, shape.lanes
    if lanes not in (8, 16, 32, 64, 128) or model.chunk != lanes:
        raise ConfigError(
            "a beat holds 8, 16, 32, 64 or 128 bytes, and chunks are as long", f"{lanes}", "lanes=64"
        )
    if shape.rows_log2 > 8:
        raise ConfigError(
            "an instruction names one of 256 rows", f"rows_log2={shape.rows_log2}", "rows_log2=8"
        )
    wrong: list[tuple[str, str]] = []
    for name, width in (
        ("hidden size", spec.hidden_size), ("head size", spec.head_dim), ("query width", spec.q_size),
        ("intermediate size", spec.intermediate_size),
    ):  # fmt: skip
        if width % lanes:
            wrong.append(
                (f"{name} {width} is not a multiple of {lanes}", f"{name} {-(-width // lanes) * lanes}")
            )
    for name, linear in model.linears.items():
        recipe = f"recipe w{linear.bits}a8-g{max(lanes, 32)}"  # the least group that a recipe names
        if linear.group % lanes:
            wrong.append((f"{name}: groups of {linear.group} are no multiple of {lanes}", recipe))
        if linear.minima is not None:
            wrong.append((f"{name}: minima", recipe))
        if linear.codes.shape[0] % 2:
            wrong.append((f"{name}: an odd number of rows", "an even number"))
        width = linear.codes.shape[1]
        if not 4 * lanes <= width < 64 * lanes:
            nearest = min(max(width, 4 * lanes), 63 * lanes)
            sizes = {"o": "query width", "down": "intermediate size"}
            size = sizes.get(name.rpartition(".")[2], "hidden size")
            wrong.append(
                (f"{name}: width {width} is not within {4 * lanes}..{63 * lanes}", f"{size} {nearest}")
            )
    heads = spec.num_heads // spec.num_kv_heads
    rows = vector_rows(model, shape)["end"]
    positions = min(1 << shape.context_log2, spec.max_positions)
    remedies = {
        "query heads a key head": f"columns={heads}",
        "positions": f"{positions} tokens, context {positions - 1}",
    }
    for name, found, limit in (
        ("query heads a key head", heads, shape.weighing),
        ("query heads", spec.num_heads, 1 << shape.heads_log2),
        ("rows of vector memory", rows, 1 << shape.rows_log2),
        (
            "rows of codes",
            max(spec.intermediate_size, shape.columns * spec.kv_size) // lanes,
            1 << shape.codes_log2,
        ),
        ("chunks of a head", spec.head_dim // lanes, shape.head_chunks),
        ("positions", context, positions),
    ):
        if found > limit:
            wrong.append((f"{name}: {found} > {limit}", remedies.get(name, f"{name} up to {limit}")))
    if wrong:
        shown = "; ".join(what for what, _ in wrong[:4]) + (
            f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        )
        nearest_fit = "; ".join(dict.fromkeys(remedy for _, remedy in wrong[:4]))
        raise ResourceError("the model must fit the accelerator", shown, nearest_fit)


def vector_rows(model: IntegerModel, shape: Shape) -> dict[str, int]:
    """First row of each region of the vector memory of a token."""
    spec, words = model.spec, shape.words
    starts, at = {}, 0
    for name, size in (
        ("residual", spec.hidden_size), ("scratch", max(spec.hidden_size, spec.head_dim)),
        ("wide", max(spec.qkv_size, spec.intermediate_size)), ("read", spec.q_size), ("end", 0),
    ):  # fmt: skip
        starts[name] = at
        at += -(-size // words)
    return starts


def compile_model(model: IntegerModel, shape: Shape, context: int) -> Compiled:
    """Lay out `model` for `context` positions. Raises ConfigError and ResourceError."""
    check_shape(model, shape, context)
    spec, lanes = model.spec, shape.lanes
    head_chunks = spec.head_dim // lanes
    block_tokens = lanes // 2 // head_chunks
    block_beats = block_tokens * head_chunks
    head_stride = -(-context // block_tokens) * (block_beats + 1)
    sections: list[np.ndarray] = []
    at = 0

    def place(beats: np.ndarray) -> int:
        nonlocal at
        start = at
        sections.append(np.ascontiguousarray(beats).view(np.uint8).reshape(-1, lanes))
        at += len(sections[-1])
        return start

    embedding = place(model.embedding.astype("<i2"))
    cos, sin = integers.rope_table(spec, np.arange(context))
    turns = place(np.concatenate([cos, sin], axis=1).astype("<i2"))
    norms = {name: place(norm.gamma.astype("<i2")) for name, norm in model.norms.items()}
    starts, beats = {}, {}
    for name, linear in model.linears.items():
        stream = linear_stream(linear, lanes, paired=name.endswith("gate_up"))
        starts[name], beats[name] = place(stream), len(stream)
    cache = at
    layer_beats = 2 * spec.num_kv_heads * head_stride
    sections.append(np.zeros((spec.num_layers * layer_beats, lanes), dtype=np.uint8))

    rows = vector_rows(model, shape)
    row_count = {name: size // shape.words for name, size in
                 (("hidden", spec.hidden_size), ("query", spec.q_size),
                  ("wide", spec.intermediate_size))}  # fmt: skip
    program: list[int] = []
    names: dict[int, str] = {}

    def gemv(name: str, how: str, target: int) -> None:
        linear = model.linears[name]
        four = linear.bits == 4
        units = linear.codes.shape[0] // (2 if four else 1)
        shift = integers.linear_shift(model, name)
        program.append(mode(how, beats=beats[name], target=target, shift=shift, four_bits=four))
        names[len(program)] = name
        chunks = linear.codes.shape[1] // lanes
        program.append(op("GEMV", (0, 32, starts[name]), (32, 20, units), (52, 6, chunks)))

    def norm(name: str) -> None:
        names[len(program)] = name
        program.append(
            op("NORM", (0, 32, norms[name]), (32, 8, row_count["hidden"]), (40, 8, rows["residual"]),
               (48, 6, integers.NORM_SHIFT))
        )  # fmt: skip

    epsilon = next(iter(model.norms.values())).epsilon
    score = integers.score_constant(spec)
    score_shift = integers.base_shift(score, *(FRACTIONS.linear,) * 3)
    program += [
        setting("HEADS", (0, 3, head_chunks), (8, 8, block_beats), (16, 8, spec.num_heads),
                (24, 8, spec.num_kv_heads), (32, 8, spec.num_heads // spec.num_kv_heads),
                (40, 8, rows["scratch"])),
        setting("HEAD_STRIDE", (0, 32, head_stride)),
        setting("VALUE_OFFSET", (0, 32, spec.num_kv_heads * head_stride)),
        setting("EPSILON", (0, 32, epsilon)),
        setting("FACTORS", (0, 16, integers.code_constant().mantissa),
                (16, 16, integers.norm_constant(spec).mantissa), (32, 16, score.mantissa),
                (48, 8, score_shift)),
        op("EMBED", (0, 32, embedding), (32, 8, row_count["hidden"]), (40, 8, rows["residual"]),
           (48, 4, model.embedding_shift)),
        op("TURNS", (0, 32, turns)),
    ]  # fmt: skip
    for i in range(spec.num_layers):
        p, keys = f"layers.{i}.", cache + i * layer_beats
        norm(p + "input_norm")
        gemv(p + "qkv", "STORE", rows["wide"])
        names[len(program)] = p + "heads"
        program.append(op("HEADS", (0, 32, keys), (40, 8, rows["wide"])))
        names[len(program)] = p + "attention"
        program.append(op("ATTEND", (0, 32, keys), (40, 8, rows["read"])))
        names[len(program)] = p + "read"
        program.append(op("CODES", (32, 8, row_count["query"]), (40, 8, rows["read"])))
        gemv(p + "o", "ADD", rows["residual"])
        norm(p + "post_norm")
        gemv(p + "gate_up", "SILU", rows["wide"])
        names[len(program)] = p + "hidden"
        program.append(op("CODES", (32, 8, row_count["wide"]), (40, 8, rows["wide"])))
        gemv(p + "down", "ADD", rows["residual"])
    norm("norm")
    gemv("head", "LOGITS", 0)
    program.append(op("END"))
    if len(program) > 1 << shape.program_log2:
        raise ResourceError(
            "the program must fit", f"{len(program)} > {1 << shape.program_log2} instructions", "program_log2"
        )
    return Compiled(
        shape=shape,
        model=model,
        program=program,
        names=names,
        image=np.concatenate(sections),
        context=context,
        block_tokens=block_tokens,
        head_chunks=head_chunks,
        stream_beats=beats,
    )


def linear_stream(linear: IntegerLinear, lanes: int, paired: bool) -> np.ndarray:
    """Beats (uint8 (beats, lanes)) of a linear. paired: rows i and N/2 + i lie together (gate and up)."""
    n, k = linear.codes.shape
    order = np.arange(n).reshape(2, -1).T.ravel() if paired else np.arange(n)
    chunks = k // lanes
    codes = (linear.codes[order].astype(np.int16) - linear.zero).reshape(n, chunks, lanes)
    scales = (linear.exponents << 12 | linear.mantissas)[order]
    scales = np.repeat(scales, linear.group // lanes, axis=1).astype("<u2")  # (N, chunks)
    data: np.ndarray
    if linear.bits == 4:
        nibbles = (codes & 15).astype(np.uint8)
        pairs = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(n // 2, 2, chunks, lanes // 2)
        data = pairs.transpose(0, 2, 1, 3).reshape(-1, lanes)
        scales = scales.reshape(n // 2, 2, chunks).transpose(0, 2, 1).reshape(-1, 2)
    else:
        data = codes.astype(np.uint8).reshape(-1, lanes)
        scales = scales.reshape(-1, 1)
    period = lanes // 2 // scales.shape[1]
    blocks = -(-len(data) // period)
    out = np.zeros((blocks, period + 1, lanes), dtype=np.uint8)
    padded = np.zeros((blocks * period, scales.shape[1]), dtype="<u2")
    padded[: len(scales)] = scales
    out[:, 0] = padded.reshape(blocks, -1).view(np.uint8)
    full = np.zeros((blocks * period, lanes), dtype=np.uint8)
    full[: len(data)] = data
    out[:, 1:] = full.reshape(blocks, period, lanes)
    return out.reshape(-1, lanes)[: len(data) + blocks]


def cache_region(compiled: Compiled, image: np.ndarray) -> np.ndarray:
    """Keys and values in `image`, uint8 (L, 2, G, blocks, beats of a block, lanes): a beat of scales, then
    codes."""
    spec, shape = compiled.model.spec, compiled.shape
    blocks = -(-compiled.context // compiled.block_tokens)
    beats = compiled.block_tokens * compiled.head_chunks + 1
    size = (spec.num_layers, 2, spec.num_kv_heads, blocks, beats, shape.lanes)
    return image[len(image) - int(np.prod(size[:-1])) :].reshape(size)


def store_cache(compiled: Compiled, image: np.ndarray, cache: KeyValues) -> None:
    """Write the tokens of `cache` into `image`."""
    region = cache_region(compiled, image)
    chunks, lanes = compiled.head_chunks, compiled.shape.lanes
    scales = (cache.exponents << 12 | cache.mantissas).astype("<u2")
    for token in range(cache.length):
        block, place = divmod(token, compiled.block_tokens)
        codes = cache.codes[:, :, token].astype(np.uint8)  # (L, 2, G, E)
        at = 1 + place * chunks
        region[:, :, :, block, at : at + chunks] = codes.reshape(*codes.shape[:3], chunks, lanes)
        repeated = np.repeat(scales[:, :, token, :, None], chunks, axis=-1)
        place *= 2 * chunks
        region[:, :, :, block, 0, place : place + 2 * chunks] = repeated.view(np.uint8)
