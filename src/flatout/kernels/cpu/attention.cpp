// Causal attention of a few queries over a paged KV cache, one query at a time, and the cache's writer.
//
// Bytes: each page once a query (it stays in L1 across the query heads of a group). Operations: 4 E per key and query.
// Pages are visited in order of position and the softmax block is the page, so the result does not depend on how
// queries were grouped, chunked or spread over threads.
#include <algorithm>

#include "kernels.h"
#include "softmax.h"

namespace flatout {
namespace FLATOUT_ISA {

static int8_t code_of(float v, float inverse) {
  return (int8_t)std::clamp((int)std::nearbyintf(v * inverse), -127, 127);
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
  float k_max = 0.0f, v_max = 0.0f;
  for (int e = 0; e < head_dim; ++e) {
    k_max = std::max(k_max, std::fabs(k[e]));
    v_max = std::max(v_max, std::fabs(v[e]));
  }
  const float k_inverse = k_max > 0.0f ? 127.0f / k_max : 0.0f, v_inverse = v_max > 0.0f ? 127.0f / v_max : 0.0f;
  for (int e = 0; e < E; ++e) {
    int8_t key = e < head_dim ? code_of(k[e], k_inverse) : 0;
    int8_t value = e < head_dim ? code_of(v[e], v_inverse) : 0;
    keys[((size_t)(e / 4) * kPage + slot) * 4 + e % 4] = (uint8_t)(key + 128);
    values[((size_t)(slot / 4) * E + e) * 4 + slot % 4] = value;
  }
  scales[slot] = k_max / 127.0f;
  scales[kPage + slot] = v_max / 127.0f;
}

static void attend_int8(const Attention& a, int r, SoftmaxRow& row) {
  const int E = a.head_dim_padded;
  alignas(64) int8_t q[kMaxHeadDim];
  int32_t q_sum;
  const float q_scale = quantize_query(a.q + (size_t)r * a.q_stride, a.head_dim, E, a.scale, q, &q_sum);
  for (int p = 0; p * kPage <= a.first_position + r; ++p) {
    const Visible v = visible_keys(a, r, p * kPage);
    if (v.begin >= v.end) continue;
    const Int8Page page = int8_page(a.cache + a.pages[p] * a.page_stride, E);
    alignas(64) int32_t dots[kPage];
    i32x16 dot[4];
    for (int i = 0; i < 4; ++i) dot[i] = splat_i32(-128 * q_sum);
    for (int e = 0; e < E; e += 4) {
      int32_t four;
      std::memcpy(&four, q + e, 4);
      const uint8_t* line = page.keys + (size_t)e * kPage;
      for (int i = 0; i < 4; ++i) dot[i] = dot_us(dot[i], load<u8x64>(line + 64 * i), four);
    }
    for (int i = 0; i < 4; ++i) store(dots + i * kLanes, dot[i]);
    alignas(64) uint8_t weights[kPage];
    const PageWeights w = int8_weights(row, dots, q_scale, page.key_scales, page.value_scales, v, weights);
    for (int d = 0; d < E; d += kLanes) {
      i32x16 sum_v = {};
      for (int key = 0; key < kPage; key += 4) {
        int32_t four;
        std::memcpy(&four, weights + key, 4);
        sum_v = dot_su(sum_v, load<u8x64>(page.values + (size_t)key * E + 4 * d), four);
      }
      add_values(row, d, sum_v, w);
    }
  }
}

static void attend_bf16(const Attention& a, int r, SoftmaxRow& row) {
  const int E = a.head_dim_padded;
  const float* q = a.q + (size_t)r * a.q_stride;
  for (int p = 0; p * kPage <= a.first_position + r; ++p) {
    const Visible v = visible_keys(a, r, p * kPage);
    if (v.begin >= v.end) continue;
    const uint16_t* keys = (const uint16_t*)(a.cache + a.pages[p] * a.page_stride);
    const uint16_t* values = keys + (size_t)kPage * E;
    f32x16 score[4] = {};
    for (int e = 0; e < a.head_dim; ++e)
      for (int i = 0; i < 4; ++i)
        score[i] = fma(from_bf16(keys + (size_t)e * kPage + i * kLanes), splat(q[e]), score[i]);
    for (int i = 0; i < 4; ++i) score[i] *= splat(a.scale);
    f32x16 probability[4];
    const float shrink = advance(row, score, v, probability);
    for (int d = 0; d < E; d += kLanes) {
      f32x16 out = load<f32x16>(row.out + d) * splat(shrink);
      for (int key = v.begin; key < v.end; ++key)
        out = fma(from_bf16(values + (size_t)key * E + d), splat(probability[key / kLanes][key % kLanes]), out);
      store(row.out + d, out);
    }
  }
}

void attend(const Attention& a, bool int8_cache) {
  for (int r = 0; r < a.rows; ++r) {
    SoftmaxRow row;
    if (int8_cache)
      attend_int8(a, r, row);
    else
      attend_bf16(a, r, row);
    finish(row, a.head_dim, a.out + (size_t)r * a.out_stride);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
