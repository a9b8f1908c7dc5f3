// The online softmax over one 64-key page, shared by the vector and the tile version of attention.
//
// Both feed it exact int32 products and get back 8-bit probabilities, so a token's attention is the same bits whether
// it was computed alone (decode) or in a block of 16 queries (prefill).
#pragma once

#include <algorithm>
#include <limits>

#include "ops.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

constexpr int kMaxHeadDim = 256;

// The attention of up to 16 queries over some keys: greatest score, denominator, weighted values. Kept as arrays over the
// queries because each step of one query waits for the last, while queries do not wait for each other.
struct Sums {
  alignas(64) float top[kTileRows], total[kTileRows];
  alignas(64) float out[kMaxHeadDim / kLanes][kTileRows][kLanes];  // in the order of the tiles that are added to it
};

// A score becomes a probability by 2^(slope * (score - top)); the slope holds log2(e), the softmax scale and the query's
// own scale. Pages are summed into `chunk`, which is folded into `all` every kChunk pages: so the result is the same bits
// whether one thread takes all pages or several take a chunk each.
struct SoftmaxBlock {
  alignas(64) float slope[kTileRows];
  alignas(64) float shrink[kTileRows], scale[kTileRows];  // of the page at hand: old sums shrink, new products scale
  bool shrinks;                                           // some query's does
  Sums chunk, all;
};

static inline void clear(Sums& s, int rows, int head_dim_padded) {
  store(s.top, splat(-std::numeric_limits<float>::infinity()));
  store(s.total, splat(0.0f));
  for (int d = 0; d < head_dim_padded / kLanes; ++d)
    for (int r = 0; r < rows; ++r) store(s.out[d][r], splat(0.0f));
}

static inline void start(SoftmaxBlock& b, int rows, int head_dim_padded) {
  store(b.slope, splat(0.0f));
  clear(b.chunk, rows, head_dim_padded);
  clear(b.all, rows, head_dim_padded);
}

// all += chunk; chunk = nothing
static inline void fold(SoftmaxBlock& b, int rows, int head_dim_padded) {
  const f32x16 slope = load<f32x16>(b.slope), old_top = load<f32x16>(b.all.top), new_top = load<f32x16>(b.chunk.top);
  const f32x16 top = max(new_top, old_top);
  const auto shrink = [&](f32x16 t) { return select(t == top, splat(1.0f), exp2((t - top) * slope)); };
  const f32x16 old_factor = shrink(old_top), new_factor = shrink(new_top);
  alignas(64) float factors[2][kTileRows];
  store(factors[0], old_factor);
  store(factors[1], new_factor);
  store(b.all.top, top);
  store(b.all.total, fma(load<f32x16>(b.all.total), old_factor, load<f32x16>(b.chunk.total) * new_factor));
  for (int d = 0; d < head_dim_padded / kLanes; ++d)
    for (int r = 0; r < rows; ++r)
      store(b.all.out[d][r], fma(load<f32x16>(b.all.out[d][r]), splat(factors[0][r]),
                                 load<f32x16>(b.chunk.out[d][r]) * splat(factors[1][r])));
  clear(b.chunk, rows, head_dim_padded);
}

// Pages of which some row sees something, from the first to the last.
struct PageRange {
  int first, last;
};
static inline PageRange visible_pages(const Attention& a) {
  const int begin = a.window > 0 ? a.first_position - a.window + 1 : 0;
  const PageRange all = {begin < 0 ? 0 : begin / kPage, (a.first_position + (a.rows - 1) * a.step) / kPage};
  if (!a.partial) return all;
  return {std::max(all.first, a.chunk * kChunk), std::min(all.last, a.chunk * kChunk + kChunk - 1)};
}
static inline bool ends_chunk(int page, PageRange range) { return page == range.last || page % kChunk == kChunk - 1; }

// What each row sees of page p, a bit a key; true when that is all of it for all of them.
constexpr uint64_t kAllKeys = ~(uint64_t)0;
static inline bool see_page(const Attention& a, int p, uint64_t* visible) {
  const auto before = [](int key) { return key <= 0 ? 0 : key >= kPage ? kAllKeys : ((uint64_t)1 << key) - 1; };
  bool whole = true;
  for (int r = 0; r < a.rows; ++r) {
    const int key = a.first_position + r * a.step - p * kPage;  // the query's own
    visible[r] = before(key + 1);
    if (a.window > 0) visible[r] &= ~before(key - a.window + 1);
    whole &= visible[r] == kAllKeys;
  }
  return whole;
}

// Keys up to the last one that some row sees.
static inline int seen_keys(const uint64_t* visible, int rows) {
  uint64_t any = 0;
  for (int r = 0; r < rows; ++r) any |= visible[r];
  return any ? kPage - __builtin_clzll(any) : 0;
}

