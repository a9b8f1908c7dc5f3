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

// Running softmax of up to 16 queries: greatest score so far, denominator, weighted values. Kept as arrays over the
// queries because each step of one query waits for the last, while queries do not wait for each other.
struct SoftmaxBlock {
  alignas(64) float top[kTileRows], total[kTileRows];
  alignas(64) float shrink[kTileRows], scale[kTileRows];  // of the page at hand: old sums shrink, new products scale
  alignas(64) float score[kTileRows][kPage];
  alignas(64) float out[kTileRows][kMaxHeadDim];
};

static inline void start(SoftmaxBlock& b, int rows, int head_dim_padded) {
  store(b.top, splat(-std::numeric_limits<float>::infinity()));
  store(b.total, splat(0.0f));
  store(b.shrink, splat(1.0f));
  store(b.scale, splat(0.0f));
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < head_dim_padded; d += kLanes) store(b.out[r] + d, splat(0.0f));
}

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

// What rows first .. first + rows see of page p; false when that is nothing for all of them.
static inline bool visible_rows(const Attention& a, int first, int rows, int p, Visible* visible) {
  bool any = false;
  for (int r = 0; r < rows; ++r) {
    visible[r] = visible_keys(a, first + r, p * kPage);
    any |= visible[r].begin < visible[r].end;
  }
  return any;
}

static inline bool whole(Visible v) { return v.begin == 0 && v.end == kPage; }
static inline f32x16 masked(Visible v, int i, f32x16 x, float hidden) {
  return whole(v) ? x : select(seen_lanes(v, i * kLanes), x, splat(hidden));
}

// Exact products of an int8 page -> scores.
static inline void store_score(SoftmaxBlock& b, int r, int i, i32x16 dot, float q_scale, const float* key_scales) {
  store(b.score[r] + i * kLanes, to_float(dot) * (splat(q_scale) * load<f32x16>(key_scales + i * kLanes)));
}

// b.score of a page -> probabilities relative to the new running maximum, in place.
static inline void advance(SoftmaxBlock& b, const Visible* visible, int rows) {
  const float hidden = -std::numeric_limits<float>::infinity();
  alignas(64) float page_top[kTileRows];
  store(page_top, splat(hidden));
  for (int r = 0; r < rows; ++r) {
    f32x16 top = splat(hidden);
    for (int i = 0; i < 4; ++i) {
      const f32x16 s = masked(visible[r], i, load<f32x16>(b.score[r] + i * kLanes), hidden);
      store(b.score[r] + i * kLanes, s);
      top = max(s, top);
    }
    page_top[r] = max_lane(top);
  }
  const f32x16 old_top = load<f32x16>(b.top), top = max(load<f32x16>(page_top), old_top);
  const f32x16 shrink = select(top == old_top, splat(1.0f), exp(old_top - top));
  store(b.top, top);
  store(b.shrink, shrink);
  alignas(64) float sums[kTileRows] = {};
  for (int r = 0; r < rows; ++r) {
    f32x16 total = splat(0.0f);
    for (int i = 0; i < 4; ++i) {
      f32x16 p = exp(load<f32x16>(b.score[r] + i * kLanes) - splat(b.top[r]));
      p = masked(visible[r], i, p, 0.0f);
      store(b.score[r] + i * kLanes, p);
      total += p;
    }
    sums[r] = sum(total);
  }
  store(b.total, load<f32x16>(b.total) * shrink + load<f32x16>(sums));
}

// Probabilities of an int8 page -> 8-bit weights of its values: p * value_scale as a multiple of the page's greatest
// such weight / 255. Keys that a query does not see have weight 0.
static inline void quantize_weights(SoftmaxBlock& b, const float* value_scales, int rows, uint8_t (*codes)[kPage]) {
  alignas(64) float greatest[kTileRows] = {};
  for (int r = 0; r < rows; ++r) {
    f32x16 top = splat(0.0f);
    for (int i = 0; i < 4; ++i) {
      const f32x16 w = load<f32x16>(b.score[r] + i * kLanes);
      // A hidden key's scale may be left from another sequence: 0 times it must stay 0 whatever it is.
      const f32x16 weight = select(w > splat(0.0f), w * load<f32x16>(value_scales + i * kLanes), splat(0.0f));
      store(b.score[r] + i * kLanes, weight);
      top = max(weight, top);
    }
    greatest[r] = max_lane(top);
  }
  const f32x16 g = load<f32x16>(greatest);
  alignas(64) float inverse[kTileRows];
  store(inverse, select(g > splat(0.0f), splat(255.0f) / g, splat(0.0f)));
  store(b.scale, g * splat(1.0f / 255.0f));
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < 4; ++i)
      store_u8(codes[r] + i * kLanes, round_to_int(load<f32x16>(b.score[r] + i * kLanes) * splat(inverse[r])));
}

static inline void add_values(SoftmaxBlock& b, int r, int d, i32x16 dot) {
  const f32x16 old = load<f32x16>(b.out[r] + d) * splat(b.shrink[r]);
  store(b.out[r] + d, fma(to_float(dot), splat(b.scale[r]), old));
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

static inline void finish(const SoftmaxBlock& b, int r, int head_dim, float* out) {
  const f32x16 inverse = splat(1.0f / b.total[r]);
  for (int d = 0; d < head_dim; d += kLanes) store_some(out + d, load<f32x16>(b.out[r] + d) * inverse, head_dim - d);
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
