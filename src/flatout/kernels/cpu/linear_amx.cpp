// Linear layers on the AMX tile unit: integer formats and bf16, 16 or 32 tokens at a time; the rest goes to AVX-512.
//
// A tile product gives 16 tokens x 16 rows of exact int32 sums over one group (or 64 columns of it); the scaling that
// follows is the same sequence of fp32 operations as in linear.cpp, so both give the same bits. Weights are unpacked to
// signed bytes once a panel. Tile time: 16 cycles per 16 x 16 x 64 product with one scale a row; with one scale a group
// another 40 go to storing and scaling the sums (measured on a Xeon of the fourth generation's kind).
#include <algorithm>

#include "codes.h"
#include "kernels.h"
#include "tiles.h"

namespace flatout {
namespace FLATOUT_ISA {

constexpr int kHalfTile = 8;

// Tiles 0-3 sums, 4-5 activations, 6-7 weights; `depth` bytes of columns a product. Set once a linear: loading the
// configuration takes hundreds of cycles. Up to 8 tokens make half tiles, which take half the time.
void begin_linear(const Linear& w, int tokens) {
  if (w.kind == WeightKind::kFloat32) return;
  const int depth = w.kind == WeightKind::kBFloat16 ? 64 : std::min(w.group, 64);
  const uint8_t rows = tokens <= kHalfTile ? kHalfTile : kTileRows;
  TileConfig c;
  for (int t = 0; t < 4; ++t) c.column_bytes[t] = 64, c.rows[t] = rows;
  for (int t = 4; t < 6; ++t) c.column_bytes[t] = (uint16_t)depth, c.rows[t] = rows;
  for (int t = 6; t < 8; ++t) c.column_bytes[t] = 64, c.rows[t] = (uint8_t)(depth / 4);
  load_tile_config(c);
}

void end_linear() { _tile_release(); }

// One scale a row: tiles multiply unsigned codes around 128, those of 8 bits as they are packed.
static bool whole_row(const Linear& w) {
  return w.kind == WeightKind::kInteger && w.groups == 1 && w.zero == Zero::kSymmetric;
}

// Codes as signed bytes around their zero where that fits (fewer than 8 bits, 8-bit symmetric); 8-bit asymmetric codes are
// moved by 128 and corrected by their zero afterwards.
void prepare_panel(const Linear& w, const uint8_t* panel, int8_t* scratch) {
  if (w.kind != WeightKind::kInteger || (whole_row(w) && w.bits == 8)) return;
  const int zero = whole_row(w)                  ? w.integer_zero - 128
                   : w.zero == Zero::kSymmetric ? w.integer_zero
                   : w.bits == 8                ? 128
                                                : 0;
  const u8x64 offset = u8x64{} + (uint8_t)zero;  // unsigned: moving 8-bit codes by 128 wraps
  if (w.bits < 8) return unpack_codes(w, panel, offset, (uint8_t*)scratch);
  for (size_t i = 0; i < (size_t)w.k_padded * kLanes; i += 64) store(scratch + i, load<u8x64>(panel + i) - offset);
}

// Tile product `sum_tile` = activations x weights over group `g`. A macro: the intrinsics take literal tile numbers.
#define FLATOUT_MULTIPLY(sum_tile, a_tile, b_tile, codes, g)           \
  _tile_zero(sum_tile);                                                \
  for (int k = (g) * w.group; k < ((g) + 1) * w.group; k += depth) {   \
    _tile_loadd(a_tile, (codes) + k, w.row_stride);                      \
    _tile_loadd(b_tile, scratch + (size_t)k * kLanes, 64);             \
    _tile_dpbssd(sum_tile, a_tile, b_tile);                            \
  }

// ROWS tokens, one panel: accumulators stay in registers over all groups. A product's sums go through memory, which a load
// may not read before the store has left the core: they are scaled kBehind products later (right away: twice the time).
template <int ROWS, int PLANES, bool MINIMUM, bool ASYMMETRIC>
static void grouped_rows(const Linear& w, const uint8_t* panel, const int8_t* scratch, const Activations& a, int first,
                         bool fetch, float* out) {
  constexpr int kBehind = 8;
  alignas(64) int32_t sums[kBehind][kTileRows * kLanes];
  const int depth = std::min(w.group, 64);
  const int8_t* high = a.codes[0] + (size_t)first * w.row_stride;
  const int8_t* low = PLANES == 2 ? a.codes[1] + (size_t)first * w.row_stride : high;
  const size_t values = group_index(first, 0, w.groups);
  const float *a_scale = a.scales + values, *a_sum = a.scaled_sums + values;
  const uint8_t* scales = panel + w.scales_offset;
  const uint8_t* extra = panel + w.extra_offset;
  const bool bytes = w.scales == Scales::kByte;
  f32x16 acc[kTileRows];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) acc[r] = splat(0.0f);
  const uint8_t* ahead = panel + kPrefetchBytes;
  const size_t product_bytes = w.panel_bytes / (w.groups * PLANES);
  const auto add = [&](int product) __attribute__((always_inline)) {
    if (fetch) {
      for (size_t i = 0; i < product_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
      ahead += product_bytes;
    }
    const int g = product / PLANES, plane = product % PLANES;
    const int32_t* tile = sums[product % kBehind];
    const f32x16 scale = load_scale(w, scales, g);
    f32x16 minimum = {};
    i32x16 zero = {};
    if constexpr (MINIMUM) minimum = bytes ? load_scale(w, extra, g) * minimum_powers(w, panel) : load_scale(w, extra, g);
    if constexpr (ASYMMETRIC) {
      zero = widen_u8(extra + g * kLanes) - splat_i32(w.bits == 8 ? 128 : 0);
    }
    const int32_t* a_int = a.sums[plane] + values;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const size_t at = (size_t)g * kTileRows + r;
      i32x16 dot = load<i32x16>(tile + r * kLanes);
      // Unsigned: sums of rows past the last token may be anything.
      if constexpr (ASYMMETRIC) dot = (i32x16)((u32x16)dot - (u32x16)zero * (u32x16)splat_i32(a_int[at]));
      f32x16 c = splat(a_scale[at]) * scale;
      if (PLANES == 2 && plane == 0) c *= splat(128.0f);
      acc[r] = fma(to_float(dot), c, acc[r]);
      if constexpr (MINIMUM) acc[r] = fma(splat(a_sum[at]), minimum, acc[r]);
    }
  };
  const int products = w.groups * PLANES;
  for (int i = 0; i < products; i += 2) {
    FLATOUT_MULTIPLY(0, 4, 6, high, i / PLANES);
    if (i >= kBehind) add(i - kBehind);
    _tile_stored(0, sums[i % kBehind], 64);
    if (i + 1 == products) break;
    FLATOUT_MULTIPLY(1, 5, 7, low, (i + 1) / PLANES);
    if (i >= kBehind) add(i + 1 - kBehind);
    _tile_stored(1, sums[(i + 1) % kBehind], 64);
  }
  for (int i = std::max(0, products - kBehind); i < products; ++i) add(i);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) store(out + (size_t)r * kLanes, bytes ? acc[r] * scale_powers(w, panel) : acc[r]);
}

