// Prefill attention on the AMX tile unit: 16 tokens' queries of a head against a page at a time.
//
// With an int8 cache both products are exact int32 sums and the softmax between them is softmax.h's, so a query gets the
// same bits here as in attention.cpp. With a bf16 cache queries and probabilities are rounded to bf16 for the tiles.
#include <algorithm>

#include "kernels.h"
#include "softmax.h"
#include "tiles.h"

namespace flatout {
namespace FLATOUT_ISA {

// Scores: tiles 0-3 sums, 4 queries (depth bytes), 5-6 keys. Values: 0-1 sums, 2-3 values, 7 weights. A product takes
// `depth` bytes of a head: 64 int8 or 32 bf16 values where that divides the head.
static void configure_tiles(int depth) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) c.column_bytes[t] = 64, c.rows[t] = 16;
  c.column_bytes[4] = (uint16_t)depth;
  c.rows[5] = c.rows[6] = (uint8_t)(depth / 4);
  load_tile_config(c);
}

// A tile product of the cache's kind. A macro: the intrinsics take literal tile numbers.
#define FLATOUT_MULTIPLY(int8_product, sums, a, b) \
  if constexpr (INT8)                              \
    int8_product(sums, a, b);                      \
  else                                             \
    _tile_dpbf16ps(sums, a, b)

// Sixteen queries and the 64 keys of a page, as four tiles of 16 x 16 sums: int32, exact, or float.
template <bool INT8>
static inline void multiply_keys(const uint8_t* q, const uint8_t* page_keys, int row_bytes, int depth,
                                 float (*sums)[kTileRows * kLanes]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int e = 0; e < row_bytes; e += depth) {
    const uint8_t* keys = page_keys + (size_t)e * kPage;
    _tile_loadd(4, q + e, row_bytes);
    _tile_loadd(5, keys, 4 * kPage);
    _tile_loadd(6, keys + 64, 4 * kPage);
    FLATOUT_MULTIPLY(_tile_dpbsud, 0, 4, 5);
    FLATOUT_MULTIPLY(_tile_dpbsud, 1, 4, 6);
    _tile_loadd(5, keys + 128, 4 * kPage);
    _tile_loadd(6, keys + 192, 4 * kPage);
    FLATOUT_MULTIPLY(_tile_dpbsud, 2, 4, 5);
    FLATOUT_MULTIPLY(_tile_dpbsud, 3, 4, 6);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}

// Sixteen queries' weights of a page's keys, 8 bits or bf16, times its values: E / 16 tiles.
template <bool INT8>
static inline void multiply_values(const uint8_t* weights, const uint8_t* page_values, int E,
                                   float (*sums)[kTileRows * kLanes]) {
  constexpr int kWeightBytes = INT8 ? kPage : 2 * kPage;
  for (int d = 0; d < E; d += 2 * kLanes) {
    const bool pair = d + kLanes < E;
    _tile_zero(0);
    _tile_zero(1);
    for (int key_byte = 0; key_byte < kWeightBytes; key_byte += 64) {
      const uint8_t* values = page_values + (size_t)key_byte * E + 4 * d;
      _tile_loadd(7, weights + key_byte, kWeightBytes);
      _tile_loadd(2, values, 4 * E);
      FLATOUT_MULTIPLY(_tile_dpbusd, 0, 7, 2);
      if (pair) {
        _tile_loadd(3, values + 4 * kLanes, 4 * E);
        FLATOUT_MULTIPLY(_tile_dpbusd, 1, 7, 3);
      }
    }
    _tile_stored(0, sums[d / kLanes], 64);
    if (pair) _tile_stored(1, sums[d / kLanes + 1], 64);
  }
}
#undef FLATOUT_MULTIPLY

// What one query head keeps from page to page.
struct TileHead {
  SoftmaxBlock block;
  alignas(64) uint8_t q[kTileRows * kMaxHeadDim * 2];
  alignas(64) int32_t correction[kTileRows];  // the keys' codes are moved by 128
};

template <bool INT8>
static inline f32x16 load_sums(const float* p) {
  return INT8 ? to_float(load<i32x16>(p)) : load<f32x16>(p);
}

// A copy of a bf16 page's values [64 / 2][E][2] with zeros from slot `count` on: tiles multiply slots that no query sees
// by 0, and what an earlier sequence left there need not be a number.
static inline const uint8_t* seen_values(const uint8_t* values, int count, int E, uint16_t* copy) {
  std::memcpy(copy, values, (size_t)(count / 2) * E * 4);
  std::memset(copy + (size_t)(count / 2) * E * 2, 0, (size_t)(kPage / 2 - count / 2) * E * 4);
  for (int e = 0; count % 2 && e < E; ++e)
    std::memcpy(copy + ((size_t)(count / 2) * E + e) * 2, values + ((size_t)(count / 2) * E + e) * 4, 2);
  return (const uint8_t*)copy;
}