// A page's scores -> probabilities relative to the new running maximum, left in `scores`. `score(r, i)` gives keys 16 i ..
// 16 i + 15 of query r. With value_scales (an int8 page) `scores` is left with probability * value scale, and `codes`
// with those weights as multiples of the page's greatest / 255. Keys that a query does not see weigh 0, whatever their
// slot holds.
template <bool MASKED, class Score>
static inline __attribute__((always_inline)) void advance_page(SoftmaxBlock& b, const uint64_t* visible, int rows,
                                                               Score score, float (*scores)[kPage],
                                                               const float* value_scales, uint8_t (*codes)[kPage]) {
  const f32x16 hidden = splat(-std::numeric_limits<float>::infinity());
  f32x16 best[kTileRows], sums[kTileRows];
  for (int r = 0; r < rows; ++r) {
    f32x16 s[4];
    for (int i = 0; i < 4; ++i) {
      s[i] = score(r, i);
      if (MASKED) s[i] = select_bits((uint16_t)(visible[r] >> (i * kLanes)), s[i], hidden);
      store(scores[r] + i * kLanes, s[i]);
    }
    best[r] = max(max(s[0], s[1]), max(s[2], s[3]));
  }
  const f32x16 slope = load<f32x16>(b.slope), old_top = load<f32x16>(b.chunk.top);
  const f32x16 top = max(max_rows(best, rows), old_top);
  const i32x16 moved = top != old_top;
  const f32x16 shrink = select(moved, exp2((old_top - top) * slope), splat(1.0f));
  b.shrinks = false;
  for (int r = 0; r < rows; ++r) b.shrinks |= moved[r] != 0;
  alignas(64) float offset[kTileRows];
  store(offset, -(top * slope));
  store(b.chunk.top, top);
  store(b.shrink, shrink);
  for (int r = 0; r < rows; ++r) {
    f32x16 p[4];
    for (int i = 0; i < 4; ++i) {
      p[i] = exp2(fma(load<f32x16>(scores[r] + i * kLanes), splat(b.slope[r]), splat(offset[r])));
      if (MASKED) p[i] = select_bits((uint16_t)(visible[r] >> (i * kLanes)), p[i], splat(0.0f));
    }
    sums[r] = ((p[0] + p[1]) + p[2]) + p[3];
    if (value_scales) {
      for (int i = 0; i < 4; ++i) {
        const f32x16 weight = p[i] * load<f32x16>(value_scales + i * kLanes);
        // A hidden key's scale may be left from another sequence: 0 times it must stay 0 whatever it is.
        p[i] = MASKED ? select(p[i] > splat(0.0f), weight, splat(0.0f)) : weight;
      }
      best[r] = max(max(p[0], p[1]), max(p[2], p[3]));
    }
    for (int i = 0; i < 4; ++i) store(scores[r] + i * kLanes, p[i]);
  }
  store(b.chunk.total, fma(load<f32x16>(b.chunk.total), shrink, sum_rows(sums, rows)));
  if (!value_scales) return;
  const f32x16 greatest = max_rows(best, rows);
  alignas(64) float inverse[kTileRows];
  store(inverse, select(greatest > splat(0.0f), splat(255.0f) / greatest, splat(0.0f)));
  store(b.scale, greatest * splat(1.0f / 255.0f));
  for (int r = 0; r < rows; ++r) {
    const auto code = [&](int i) {
      return round_to_int(load<f32x16>(scores[r] + i * kLanes) * splat(inverse[r]));
    };
    store_bytes<false>(codes[r], code(0), code(1), code(2), code(3));
  }
}
template <class Score>
static inline __attribute__((always_inline)) void advance(SoftmaxBlock& b, bool whole, const uint64_t* visible,
                                                          int rows, Score score, float (*scores)[kPage],
                                                          const float* value_scales, uint8_t (*codes)[kPage]) {
  if (whole)
    advance_page<false>(b, visible, rows, score, scores, value_scales, codes);
  else
    advance_page<true>(b, visible, rows, score, scores, value_scales, codes);
}

// out = out * shrink + product * scale
static inline void add_values(float* out, f32x16 product, bool shrinks, float shrink, float scale) {
  f32x16 old = load<f32x16>(out);
  if (shrinks) old *= splat(shrink);
  store(out, fma(product, splat(scale), old));
}

// Queries as signed bytes, each with one scale: their codes, the slopes of their softmaxes and the sums of codes.
static inline void quantize_queries(const Attention& a, const float* q, int8_t* codes, float* slope,
                                    int32_t* code_sums) {
  const int E = a.head_dim_padded;
  f32x16 tops[kTileRows];
  i32x16 totals[kTileRows];
  const auto values = [&](int r, int i) {
    return i < a.head_dim ? load_some(q + (size_t)r * a.q_stride + i, a.head_dim - i) : splat(0.0f);
  };
  for (int r = 0; r < a.rows; ++r) {
    tops[r] = splat(0.0f);
    for (int i = 0; i < E; i += kLanes) tops[r] = max(absolute(values(r, i)), tops[r]);
  }
  const f32x16 amax = max_rows(tops, a.rows);
  alignas(64) float inverse[kTileRows];
  store(inverse, select(amax > splat(0.0f), splat(127.0f) / amax, splat(0.0f)));
  store(slope, amax / splat(127.0f) * splat(a.scale * kLog2E));
  for (int r = 0; r < a.rows; ++r) {
    totals[r] = i32x16{};
    for (int i = 0; i < E; i += kLanes) {
      const i32x16 code = round_to_int(values(r, i) * splat(inverse[r]));
      totals[r] += code;
      store_u8((uint8_t*)codes + (size_t)r * E + i, code);
    }
  }
  store(code_sums, sum_rows(totals, a.rows));
}

static inline void finish(const SoftmaxBlock& b, int r, int head_dim, float* out) {
  const f32x16 inverse = splat(1.0f / b.all.total[r]);
  for (int d = 0; d < head_dim; d += kLanes)
    store_some(out + d, load<f32x16>(b.all.out[d / kLanes][r]) * inverse, head_dim - d);
}

// Parts of page p of one kv head; only an int8 page has scales.
struct Page {
  const uint8_t *keys, *values;
  const float *key_scales, *value_scales;
};
static inline Page page_parts(const Attention& a, const uint8_t* page) {
  const size_t half = (size_t)kPage * a.head_dim_padded * cached_bytes(a.cache_kind);
  const float* scales = (const float*)(page + 2 * half);
  return {page, page + half, scales, scales + kPage};
}
static inline Page page_at(const Attention& a, int p) { return page_parts(a, a.cache + a.pages[p] * a.page_stride); }

}  // namespace FLATOUT_ISA
}  // namespace flatout
