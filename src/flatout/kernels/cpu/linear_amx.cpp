// Linear layers on the AMX tile unit: integer formats, 16 tokens at a time; everything else goes to AVX-512.
//
// A tile product gives 16 tokens x 16 rows of exact int32 sums over one group (or 64 columns of it); the scaling that
// follows is the same sequence of fp32 operations as in linear.cpp, so both give the same bits. Weights are unpacked to
// signed bytes once a panel, which pays from about 16 tokens on. Tile time: 16 cycles per 16 x 16 x 64 product; with one
// scale a group the fp32 work (convert, multiply, fma per 16 outputs) is the larger part.
#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace flatout {
namespace FLATOUT_ISA {

// Tiles 0-1 sums, 4-5 activations, 6-7 weights; `depth` columns a product.
static void configure_tiles(int depth) {
  TileConfig c;
  for (int t = 0; t < 2; ++t) c.column_bytes[t] = 64, c.rows[t] = 16;
  for (int t = 4; t < 6; ++t) c.column_bytes[t] = (uint16_t)depth, c.rows[t] = 16;
  for (int t = 6; t < 8; ++t) c.column_bytes[t] = 64, c.rows[t] = (uint8_t)(depth / 4);
  _tile_loadconfig(&c);
}

static bool runs_on_tiles(const Linear& w) { return w.kind == WeightKind::kInteger && w.integer_activation; }

// Codes as signed bytes around their zero where that fits (4 bits, 8-bit symmetric); 8-bit asymmetric codes are moved
// by 128 and corrected by their zero afterwards.
void prepare_panel(const Linear& w, const uint8_t* panel, int8_t* scratch) {
  if (!runs_on_tiles(w)) return;
  typedef int8_t s8x64 __attribute__((vector_size(64)));
  const uint8_t zero = w.zero == Zero::kSymmetric ? (uint8_t)w.integer_zero : (w.bits == 8 ? 128 : 0);
  const s8x64 offset = (s8x64)((u8x64{} + zero));
  const size_t lines = (size_t)w.k_padded * w.bits / 32;
  for (size_t i = 0; i < lines; ++i) {
    u8x64 v = load<u8x64>(panel + 64 * i);
    if (w.bits == 8) {
      store(scratch + 64 * i, (s8x64)v - offset);
    } else {
      typedef uint32_t u32x16 __attribute__((vector_size(64)));
      u8x64 mask = (u8x64)splat_i32(0x0f0f0f0f);
      store(scratch + 128 * i, (s8x64)(v & mask) - offset);
      store(scratch + 128 * i + 64, (s8x64)((u8x64)((u32x16)v >> 4) & mask) - offset);
    }
  }
}

static inline f32x16 load_scale(const Linear& w, const uint8_t* base, int g) {
  return w.half_scales ? from_half((const uint16_t*)base + g * kLanes) : load<f32x16>((const float*)base + g * kLanes);
}

// Sums of one group in tile `sum_tile`. A macro because the intrinsics take tile numbers as literals only.
#define FLATOUT_MULTIPLY(sum_tile, a_tile, b_tile)         \
  _tile_zero(sum_tile);                                    \
  for (int k = 0; k < w.group; k += depth) {               \
    _tile_loadd(a_tile, x + k, w.k_padded);                \
    _tile_loadd(b_tile, b + (size_t)k * kLanes, 64);       \
    _tile_dpbssd(sum_tile, a_tile, b_tile);                \
  }                                                        \
  _tile_stored(sum_tile, sums, 64)

// One group of 16 tokens x 16 rows to exact int32 sums; neighbouring groups use other tiles, so they overlap.
static inline void group_sums(int g, const Linear& w, const int8_t* a, const int8_t* scratch, int depth, int32_t* sums) {
  const int8_t* x = a + (size_t)g * w.group;
  const int8_t* b = scratch + (size_t)g * w.group * kLanes;
  if (g % 2) {
    FLATOUT_MULTIPLY(1, 5, 7);
  } else {
    FLATOUT_MULTIPLY(0, 4, 6);
  }
}

// Sixteen tokens: accumulators stay in registers over all groups.
template <bool MINIMUM, bool ASYMMETRIC>
static void tile_block(const Linear& w, const uint8_t* panel, const int8_t* scratch, const Activations& a, int first,
                       int count, float* out) {
  alignas(64) int32_t sums[2][kTileRows * kLanes];
  const int depth = std::min(w.group, 64);
  const int8_t* codes = a.codes + (size_t)first * w.k_padded;
  const float* a_scale = a.scales + (size_t)first * w.groups;
  const float* a_sum = a.scaled_sums + (size_t)first * w.groups;
  const int32_t* a_int = a.sums + (size_t)first * w.groups;
  const uint8_t* scales = panel + w.scales_offset;
  const uint8_t* extra = panel + w.extra_offset;
  f32x16 acc[kTileRows];
  for (int r = 0; r < kTileRows; ++r) acc[r] = splat(0.0f);
  group_sums(0, w, codes, scratch, depth, sums[0]);
  for (int g = 0; g < w.groups; ++g) {
    if (g + 1 < w.groups) group_sums(g + 1, w, codes, scratch, depth, sums[(g + 1) % 2]);
    const f32x16 scale = load_scale(w, scales, g);
    f32x16 minimum = {};
    i32x16 zero = {};
    if constexpr (MINIMUM) minimum = load_scale(w, extra, g);
    if constexpr (ASYMMETRIC) {
      const int32_t moved = w.bits == 8 ? 128 : 0;
      for (int i = 0; i < kLanes; ++i) zero[i] = extra[g * kLanes + i] - moved;
    }
    const int32_t* tile = sums[g % 2];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const size_t at = (size_t)r * w.groups + g;
      i32x16 dot = load<i32x16>(tile + r * kLanes);
      if constexpr (ASYMMETRIC) dot -= zero * splat_i32(a_int[at]);
      acc[r] = fma(to_float(dot), splat(a_scale[at]) * scale, acc[r]);
      if constexpr (MINIMUM) acc[r] = fma(splat(a_sum[at]), minimum, acc[r]);
    }
  }
  for (int r = 0; r < count; ++r) store(out + (size_t)r * kLanes, acc[r]);
}

// Activation buffers hold a multiple of 16 rows, so a last, partial tile reads rows that exist and stores only its own.
void linear_panel_amx(const Linear& w, const uint8_t* panel, const int8_t* scratch, const Activations& a, int first,
                      int count, float* out) {
  if (!runs_on_tiles(w) || count < 6) return linear_panel_bf16(w, panel, scratch, a, first, count, out);
  configure_tiles(std::min(w.group, 64));
  for (int m = 0; m < count; m += kTileRows) {
    int rows = std::min(kTileRows, count - m);
    float* to = out + (size_t)m * kLanes;
    if (w.zero == Zero::kMinimum)
      tile_block<true, false>(w, panel, scratch, a, first + m, rows, to);
    else if (w.zero == Zero::kAsymmetric)
      tile_block<false, true>(w, panel, scratch, a, first + m, rows, to);
    else
      tile_block<false, false>(w, panel, scratch, a, first + m, rows, to);
  }
  _tile_release();
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