// Heads that share a page while it is in the first-level cache.
constexpr int kSharing = 4;

// The tile unit works ahead of the vector unit: while the softmax of one head and page is taken, it multiplies the keys
// for the next.
template <bool INT8>
static void attend_heads(const Attention& a, int depth, int heads) {
  const int E = a.head_dim_padded, rows = a.rows, row_bytes = INT8 ? E : 2 * E;
  TileHead state[kSharing];
  alignas(64) float dots[2][4][kTileRows * kLanes], scores[kTileRows][kPage];
  alignas(64) float weighted[kMaxHeadDim / kLanes][kTileRows * kLanes];
  alignas(64) uint8_t codes[kTileRows][kPage];  // rows past the last query: sums that nobody reads
  alignas(64) uint16_t rounded[kTileRows][kPage];
  const uint8_t* weights = INT8 ? codes[0] : (const uint8_t*)rounded[0];
  alignas(64) uint16_t copy[INT8 ? 1 : kPage * kMaxHeadDim];
  uint64_t visible[kTileRows];
  for (int h = 0; h < heads; ++h) {
    TileHead& s = state[h];
    const float* q = a.q + (size_t)h * a.head_dim;
    start(s.block, rows, E);
    if constexpr (INT8) {
      quantize_queries(a, q, (int8_t*)s.q, s.block.slope, s.correction);
      for (int r = 0; r < rows; ++r) s.correction[r] *= 128;
    } else {
      for (int r = 0; r < rows; ++r)
        round_row(q + (size_t)r * a.q_stride, a.head_dim, E, (uint16_t*)s.q + (size_t)r * E);
      store(s.block.slope, splat(a.scale * kLog2E));
      store(s.block.scale, splat(1.0f));
    }
  }
  const PageRange range = visible_pages(a);
  int side = 0;
  multiply_keys<INT8>(state[0].q, page_at(a, range.first).keys, row_bytes, depth, dots[side]);
  for (int p = range.first; p <= range.last; ++p) {
    const bool whole = see_page(a, p, visible);
    const Page page = page_at(a, p);
    const uint8_t* values =
        INT8 || whole ? page.values : seen_values(page.values, seen_keys(visible, rows), E, copy);
    f32x16 key_scales[4];
    for (int i = 0; INT8 && i < 4; ++i) key_scales[i] = load<f32x16>(page.key_scales + i * kLanes);
    for (int h = 0; h < heads; ++h, side ^= 1) {
      TileHead& s = state[h];
      if (h + 1 < heads)
        multiply_keys<INT8>(state[h + 1].q, page.keys, row_bytes, depth, dots[side ^ 1]);
      else if (p < range.last)
        multiply_keys<INT8>(state[0].q, page_at(a, p + 1).keys, row_bytes, depth, dots[side ^ 1]);
      const auto score = [&](int r, int i) {
        const float* sums = dots[side][i] + r * kLanes;
        if constexpr (INT8)
          return to_float(load<i32x16>(sums) - splat_i32(s.correction[r])) * key_scales[i];
        else
          return load<f32x16>(sums);
      };
      advance(s.block, whole, visible, rows, score, scores, INT8 ? page.value_scales : nullptr, codes);
      for (int r = 0; !INT8 && r < rows; ++r) round_row(scores[r], kPage, kPage, rounded[r]);
      multiply_values<INT8>(weights, values, E, weighted);
      for (int d = 0; d < E / kLanes; ++d)
        for (int r = 0; r < rows; ++r)
          add_values(s.block.chunk.out[d][r], load_sums<INT8>(weighted[d] + r * kLanes), s.block.shrinks,
                     s.block.shrink[r], s.block.scale[r]);
      if (ends_chunk(p, range)) fold(s.block, rows, E);
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int r = 0; r < rows; ++r)
      finish(state[h].block, r, a.head_dim, a.out + (size_t)r * a.out_stride + (size_t)h * a.head_dim);
}

void attend_amx(const Attention& a) {
  const bool int8 = a.cache_kind == CacheKind::kInt8;
  if (a.rows < 4 || !(int8 || (a.cache_kind == CacheKind::kBFloat16 && a.bf16_products))) return attend(a);
  int depth = 64;
  while (a.head_dim_padded * cached_bytes(a.cache_kind) % depth) depth /= 2;
  configure_tiles(depth);
  for (int h = 0; h < a.heads; h += kSharing) {
    Attention some = a;
    some.q += (size_t)h * a.head_dim;
    some.out += (size_t)h * a.head_dim;
    const int heads = std::min(kSharing, a.heads - h);
    if (int8)
      attend_heads<true>(some, depth, heads);
    else
      attend_heads<false>(some, depth, heads);
  }
  _tile_release();
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
