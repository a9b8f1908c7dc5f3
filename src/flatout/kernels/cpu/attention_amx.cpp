// Prefill attention on the AMX tile unit: 16 queries of one head against a page at a time, int8 cache.
//
// Both products are exact int32 sums and the softmax between them is softmax.h's, so a query gets the same bits here as
// in attention.cpp.
#include <algorithm>

#include "kernels.h"
#include "softmax.h"
#include "tiles.h"

namespace flatout {
namespace FLATOUT_ISA {

// Tiles 0-3 sums, 4 queries (depth bytes), 5 keys, 6 weights, 7 values.
static void configure_tiles(int depth) {
  TileConfig c;
  for (int t = 0; t < 8; ++t) c.column_bytes[t] = 64, c.rows[t] = 16;
  c.column_bytes[4] = (uint16_t)depth;
  c.rows[5] = (uint8_t)(depth / 4);
  load_tile_config(c);
}

static void attend_tile(const Attention& a, int first, int rows, int depth, SoftmaxBlock& block) {
  const int E = a.head_dim_padded;
  alignas(64) int8_t q[kTileRows * kMaxHeadDim];
  alignas(64) int32_t dots[kTileRows][kPage];
  alignas(64) uint8_t weights[kTileRows][kPage];  // rows past the last query: sums that nobody reads
  alignas(64) int32_t sums[kTileRows][kLanes];
  float q_scale[kTileRows];
  int32_t q_sum[kTileRows];
  Visible visible[kTileRows];
  for (int r = 0; r < rows; ++r)
    q_scale[r] = quantize_query(a.q + (size_t)(first + r) * a.q_stride, a.head_dim, E, a.scale, q + r * E, &q_sum[r]);
  for (int p = 0; p * kPage <= a.first_position + first + rows - 1; ++p) {
    if (!visible_rows(a, first, rows, p, visible)) continue;
    const Int8Page page = int8_page(a.cache + a.pages[p] * a.page_stride, E);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int e = 0; e < E; e += depth) {
      _tile_loadd(4, q + e, E);
      const uint8_t* keys = page.keys + (size_t)e * kPage;
      _tile_loadd(5, keys, 4 * kPage);
      _tile_dpbsud(0, 4, 5);
      _tile_loadd(5, keys + 64, 4 * kPage);
      _tile_dpbsud(1, 4, 5);
      _tile_loadd(5, keys + 128, 4 * kPage);
      _tile_dpbsud(2, 4, 5);
      _tile_loadd(5, keys + 192, 4 * kPage);
      _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, &dots[0][0], sizeof dots[0]);
    _tile_stored(1, &dots[0][16], sizeof dots[0]);
    _tile_stored(2, &dots[0][32], sizeof dots[0]);
    _tile_stored(3, &dots[0][48], sizeof dots[0]);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < 4; ++i)
        store_score(block, r, i, load<i32x16>(dots[r] + i * kLanes) - splat_i32(128 * q_sum[r]), q_scale[r],
                    page.key_scales);
    advance(block, visible, rows);
    quantize_weights(block, page.value_scales, rows, weights);
    _tile_loadd(6, weights, kPage);
    for (int d = 0; d < E; d += kLanes) {
      _tile_zero(0);
      _tile_loadd(7, page.values + 4 * d, 4 * E);
      _tile_dpbusd(0, 6, 7);
      _tile_stored(0, sums, sizeof sums[0]);
      for (int r = 0; r < rows; ++r) add_values(block, r, d, load<i32x16>(sums[r]));
    }
  }
}

void attend_amx(const Attention& a, bool int8_cache) {
  if (!int8_cache || a.rows < 4) return attend(a, int8_cache);
  int depth = 64;  // columns a tile product takes: the largest that divides the padded head
  while (a.head_dim_padded % depth) depth /= 2;
  configure_tiles(depth);
  SoftmaxBlock block;
  for (int first = 0; first < a.rows; first += kTileRows) {
    const int rows = std::min(kTileRows, a.rows - first);
    start(block, rows, a.head_dim_padded);
    attend_tile(a, first, rows, depth, block);
    for (int r = 0; r < rows; ++r) finish(block, r, a.head_dim, a.out + (size_t)(first + r) * a.out_stride);
  }
  _tile_release();
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
