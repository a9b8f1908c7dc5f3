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

void write_kv(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, CacheKind kind,
              uint8_t* page) {
  const int E = head_dim_padded;
  if (kind == CacheKind::kFloat32) {
    float *keys = (float*)page, *values = keys + (size_t)kPage * E;
    for (int e = 0; e < E; ++e) {
      keys[(size_t)e * kPage + slot] = e < head_dim ? k[e] : 0.0f;
      values[(size_t)slot * E + e] = e < head_dim ? v[e] : 0.0f;
    }
    return;
  }
  if (kind == CacheKind::kBFloat16) {
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

// Queries and vectors that are multiplied together: as many as their sums fit the registers, so that a line of the cache is
// loaded once for several queries, and a query's value broadcast once for several lines.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

// f<count>() for 1 <= count <= MOST.
template <int MOST, class F>
static inline __attribute__((always_inline)) void with_rows(int count, F f) {
  if constexpr (MOST > 1)
    if (count < MOST) return with_rows<MOST - 1>(count, f);
  f.template operator()<MOST>();
}

// What is multiplied: `steps` steps of lines, a line 64 bytes, those of a step one after another.
struct Lines {
  const uint8_t* at;
  size_t stride;  // bytes from one step to the next
  int steps;
};

// The page that comes next, a few lines a step: all at once would fill the queue of misses.
struct Fetch {
  const uint8_t *at, *end;
  int lines;  // a step
  void step() {
    for (int i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at);
  }
};

// done(r, v, start[r] + the sum over steps of line v . four bytes of row r) of R rows and V lines: signed lines times
// unsigned rows, or the other way round.
template <bool SIGNED_LINES, int R, int V, class Done>
static inline void multiply_block(Lines lines, const uint8_t* rows, size_t row_stride, const int32_t* start, Fetch& next,
                                  Done done) {
  i32x16 acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = splat_i32(start[r]);
  for (int s = 0; s < lines.steps; ++s, lines.at += lines.stride, rows += 4) {
    next.step();
    u8x64 line[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) line[v] = load<u8x64>(lines.at + 64 * v);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, rows + r * row_stride, 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        acc[r][v] = SIGNED_LINES ? dot_su(acc[r][v], line[v], four) : dot_us(acc[r][v], line[v], four);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) done(r, v, acc[r][v]);
}

// The same for up to kTogether rows and lines, not known to the compiler.
template <bool SIGNED_LINES, class Done>
static inline void multiply_some(Lines lines, int count_lines, const uint8_t* rows, size_t row_stride, const int32_t* start,
                                 int count, Fetch& next, Done done) {
  with_rows<kTogether>(count, [&]<int R>() {
    if (count_lines == kTogether)
      return multiply_block<SIGNED_LINES, R, kTogether>(lines, rows, row_stride, start, next, done);
    for (int i = 0; i < count_lines; ++i, lines.at += 64)
      multiply_block<SIGNED_LINES, R, 1>(lines, rows, row_stride, start, next,
                                         [&](int r, int, i32x16 sum) { done(r, i, sum); });
  });
}

// Against an int8 cache.
static void attend_int8(const Attention& a, SoftmaxBlock& block) {
  const int E = a.head_dim_padded, rows = a.rows;
  alignas(64) int8_t q[kTileRows * kMaxHeadDim];
  alignas(64) uint8_t weights[kTileRows][kPage];
  alignas(64) int32_t offset[kTileRows];
  alignas(64) float scores[kTileRows][kPage];
  i32x16 products[kTogether][kPage / kLanes] = {};  // of keys that no row sees: anything finite
  uint64_t visible[kTileRows];
  quantize_queries(a, a.q, q, block.slope, offset);
  for (int r = 0; r < rows; ++r) offset[r] *= -128;  // keys' codes are moved by 128
  const PageRange range = visible_pages(a);
  constexpr int32_t kZeros[kTogether] = {};
  const int blocks = (rows + kTogether - 1) / kTogether;
  const int steps = blocks * (kPage * E / 2) / (kTogether * kLanes);  // of a page's keys and values
  for (int p = range.first; p <= range.last; ++p) {
    const bool whole = see_page(a, p, visible);
    const Page page = page_at(a, p);
    const uint8_t* ahead = p < range.last ? page_at(a, p + 1).keys : a.after ? a.after : page.keys;
    const size_t bytes = kv_head_bytes(E, CacheKind::kInt8);
    Fetch next = {ahead, ahead + bytes, (int)(bytes / 64 + steps - 1) / steps};
    const int seen = whole ? kPage : seen_keys(visible, rows), vectors = (seen + kLanes - 1) / kLanes;
    const auto score = [&](int r, int i) {
      for (int v = 0; r % kTogether == 0 && i == 0 && v < vectors; v += kTogether)
        multiply_some<false>({page.keys + 64 * v, 4 * kPage, E / 4}, std::min(kTogether, vectors - v),
                             (const uint8_t*)q + r * E, E, offset + r, std::min(kTogether, rows - r), next,
                             [&](int row, int line, i32x16 sum) { products[row][v + line] = sum; });
      return to_float(products[r % kTogether][i]) * load<f32x16>(page.key_scales + i * kLanes);
    };
    advance(block, whole, visible, rows, score, scores, page.value_scales, weights);
    for (int r = 0; r < rows; r += kTogether)
      for (int d = 0; d < E / kLanes; d += kTogether)
        multiply_some<true>({page.values + 64 * d, (size_t)4 * E, (seen + 3) / 4}, std::min(kTogether, E / kLanes - d),
                            weights[r], kPage, kZeros, std::min(kTogether, rows - r), next,
                            [&](int row, int line, i32x16 sum) {
                              add_values(block.chunk.out[d + line][r + row], to_float(sum), block.shrinks,
                                         block.shrink[r + row], block.scale[r + row]);
                            });
    if (!a.partial && ends_chunk(p, range)) fold(block, rows, E);
  }
}

// Two values of sixteen neighbours from a float page's line, `next` bytes apart in fp32 and side by side in bf16.
template <CacheKind KIND>
static void load_pair(const uint8_t* line, size_t next, f32x16* first, f32x16* second) {
  if constexpr (KIND == CacheKind::kBFloat16) return load_bf16_pairs((const uint16_t*)line, first, second);
  *first = load<f32x16>((const float*)line);
  *second = load<f32x16>((const float*)(line + next));
}

// scores[r][v] of R queries and V vectors of a float page's keys, from the first: fp32 arithmetic, value after value.
template <CacheKind KIND, int R, int V>
static void score_floats(const Attention& a, const float* q, const uint8_t* keys, f32x16 (*scores)[kPage / kLanes]) {
  f32x16 acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = splat(0.0f);
  for (int e = 0; e < a.head_dim; e += 2, keys += 2 * cached_bytes(KIND) * kPage) {
    f32x16 first[V], second[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_pair<KIND>(keys + 64 * v, 4 * kPage, &first[v], &second[v]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* x = q + (size_t)r * a.q_stride + e;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(first[v], splat(x[0]), acc[r][v]);
      if (e + 1 == a.head_dim) continue;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(second[v], splat(x[1]), acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) scores[r][v] = acc[r][v];
}

// out[v][r] += keys begin .. end of R rows' weights times V vectors of a float page's values.
template <CacheKind KIND, int R, int V>
static void weigh_floats(const uint8_t* values, int E, const float (*weights)[kPage], int begin, int end,
                         float (*out)[kTileRows][kLanes]) {
  f32x16 acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load<f32x16>(out[v][r]);
  for (int key = begin; key < end; ++key) {
    const uint8_t* line = values + (size_t)(key / 2) * E * 2 * cached_bytes(KIND);
    f32x16 value[V], pair[2];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      load_pair<KIND>(line + 64 * v, 4 * E, &pair[0], &pair[1]);
      value[v] = key % 2 ? pair[1] : pair[0];
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma(value[v], splat(weights[r][key]), acc[r][v]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out[v][r], acc[r][v]);
}

// The same for some rows, of which row i sees keys begin[i] .. end[i] only: what lies in other slots may not be a number.
template <CacheKind KIND, int V>
static void weigh_rows(const uint8_t* values, int E, const float (*weights)[kPage], const int* begin, const int* end,
                       int count, float (*out)[kTileRows][kLanes]) {
  int first = *std::max_element(begin, begin + count), last = *std::min_element(end, end + count);  // seen by all rows
  if (first >= last) first = last = 0;
  const auto alone = [&](int r, int from, int to) {
    weigh_floats<KIND, 1, V>(values, E, weights + r, from, to, (float (*)[kTileRows][kLanes])out[0][r]);
  };
  for (int r = 0; r < count; ++r) alone(r, begin[r], std::min(first, end[r]));
  with_rows<kTogether>(count, [&]<int R>() { weigh_floats<KIND, R, V>(values, E, weights, first, last, out); });
  for (int r = 0; r < count; ++r) alone(r, std::max(last, begin[r]), end[r]);
}

// Against a bf16 or fp32 cache.
template <CacheKind KIND>
static void attend_floats(const Attention& a, SoftmaxBlock& block) {
  const int E = a.head_dim_padded, rows = a.rows;
  alignas(64) float scores[kTileRows][kPage];
  f32x16 products[kTogether][kPage / kLanes];
  uint64_t visible[kTileRows];
  for (int r = 0; r < rows; ++r) block.slope[r] = a.scale * kLog2E;
  const PageRange range = visible_pages(a);
  for (int p = range.first; p <= range.last; ++p) {
    const bool whole = see_page(a, p, visible);
    const Page page = page_at(a, p);
    const auto score = [&](int r, int i) {
      for (int v = 0; r % kTogether == 0 && i == 0 && v < kPage / kLanes; v += kTogether)
        with_rows<kTogether>(std::min(kTogether, rows - r), [&]<int R>() {
          score_floats<KIND, R, kTogether>(a, a.q + (size_t)r * a.q_stride, page.keys + 64 * v,
                                           (f32x16 (*)[kPage / kLanes]) & products[0][v]);
        });
      return products[r % kTogether][i];
    };
    advance(block, whole, visible, rows, score, scores, nullptr, nullptr);
    int begin[kTileRows], end[kTileRows];
    for (int r = 0; r < rows; ++r) {
      begin[r] = visible[r] ? __builtin_ctzll(visible[r]) : 0;
      end[r] = visible[r] ? kPage - __builtin_clzll(visible[r]) : 0;
      for (int d = 0; d < E / kLanes; ++d)
        store(block.chunk.out[d][r], load<f32x16>(block.chunk.out[d][r]) * splat(block.shrink[r]));
    }
    for (int r = 0; r < rows; r += kTogether)
      for (int d = 0; d < E / kLanes;) {
        const bool all = E / kLanes - d >= kTogether;
        const auto weigh = all ? weigh_rows<KIND, kTogether> : weigh_rows<KIND, 1>;
        weigh(page.values + 64 * d, E, scores + r, begin + r, end + r, std::min(kTogether, rows - r),
              (float (*)[kTileRows][kLanes])block.chunk.out[d][r]);
        d += all ? kTogether : 1;
      }
    if (!a.partial && ends_chunk(p, range)) fold(block, rows, E);
  }
}

static void attend_rows(const Attention& a) {
  SoftmaxBlock block;
  start(block, a.rows, a.head_dim_padded);
  a.cache_kind == CacheKind::kInt8       ? attend_int8(a, block)
  : a.cache_kind == CacheKind::kBFloat16 ? attend_floats<CacheKind::kBFloat16>(a, block)
                                         : attend_floats<CacheKind::kFloat32>(a, block);
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
