// Linear layers: one panel of 16 output rows times a block of tokens.
//
// Integer numerics (the contract of kernels/linear.py, identical in every build and for every block size):
//   acc = 0; for each group g in order:
//     acc = fma(float(sum_k a[k] * (code[k] - zero)), a_scale[g] * w_scale[g], acc)
//     (minimum)  acc = fma(a_scale[g] * float(sum_k a[k]), w_minimum[g], acc)
// With two activation planes (a = 128 * high + low) the fma is done for high with 128 * scale, then for low.
// Bytes: the panel once a call. Operations: 2 * 16 * K a token.
#include <algorithm>

#include "codes.h"
#include "kernels.h"

namespace flatout {
namespace FLATOUT_ISA {

// Tokens a block: as many as their sums fit the registers, with one scale a row and one plane of activations, and else.
#if defined(__AVX512F__)
constexpr int kMost = 8, kSome = 4;
#else
constexpr int kMost = 2, kSome = 2;
#endif

constexpr size_t kFarthest = 65536;  // bytes that weights are fetched ahead at most

static inline int32_t four(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

// MB tokens times PANELS panels at once: more sums in flight than one dot product's latency, each line of weights is loaded
// once for all tokens and each activation once for all panels. LINES is the number of 64-byte lines of codes a group, or 0 for any.
// packed: where the codes lie, in the panels themselves or unpacked to BITS = 8.
template <int BITS, int PLANES, int MB, int PANELS, int LINES>
static void integer_block(const Linear& w, const uint8_t* const* panel, const uint8_t* const* packed, const Activations& a,
                          int first, float* const* out) {
  constexpr bool kChunks = BITS == 5 || BITS == 6;
  constexpr int kStep = kChunks ? chunk_lines(BITS) : 1;  // lines that are multiplied together
  constexpr int kColumns = kChunks ? chunk_columns(BITS) : 32 / BITS;
  constexpr int kSums = PANELS * PLANES * MB < 8 ? 2 : 1;  // of each product: of even and odd column groups
  const int lines = LINES ? LINES : w.group * BITS / 32;
  const size_t values = group_index(first, 0, w.groups);  // all MB tokens lie in one tile
  // What the next panels hold, side by side as these are read: from main memory two streams are faster than one.
  const bool fetch = packed[0] == panel[0];
  const size_t distance = fetch ? std::min(PANELS * w.panel_bytes, kFarthest) : 0;
  const size_t group_extra = fetch ? (w.panel_bytes - w.scales_offset) / w.groups : 0;
  const bool bytes = w.scales == Scales::kByte;
  f32x16 acc[PANELS][MB], powers[PANELS];
  const uint8_t *line[PANELS], *ahead[PANELS];
  const int8_t* codes[PLANES][MB];
#pragma GCC unroll 16
  for (int p = 0; p < PANELS; ++p) {
    line[p] = packed[p], ahead[p] = packed[p] + distance;
    if (bytes) powers[p] = minimum_powers(w, panel[p]);
    for (int m = 0; m < MB; ++m) acc[p][m] = splat(0.0f);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
    for (int c = 0; c < PLANES; ++c) codes[c][m] = a.codes[c] + (size_t)(first + m) * w.row_stride;
  for (int g = 0; g < w.groups; ++g) {
    i32x16 dot[kSums][PANELS][PLANES][MB];
#pragma GCC unroll 16
    for (int p = 0; p < PANELS; ++p)
      for (int c = 0; c < PLANES; ++c)
        for (int m = 0; m < MB; ++m) {
          dot[0][p][c][m] = splat_i32(-w.integer_zero * a.sums[c][values + g * kTileRows + m]);
          if (kSums == 2) dot[kSums - 1][p][c][m] = splat_i32(0);
        }
    const auto multiply = [&](int i, int odd) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 8
        for (int l = 0; l < kStep; ++l, ahead[p] += 64) __builtin_prefetch(ahead[p], 0, 2);
        const uint8_t* from = line[p] + (size_t)64 * kStep * i;
        if constexpr (kChunks) {
          const u8x64 rest = load<u8x64>(from + 64 * (kStep - 1));
#pragma GCC unroll 8
          for (int q = 0; q < kColumns / 4; ++q) {
            const u8x64 v = chunk_codes<BITS>(load<u8x64>(from + 64 * (q / 2)), rest, q);
#pragma GCC unroll 16
            for (int c = 0; c < PLANES; ++c)
              for (int m = 0; m < MB; ++m)
                dot[q % kSums][p][c][m] = dot_us(dot[q % kSums][p][c][m], v, four(codes[c][m] + kColumns * i + 4 * q));
          }
          continue;
        }
        const u8x64 v = load<u8x64>(from);
#pragma GCC unroll 16
        for (int c = 0; c < PLANES; ++c)
          for (int m = 0; m < MB; ++m) {
            const int8_t* x = codes[c][m] + kColumns * i;
            if constexpr (BITS == 8) {
              dot[odd % kSums][p][c][m] = dot_us(dot[odd % kSums][p][c][m], v, four(x));
            } else {
              dot[0][p][c][m] = dot_us(dot[0][p][c][m], low_nibbles(v), four(x));
              dot[kSums - 1][p][c][m] = dot_us(dot[kSums - 1][p][c][m], high_nibbles(v), four(x + 4));
            }
          }
      }
    };
    if constexpr (LINES) {
#pragma GCC unroll 16
      for (int i = 0; i < LINES; ++i) multiply(i, i % 2);
    } else {
      const int steps = lines / kStep;
      int i = 0;
      if constexpr (kChunks) {
        while (i < steps) multiply(i++, 0);
      } else {
        for (; i + 2 <= steps; i += 2) multiply(i, 0), multiply(i + 1, 1);
        if (i < steps) multiply(i, 0);
      }
    }
    const float* a_scale = a.scales + values + g * kTileRows;
#pragma GCC unroll 16
    for (int p = 0; p < PANELS; ++p) {
      const uint8_t *scales = panel[p] + w.scales_offset, *extra = panel[p] + w.extra_offset;
      const f32x16 scale = load_scale(w, scales, g);
      f32x16 minimum = splat(0.0f);
      if (w.zero == Zero::kMinimum) minimum = bytes ? load_scale(w, extra, g) * powers[p] : load_scale(w, extra, g);
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m) {
        const f32x16 c = splat(a_scale[m]) * scale;
        for (int plane = 0; plane < PLANES; ++plane) {
          i32x16 total = dot[0][p][plane][m];
          if (kSums == 2) total += dot[kSums - 1][p][plane][m];
          if (w.zero == Zero::kAsymmetric)
            total -= widen_u8(extra + g * kLanes) * splat_i32(a.sums[plane][values + g * kTileRows + m]);
          acc[p][m] = fma(to_float(total), plane + 1 < PLANES ? c * splat(128.0f) : c, acc[p][m]);
        }
        if (w.zero == Zero::kMinimum)
          acc[p][m] = fma(splat(a.scaled_sums[values + g * kTileRows + m]), minimum, acc[p][m]);
      }
      line[p] += 64 * lines;
      __builtin_prefetch(ahead[p], 0, 2);
      ahead[p] += group_extra;
    }
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m)
      for (int c = 0; c < PLANES; ++c) codes[c][m] += w.group;
  }
#pragma GCC unroll 16
  for (int p = 0; p < PANELS; ++p) {
    if (bytes) powers[p] = scale_powers(w, panel[p]);
    for (int m = 0; m < MB; ++m) store(out[p] + (size_t)m * kLanes, bytes ? acc[p][m] * powers[p] : acc[p][m]);
  }
}

