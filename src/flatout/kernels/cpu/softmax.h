// The online softmax over one 64-key page, shared by the vector and the tile version of attention.
//
// Both feed it exact int32 products and get back 8-bit probabilities, so a token's attention is the same bits whether
// it was computed alone (decode) or in a block of 16 queries (prefill).
#pragma once

#include <limits>

#include "ops.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

constexpr int kMaxHeadDim = 256;

// Running softmax of one query: greatest score so far, denominator, weighted values.
struct SoftmaxRow {
  float top = -std::numeric_limits<float>::infinity();
  float total = 0.0f;
  alignas(64) float out[kMaxHeadDim] = {};
};

// Keys of a page that a query sees: [begin, end) within the page.
struct Visible {
  int begin, end;
};

static inline Visible visible_keys(const Attention& a, int row, int page_start) {
  const int position = a.first_position + row;
  int begin = a.window > 0 ? position - a.window + 1 - page_start : 0;
  int end = position + 1 - page_start;
  return {begin < 0 ? 0 : begin, end > kPage ? kPage : end};
}

static inline i32x16 seen_lanes(Visible v, int first_key) {
  i32x16 key = iota() + splat_i32(first_key);
  return (key >= splat_i32(v.begin)) & (key < splat_i32(v.end));
}

// Scores of one page (masked lanes are -inf) -> probabilities relative to the new running maximum; returns the factor
// by which earlier sums shrink.
static inline float advance(SoftmaxRow& row, f32x16 score[4], Visible v, f32x16 probability[4]) {
  const f32x16 hidden = splat(-std::numeric_limits<float>::infinity());
  f32x16 top = hidden;
  for (int i = 0; i < 4; ++i) {
    score[i] = select(seen_lanes(v, i * kLanes), score[i], hidden);
    top = max(score[i], top);
  }
  float page_top = max_lane(top);
  float new_top = page_top > row.top ? page_top : row.top;
  float shrink = exp(splat(row.top - new_top))[0];
  f32x16 total = splat(0.0f);
  for (int i = 0; i < 4; ++i) {
    probability[i] = select(seen_lanes(v, i * kLanes), exp(score[i] - splat(new_top)), splat(0.0f));
    total += probability[i];
  }
  row.total = row.total * shrink + sum(total);
  row.top = new_top;
  return shrink;
}

struct PageWeights {
  float shrink, scale;
};

// int8 page: products q.k -> 8-bit weights of the values. score = dot * (q_scale * key_scale); weight = p * value_scale
// as a multiple of the page's greatest such weight / 255.
static inline PageWeights int8_weights(SoftmaxRow& row, const int32_t* dots, float q_scale, const float* key_scales,
                                       const float* value_scales, Visible v, uint8_t* codes) {
  f32x16 score[4], p[4];
  for (int i = 0; i < 4; ++i)
    score[i] = to_float(load<i32x16>(dots + i * kLanes)) * (splat(q_scale) * load<f32x16>(key_scales + i * kLanes));
  float shrink = advance(row, score, v, p);
  f32x16 top = splat(0.0f);
  for (int i = 0; i < 4; ++i) {
    p[i] = select(seen_lanes(v, i * kLanes), p[i] * load<f32x16>(value_scales + i * kLanes), splat(0.0f));
    top = max(p[i], top);
  }
  float greatest = max_lane(top), inverse = greatest > 0.0f ? 255.0f / greatest : 0.0f;
  for (int i = 0; i < 4; ++i) store_u8(codes + i * kLanes, round_to_int(p[i] * splat(inverse)));
  return {shrink, greatest / 255.0f};
}

static inline void add_values(SoftmaxRow& row, int d, i32x16 dot, PageWeights w) {
  f32x16 old = load<f32x16>(row.out + d) * splat(w.shrink);
  store(row.out + d, fma(to_float(dot), splat(w.scale), old));
}

// q as signed bytes with one scale (softmax scale folded in); returns q_scale, sets the sum of codes.
static inline float quantize_query(const float* q, int head_dim, int head_dim_padded, float softmax_scale,
                                   int8_t* codes, int32_t* code_sum) {
  f32x16 m = splat(0.0f);
  for (int i = 0; i < head_dim; i += kLanes) m = max(absolute(load_some(q + i, head_dim - i)), m);
  const float amax = max_lane(m), inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
  i32x16 total = {};
  for (int i = 0; i < head_dim_padded; i += kLanes) {
    f32x16 v = i < head_dim ? load_some(q + i, head_dim - i) : splat(0.0f);
    i32x16 code = round_to_int(v * splat(inverse));
    total += code;
    store_u8((uint8_t*)codes + i, code);
  }
  *code_sum = sum(total);
  return amax / 127.0f * softmax_scale;
}

static inline void finish(const SoftmaxRow& row, int head_dim, float* out) {
  const f32x16 inverse = splat(1.0f / row.total);
  for (int d = 0; d < head_dim; d += kLanes) store_some(out + d, load<f32x16>(row.out + d) * inverse, head_dim - d);
}

// Parts of an int8 page of one kv head.
struct Int8Page {
  const uint8_t* keys;
  const int8_t* values;
  const float *key_scales, *value_scales;
};
static inline Int8Page int8_page(const uint8_t* page, int head_dim_padded) {
  const size_t half = (size_t)kPage * head_dim_padded;
  const float* scales = (const float*)(page + 2 * half);
  return {page, (const int8_t*)(page + half), scales, scales + kPage};
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
