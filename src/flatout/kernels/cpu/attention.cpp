// Causal attention of a few queries over a paged KV cache, and the cache's writer.
//
// Bytes: each page once for 16 queries. Operations: 4 E per key and query.
// Pages are visited in order of position and the softmax block is the page, so the result does not depend on how
// queries were grouped, chunked or spread over threads.
#include "kernels.h"
#include "softmax.h"

namespace flatout {
namespace FLATOUT_ISA {

// One head's values as signed bytes with one scale; returns the scale.
static float quantize_head(const float* x, int head_dim, int head_dim_padded, int8_t* codes) {
  f32x16 m = splat(0.0f);
  for (int i = 0; i < head_dim; i += kLanes) m = max(absolute(load_some(x + i, head_dim - i)), m);
  const float amax = max_lane(m), inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
  for (int i = 0; i < head_dim_padded; i += kLanes) {
    const f32x16 v = i < head_dim ? load_some(x + i, head_dim - i) : splat(0.0f);
    store_u8((uint8_t*)codes + i, round_to_int(v * splat(inverse)));
  }
  return amax / 127.0f;
}

void write_kv(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, bool int8_cache,
              uint8_t* page) {
  const int E = head_dim_padded;
  if (!int8_cache) {
    uint16_t *keys = (uint16_t*)page, *values = keys + (size_t)kPage * E;
    for (int e = 0; e < E; ++e) {
      keys[(size_t)e * kPage + slot] = e < head_dim ? to_bf16(k[e]) : 0;
      values[(size_t)slot * E + e] = e < head_dim ? to_bf16(v[e]) : 0;
    }
    return;
  }
  const size_t half = (size_t)kPage * E;
  uint8_t* keys = page;
  int8_t* values = (int8_t*)(page + half);
  float* scales = (float*)(page + 2 * half);
  alignas(64) int8_t key[kMaxHeadDim], value[kMaxHeadDim];
  scales[slot] = quantize_head(k, head_dim, E, key);
  scales[kPage + slot] = quantize_head(v, head_dim, E, value);
  for (int e = 0; e < E; e += 4) {
    uint32_t four;
    std::memcpy(&four, key + e, 4);
    four ^= 0x80808080u;  // + 128 in each byte
    std::memcpy(keys + ((size_t)(e / 4) * kPage + slot) * 4, &four, 4);
  }
  int8_t* to = values + (size_t)(slot / 4) * E * 4 + slot % 4;
  for (int e = 0; e < E; ++e) to[4 * e] = value[e];
}

// Queries first .. first + rows of the block against an int8 cache.
static void attend_int8(const Attention& a, int first, int rows, SoftmaxBlock& block) {
  const int E = a.head_dim_padded;
  alignas(64) int8_t q[kTileRows][kMaxHeadDim];
  alignas(64) uint8_t weights[kTileRows][kPage];
  float q_scale[kTileRows];
  int32_t q_sum[kTileRows];
  Visible visible[kTileRows];
  for (int r = 0; r < rows; ++r)
    q_scale[r] = quantize_query(a.q + (size_t)(first + r) * a.q_stride, a.head_dim, E, a.scale, q[r], &q_sum[r]);
  for (int p = 0; p * kPage <= a.first_position + first + rows - 1; ++p) {
    if (!visible_rows(a, first, rows, p, visible)) continue;
    const Int8Page page = int8_page(a.cache + a.pages[p] * a.page_stride, E);
    for (int r = 0; r < rows; ++r) {
      i32x16 dot[4];
      for (int i = 0; i < 4; ++i) dot[i] = splat_i32(-128 * q_sum[r]);
      for (int e = 0; e < E; e += 4) {
        int32_t four;
        std::memcpy(&four, q[r] + e, 4);
        const uint8_t* line = page.keys + (size_t)e * kPage;
        for (int i = 0; i < 4; ++i) dot[i] = dot_us(dot[i], load<u8x64>(line + 64 * i), four);
      }
      for (int i = 0; i < 4; ++i) store_score(block, r, i, dot[i], q_scale[r], page.key_scales);
    }
    advance(block, visible, rows);
    quantize_weights(block, page.value_scales, rows, weights);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < E; d += kLanes) {
        i32x16 dot = {};
        for (int key = 0; key < kPage; key += 4) {
          int32_t four;
          std::memcpy(&four, weights[r] + key, 4);
          dot = dot_su(dot, load<u8x64>(page.values + (size_t)key * E + 4 * d), four);
        }
        add_values(block, r, d, dot);
      }
  }
}

// The same against a bf16 cache: fp32 arithmetic on the widened values, each page widened once for all queries.
static void attend_bf16(const Attention& a, int first, int rows, SoftmaxBlock& block) {
  const int E = a.head_dim_padded;
  alignas(64) float keys[kMaxHeadDim * kPage], values[kMaxHeadDim * kPage];
  Visible visible[kTileRows];
  for (int p = 0; p * kPage <= a.first_position + first + rows - 1; ++p) {
    if (!visible_rows(a, first, rows, p, visible)) continue;
    const uint16_t* page = (const uint16_t*)(a.cache + a.pages[p] * a.page_stride);
    for (int i = 0; i < E * kPage; i += kLanes) {
      store(keys + i, from_bf16(page + i));
      store(values + i, from_bf16(page + (size_t)kPage * E + i));
    }
    for (int r = 0; r < rows; ++r) {
      const float* q = a.q + (size_t)(first + r) * a.q_stride;
      f32x16 score[4] = {};
      for (int e = 0; e < a.head_dim; ++e)
        for (int i = 0; i < 4; ++i)
          score[i] = fma(load<f32x16>(keys + (size_t)e * kPage + i * kLanes), splat(q[e]), score[i]);
      for (int i = 0; i < 4; ++i) store(block.score[r] + i * kLanes, score[i] * splat(a.scale));
    }
    advance(block, visible, rows);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < E; d += kLanes) {
        f32x16 out = load<f32x16>(block.out[r] + d) * splat(block.shrink[r]);
        for (int key = visible[r].begin; key < visible[r].end; ++key)
          out = fma(load<f32x16>(values + (size_t)key * E + d), splat(block.score[r][key]), out);
        store(block.out[r] + d, out);
      }
  }
}

void attend(const Attention& a, bool int8_cache) {
  SoftmaxBlock block;
  for (int first = 0; first < a.rows; first += kTileRows) {
    const int rows = a.rows - first < kTileRows ? a.rows - first : kTileRows;
    start(block, rows, a.head_dim_padded);
    if (int8_cache)
      attend_int8(a, first, rows, block);
    else
      attend_bf16(a, first, rows, block);
    for (int r = 0; r < rows; ++r) finish(block, r, a.head_dim, a.out + (size_t)(first + r) * a.out_stride);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
