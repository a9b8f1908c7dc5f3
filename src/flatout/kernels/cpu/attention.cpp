// Causal attention of a few queries over a paged KV cache, and the cache's writer.
//
// Bytes: each page once for 16 queries. Operations: 4 E per key and query.
// Pages are visited in order of position and the softmax block is the page, so the result does not depend on how
// queries were grouped, chunked or spread over threads.
#include <algorithm>

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
      keys[((size_t)(e / 2) * kPage + slot) * 2 + e % 2] = e < head_dim ? to_bf16(k[e]) : 0;
      values[((size_t)(slot / 2) * E + e) * 2 + slot % 2] = e < head_dim ? to_bf16(v[e]) : 0;
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

// Against an int8 cache.
static void attend_int8(const Attention& a, SoftmaxBlock& block) {
  const int E = a.head_dim_padded, rows = a.rows;
  alignas(64) int8_t q[kTileRows * kMaxHeadDim];
  alignas(64) uint8_t weights[kTileRows][kPage];
  alignas(64) int32_t q_sum[kTileRows];
  alignas(64) float scores[kTileRows][kPage];
  uint64_t visible[kTileRows];
  quantize_queries(a, a.q, q, block.slope, q_sum);
  const PageRange range = visible_pages(a);
  const int steps = rows * (kPage + E) / kLanes;
  for (int p = range.first; p <= range.last; ++p) {
    const bool whole = see_page(a, p, visible);
    const Page page = page_at(a, p);
    // The next page is fetched a few lines at a time: all at once would fill the queue of misses.
    const uint8_t* ahead = p < range.last ? page_at(a, p + 1).keys : a.after ? a.after : page.keys;
    const int share = ((int)(kv_head_bytes(E, true) / 64) + steps - 1) / steps;
    const auto fetch = [&] {
      for (int line = 0; line < share; ++line, ahead += 64) __builtin_prefetch(ahead);
    };
    const int seen = whole ? kPage : seen_keys(visible, rows);
    const auto score = [&](int r, int i) {
      fetch();
      i32x16 dot = splat_i32(-128 * q_sum[r]);
      for (int e = 0; e < E && i * kLanes < seen; e += 4) {
        int32_t four;
        std::memcpy(&four, q + r * E + e, 4);
        const size_t at = (size_t)e * kPage + 64 * i;
        dot = dot_us(dot, load<u8x64>(page.keys + at), four);
      }
      return to_float(dot) * load<f32x16>(page.key_scales + i * kLanes);
    };
    advance(block, whole, visible, rows, score, scores, page.value_scales, weights);
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < E; d += kLanes) {
        fetch();
        i32x16 dot = {};
        for (int key = 0; key < seen; key += 4) {
          int32_t four;
          std::memcpy(&four, weights[r] + key, 4);
          const size_t at = (size_t)key * E + 4 * d;
          dot = dot_su(dot, load<u8x64>(page.values + at), four);
        }
        add_values(block.chunk.out[d / kLanes][r], to_float(dot), block.shrinks, block.shrink[r], block.scale[r]);
      }
    if (!a.partial && ends_chunk(p, range)) fold(block, rows, E);
  }
}

// [rows][columns][2] bf16 -> [2 rows][columns] floats
static void widen_pairs(const uint16_t* from, int rows, int columns, float* to) {
  for (int r = 0; r < rows; ++r, from += 2 * columns, to += 2 * columns)
    for (int c = 0; c < columns; c += kLanes) {
      f32x16 first, second;
      load_bf16_pairs(from + 2 * c, &first, &second);
      store(to + c, first);
      store(to + columns + c, second);
    }
}