template <int PLANES, bool MINIMUM, bool ASYMMETRIC>
static void grouped_block(const Linear& w, const uint8_t* panel, const int8_t* scratch, const Activations& a, int first,
                          int count, bool fetch, float* out) {
  if (count <= kHalfTile)
    grouped_rows<kHalfTile, PLANES, MINIMUM, ASYMMETRIC>(w, panel, scratch, a, first, fetch, out);
  else
    grouped_rows<kTileRows, PLANES, MINIMUM, ASYMMETRIC>(w, panel, scratch, a, first, fetch, out);
}

// A 2 x 2 block of one-scale-a-row products whose sums wait to be scaled. The second row of tiles is 16 more tokens (one
// plane) or the low plane of the same 16 tokens (two planes).
struct WholeRowBlock {
  alignas(64) int32_t sums[4][kTileRows * kLanes];
  float* out[2];
  f32x16 scale[2];
  int first = 0, units = 0;  // a unit is 8 tokens of one panel; the panels take turns
};

// Scale one unit: the sums are of unsigned codes, so the weights' zero times the tokens' code sum comes off first.
static inline void scale_unit(const Linear& w, const Activations& a, const WholeRowBlock& b, int unit) {
  const int panel = unit % 2, token = unit / 2 * 8, row = token % kTileRows, tile = token / kTileRows * 2 + panel;
  const float* a_scale = a.scales + b.first + token;
  const int32_t* a_sum = a.sums[0] + b.first + token;
  const int32_t* high = b.sums[tile] + row * kLanes;
  float* out = b.out[panel] + (size_t)token * kLanes;
  const auto value = [&](const int32_t* sums, const int32_t* code_sums, int r) {
    return to_float(load<i32x16>(sums + r * kLanes) - (splat_i32(code_sums[r]) << 7));  // the zero is 128
  };
  if (w.planes == 1) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r)
      store(out + r * kLanes, fma(value(high, a_sum, r), splat(a_scale[r]) * b.scale[panel], splat(0.0f)));
    return;
  }
  const int32_t *low = b.sums[tile + 2] + row * kLanes, *a_low = a.sums[1] + b.first + token;
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    const f32x16 c = splat(a_scale[r]) * b.scale[panel];
    const f32x16 sum = fma(value(high, a_sum, r), c * splat(128.0f), splat(0.0f));
    store(out + r * kLanes, fma(value(low, a_low, r), c, sum));
  }
}

// A tile of weights into the caches. The stream runs on into the next panels, so it is never wasted.
static inline void fetch(const uint8_t* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) __builtin_prefetch(tile + 64 * i);
}