template <int BITS, int PLANES, int MB, int PANELS>
static void integer_lines(const Linear& w, const uint8_t* const* panel, const uint8_t* const* packed, const Activations& a,
                          int first, float* const* out) {
#if defined(__AVX512F__)
  if constexpr (BITS == 4 || BITS == 8) {
    const int lines = w.group * BITS / 32;
    if (lines == 4) return integer_block<BITS, PLANES, MB, PANELS, 4>(w, panel, packed, a, first, out);
    if (lines == 8) return integer_block<BITS, PLANES, MB, PANELS, 8>(w, panel, packed, a, first, out);
    if (lines == 16) return integer_block<BITS, PLANES, MB, PANELS, 16>(w, panel, packed, a, first, out);
  }
#endif
  return integer_block<BITS, PLANES, MB, PANELS, 0>(w, panel, packed, a, first, out);
}

template <int MB>
static void float_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  f32x16 acc[MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  const float* x = a.floats + (size_t)first * w.row_stride;
  const float* row = (const float*)panel;
  for (int k = 0; k < w.k; ++k, row += kLanes) {
    __builtin_prefetch((const char*)row + kPrefetchBytes);
    f32x16 v = load<f32x16>(row);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) acc[m] = fma(v, splat(x[(size_t)m * w.row_stride + k]), acc[m]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

// bf16 without a bf16 instruction: products and sums in fp32, even column first.
template <int MB>
static void bf16_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  f32x16 acc[MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  const uint16_t* x = a.bf16 + (size_t)first * w.row_stride;
  const uint8_t* line = panel;
  for (int k = 0; k < w.k_padded; k += 2, line += 64) {
    f32x16 even, odd;
    load_bf16_pairs((const uint16_t*)line, &even, &odd);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      uint32_t bits;
      std::memcpy(&bits, x + (size_t)m * w.row_stride + k, 4);
      acc[m] = fma(even, (f32x16)splat_i32((int32_t)(bits << 16)), acc[m]);
      acc[m] = fma(odd, (f32x16)splat_i32((int32_t)(bits & 0xffff0000u)), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

// MB tokens of one or two panels, and their codes as bytes, if they were unpacked.
template <int MB, int PANELS>
static void block(const Linear& w, const uint8_t* const* panel, const uint8_t* const* unpacked, const Activations& a, int first,
                  float* const* out) {
  if (w.kind != WeightKind::kInteger) {
    for (int p = 0; p < PANELS; ++p)
      w.kind == WeightKind::kFloat32 ? float_block<MB>(w, panel[p], a, first, out[p])
                                     : bf16_block<MB>(w, panel[p], a, first, out[p]);
    return;
  }
  const auto run = [&]<int BITS>() {
    const uint8_t* const* packed = unpacked ? unpacked : panel;
    return w.planes == 1 ? integer_lines<BITS, 1, MB, PANELS>(w, panel, packed, a, first, out)
                         : integer_lines<BITS, 2, MB, PANELS>(w, panel, packed, a, first, out);
  };
  unpacked || w.bits == 8 ? run.template operator()<8>()
  : w.bits == 6 ? run.template operator()<6>()
  : w.bits == 5 ? run.template operator()<5>()
                : run.template operator()<4>();
}

#if defined(__AVX512F__)
// Chunks take as long to unpack as to multiply with 4 tokens; nibbles are cheaper unpacked anew.
static bool in_chunks(const Linear& w) { return w.kind == WeightKind::kInteger && (w.bits == 5 || w.bits == 6); }

void unpack_panel(const Linear& w, const uint8_t* panel, int8_t* scratch) {
  if (in_chunks(w)) unpack_codes(w, panel, u8x64{}, (uint8_t*)scratch);
}
#endif

void linear_panels(const Linear& w, const uint8_t* const* panel, int panels,
                   [[maybe_unused]] const int8_t* const* scratch, const Activations& a, int first, int count,
                   float* const* out) {
  const uint8_t* bytes[2] = {};
#if defined(__AVX512F__)
  // Where tiles multiply, what they prepare is another thing, but only fewer tokens come here.
  if (in_chunks(w) && count >= kTileMinimum) bytes[0] = (const uint8_t*)scratch[0], bytes[1] = (const uint8_t*)scratch[1];
#endif
  const bool wide = w.kind != WeightKind::kInteger || (w.groups == 1 && w.planes == 1);
  for (int m = 0; m < count;) {
    const int rest = count - m, size = wide && rest >= kMost ? kMost : rest >= kSome ? kSome : 1;
    for (int p = 0; p < panels; p += 2) {
      float* to[2];
      for (int i = 0; i < 2; ++i) to[i] = out[std::min(p + i, panels - 1)] + (size_t)m * kLanes;
      const auto run = [&]<int MB>() {
        const uint8_t* const* codes = bytes[0] ? bytes + p : nullptr;
        panels - p == 1 ? block<MB, 1>(w, panel + p, codes, a, first + m, to)
                        : block<MB, 2>(w, panel + p, codes, a, first + m, to);
      };
      size == kMost   ? run.template operator()<kMost>()
      : size == kSome ? run.template operator()<kSome>()
                      : run.template operator()<1>();
    }
    m += size;
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