// The same against a bf16 cache: fp32 arithmetic on the widened values, each page widened once for all queries.
static void attend_bf16(const Attention& a, SoftmaxBlock& block) {
  const int E = a.head_dim_padded, rows = a.rows;
  alignas(64) float keys[kMaxHeadDim * kPage], values[kMaxHeadDim * kPage];
  alignas(64) float scores[kTileRows][kPage];
  uint64_t visible[kTileRows];
  for (int r = 0; r < rows; ++r) block.slope[r] = a.scale * kLog2E;
  const PageRange range = visible_pages(a);
  for (int p = range.first; p <= range.last; ++p) {
    const bool whole = see_page(a, p, visible);
    const Page page = page_at(a, p);
    widen_pairs((const uint16_t*)page.keys, E / 2, kPage, keys);
    widen_pairs((const uint16_t*)page.values, kPage / 2, E, values);
    f32x16 dot[4];
    const auto score = [&](int r, int i) {
      if (i == 0) {
        const float* q = a.q + (size_t)r * a.q_stride;
        for (int j = 0; j < 4; ++j) dot[j] = splat(0.0f);
        for (int e = 0; e < a.head_dim; ++e)
          for (int j = 0; j < 4; ++j)
            dot[j] = fma(load<f32x16>(keys + (size_t)e * kPage + j * kLanes), splat(q[e]), dot[j]);
      }
      return dot[i];
    };
    advance(block, whole, visible, rows, score, scores, nullptr, nullptr);
    for (int r = 0; r < rows; ++r) {
      const bool any = visible[r] != 0;
      const int begin = any ? __builtin_ctzll(visible[r]) : 0, end = any ? kPage - __builtin_clzll(visible[r]) : 0;
      for (int d = 0; d < E; d += kLanes) {
        f32x16 out = load<f32x16>(block.chunk.out[d / kLanes][r]) * splat(block.shrink[r]);
        // Only keys that are seen: what lies in other slots may not be a number.
        for (int key = begin; key < end; ++key)
          out = fma(load<f32x16>(values + (size_t)key * E + d), splat(scores[r][key]), out);
        store(block.chunk.out[d / kLanes][r], out);
      }
    }
    if (!a.partial && ends_chunk(p, range)) fold(block, rows, E);
  }
}

static void attend_rows(const Attention& a) {
  SoftmaxBlock block;
  start(block, a.rows, a.head_dim_padded);
  if (a.int8_cache)
    attend_int8(a, block);
  else
    attend_bf16(a, block);
  if (!a.partial) {
    for (int r = 0; r < a.rows; ++r) finish(block, r, a.head_dim, a.out + (size_t)r * a.out_stride);
    return;
  }
  for (int r = 0; r < a.rows; ++r) {
    float* to = a.partial + (size_t)r * partial_floats(a.head_dim_padded);
    to[0] = block.slope[r], to[1] = block.chunk.top[r], to[2] = block.chunk.total[r];
    for (int d = 0; d < a.head_dim_padded; d += kLanes) store(to + 3 + d, load<f32x16>(block.chunk.out[d / kLanes][r]));
  }
}

void merge_chunks(const float* partial, int chunks, int stride, int head_dim, int head_dim_padded, float* out) {
  SoftmaxBlock block;
  start(block, 1, head_dim_padded);
  for (int c = 0; c < chunks; ++c, partial += stride) {
    block.slope[0] = partial[0], block.chunk.top[0] = partial[1], block.chunk.total[0] = partial[2];
    for (int d = 0; d < head_dim_padded; d += kLanes) store(block.chunk.out[d / kLanes][0], load<f32x16>(partial + 3 + d));
    fold(block, 1, head_dim_padded);
  }
  finish(block, 0, head_dim, out);
}

void attend(const Attention& a) {
  const bool one = a.rows == 1;  // then up to 16 heads are the rows: each page is read once for all of them
  for (int h = 0; h < a.heads; h += one ? kTileRows : 1) {
    Attention some = a;
    some.q += (size_t)h * a.head_dim;
    some.out += (size_t)h * a.head_dim;
    if (a.partial) some.partial += (size_t)h * partial_floats(a.head_dim_padded);
    if (one) {
      some.rows = std::min(kTileRows, a.heads - h);
      some.q_stride = some.out_stride = a.head_dim;
      some.step = 0;
    }
    attend_rows(some);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