// One scale a row: 2 x 2 tiles share their operands, four products to four loads; the fp32 work of the last block is
// done between the products of the next.
// `codes`: those of each panel, a byte each.
static void whole_row_panels(const Linear& w, const uint8_t* const* panel, const uint8_t* const* codes,
                             const Activations& a, int first, int count, float* const* out) {
  WholeRowBlock blocks[2];
  blocks[1].units = 0;
  int side = 0;
  for (int m = 0; m < count; side ^= 1) {
    WholeRowBlock &now = blocks[side], &last = blocks[side ^ 1];
    const bool second = w.planes == 1 && count - m > kTileRows;
    const int8_t* upper = a.codes[0] + (size_t)(first + m) * w.row_stride;
    const int8_t* lower = w.planes == 2 ? a.codes[1] + (size_t)(first + m) * w.row_stride
                          : second      ? upper + (size_t)kTileRows * w.row_stride
                                        : nullptr;
    int unit = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < w.k_padded; k += 64) {
      _tile_loadd(4, upper + k, w.row_stride);
      _tile_loadd(6, codes[0] + (size_t)k * kLanes, 64);
      _tile_loadd(7, codes[1] + (size_t)k * kLanes, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (lower) {
        _tile_loadd(5, lower + k, w.row_stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
      if (m == 0) {
        fetch(panel[0] + (size_t)k * kLanes + kPrefetchBytes);
        fetch(panel[1] + (size_t)k * kLanes + kPrefetchBytes);
      }
      if (unit < last.units) scale_unit(w, a, last, unit++);
    }
    while (unit < last.units) scale_unit(w, a, last, unit++);
    _tile_stored(0, now.sums[0], 64);
    _tile_stored(1, now.sums[1], 64);
    if (lower) {
      _tile_stored(2, now.sums[2], 64);
      _tile_stored(3, now.sums[3], 64);
    }
    now.first = first + m;
    now.units = 2 * ((std::min(count - m, second ? 2 * kTileRows : kTileRows) + 7) / 8);
    for (int p = 0; p < 2; ++p) {
      now.out[p] = out[p] + (size_t)m * kLanes;
      now.scale[p] = load_scale(w, panel[p] + w.scales_offset, 0);
    }
    m += second ? 2 * kTileRows : kTileRows;
  }
  const WholeRowBlock& last = blocks[side ^ 1];
  for (int unit = 0; unit < last.units; ++unit) scale_unit(w, a, last, unit);
}

// bf16 weights and activations: the same 2 x 2 tiles, 32 columns a product, fp32 sums straight to `out`. Sums round in
// the order of the tile unit, so a token's bits differ from the vector kernel's by bf16-sized rounding at most.
static void bf16_block(const Linear& w, const uint8_t* const* panel, const Activations& a, int first, bool second,
                       float* const* out) {
  const uint16_t* upper = a.bf16 + (size_t)first * w.row_stride;
  const uint16_t* lower = second ? upper + (size_t)kTileRows * w.row_stride : upper;
  const size_t stride = (size_t)w.row_stride * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < w.k_padded; k += 32) {
    _tile_loadd(4, upper + k, stride);
    _tile_loadd(6, panel[0] + (size_t)k * kLanes * 2, 64);
    _tile_loadd(7, panel[1] + (size_t)k * kLanes * 2, 64);
    _tile_loadd(5, lower + k, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  if (second) {
    _tile_stored(2, out[0] + kTileRows * kLanes, 64);
    _tile_stored(3, out[1] + kTileRows * kLanes, 64);
  }
}

// Activation and result buffers hold a multiple of 16 rows, so a last, partial tile stays inside them.
void linear_panels_amx(const Linear& w, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                       const Activations& a, int first, int count, float* const* out) {
  const bool bf16 = w.kind == WeightKind::kBFloat16;
  if (w.kind == WeightKind::kFloat32 || count < kTileMinimum)
    return linear_panels(w, panel, panels, scratch, a, first, count, out);
  const uint8_t* panel_pair[2] = {panel[0], panel[panels - 1]};  // a last single panel is computed twice
  if (whole_row(w)) {
    const uint8_t* unpacked[2] = {(const uint8_t*)scratch[0], (const uint8_t*)scratch[panels - 1]};
    return whole_row_panels(w, panel_pair, w.bits == 8 ? panel_pair : unpacked, a, first, count, out);
  }
  const auto grouped = w.zero == Zero::kMinimum                       ? grouped_block<1, true, false>
                       : w.zero == Zero::kAsymmetric && w.planes == 2 ? grouped_block<2, false, true>
                       : w.zero == Zero::kAsymmetric                  ? grouped_block<1, false, true>
                       : w.planes == 2                                ? grouped_block<2, false, false>
                                                                      : grouped_block<1, false, false>;
  for (int m = 0; m < count;) {
    if (bf16) {
      const bool second = count - m > kTileRows;
      float* to[2] = {out[0] + (size_t)m * kLanes, out[1] + (size_t)m * kLanes};
      bf16_block(w, panel_pair, a, first + m, second, to);
      m += second ? 2 * kTileRows : kTileRows;
      continue;
    }
    for (int p = 0; p < panels; ++p)
      grouped(w, panel[p], scratch[p], a, first + m, count - m, m == 0, out[p] + (size_t)m * kLanes);
    m += kTileRows;
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
