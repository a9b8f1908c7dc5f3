// linear.cpp for registers of 32 bytes: the same numerics, half a panel a register.
//
// AVX-VNNI multiplies unsigned by signed bytes and adds the products exactly. Without it vpmaddubsw does, which saturates a
// sum of two products at 32767. 4-bit codes stay below: 8 such sums are at most 8 * 2 * 15 * 128 = 30720, so they are added
// as 16-bit numbers. 8-bit codes are taken as w = code - 128 and multiplied as |w| * (a with the sign of w): at most
// 2 * 128 * 127 = 32512, because activation codes stay within +-127.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

#if defined(__AVXVNNI__)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif
// Tokens a block: as many as their sums fit the registers, two a token and plane.
constexpr int kMost = kVnni ? 6 : 4;
constexpr int kMostFloat = 6;

static inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline __m256i spread(const void* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
static inline __m256 load_scales(const Linear& w, const uint8_t* base, int at) {
  if (w.scales == Scales::kByte)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(base + at))));
  return w.scales == Scales::kHalf ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(base + 2 * at)))
                                   : _mm256_loadu_ps((const float*)base + at);
}
// As scale_powers and minimum_powers, of 8 lanes.
static inline __m256 load_powers(const Linear& w, const uint8_t* panel, int at) {
  const __m128i exponents = _mm_loadl_epi64((const __m128i*)(panel + w.powers_offset + at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(exponents), 23));
}
// Sums are added one at a time: in the order that the compiler likes, more are alive than there are registers.
static inline void add_now(__m256i& sum, __m256i v, bool words = false) {
  sum = words ? _mm256_add_epi16(sum, v) : _mm256_add_epi32(sum, v);
  asm("" : "+x"(sum));
}
// What was loaded before is loaded again after: the halves of a panel share activations, but no registers are left for them.
static inline void forget() { asm volatile("" ::: "memory"); }
static inline __m256i add_pairs(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// MB tokens times half a panel's next line of 8-bit codes, whose activations lie at x.
template <int STREAMS>
static inline __attribute__((always_inline)) void multiply_8(__m256i v, const int8_t* const* x, int at, __m256i* sums) {
#if defined(__AVXVNNI__)
#pragma GCC unroll 16
  for (int s = 0; s < STREAMS; ++s) sums[s] = _mm256_dpbusd_avx_epi32(sums[s], v, spread(x[s] + at));
#else
  const __m256i w = _mm256_xor_si256(v, _mm256_set1_epi8((char)128)), size = _mm256_abs_epi8(w);
#pragma GCC unroll 16
  for (int s = 0; s < STREAMS; ++s)
    add_now(sums[s], add_pairs(_mm256_maddubs_epi16(size, _mm256_sign_epi8(spread(x[s] + at), w))));
#endif
}

// The same for four lines of 4-bit codes, which hold 32 columns.
template <int STREAMS>
static inline __attribute__((always_inline)) void multiply_4(const uint8_t* line, const int8_t* const* x, int at,
                                                             __m256i* sums) {
  const __m256i nibble = _mm256_set1_epi8(15);
  [[maybe_unused]] __m256i short_sums[STREAMS];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i v = load_bytes(line + 64 * i);
    const __m256i low = _mm256_and_si256(v, nibble), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
#pragma GCC unroll 16
    for (int s = 0; s < STREAMS; ++s) {
      const __m256i a = spread(x[s] + at + 8 * i), b = spread(x[s] + at + 8 * i + 4);
#if defined(__AVXVNNI__)
      sums[s] = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sums[s], low, a), high, b);
#else
      if (i == 0) short_sums[s] = _mm256_maddubs_epi16(low, a);
      if (i != 0) add_now(short_sums[s], _mm256_maddubs_epi16(low, a), true);
      add_now(short_sums[s], _mm256_maddubs_epi16(high, b), true);
#endif
    }
  }
#if !defined(__AVXVNNI__)
#pragma GCC unroll 16
  for (int s = 0; s < STREAMS; ++s) add_now(sums[s], add_pairs(short_sums[s]));
#endif
}

// The same for a chunk of 5- or 6-bit codes. Without VNNI two products of 63 * 128 and another two stay below 32767.
template <int BITS, int STREAMS>
static inline __attribute__((always_inline)) void multiply_chunk(const uint8_t* chunk, const int8_t* const* x, int at,
                                                                 __m256i* sums) {
  constexpr int kQuads = chunk_columns(BITS) / 4;
  const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(BITS == 5 ? 0x10 : 0x30);
  const __m256i rest = load_bytes(chunk + 64 * (kQuads / 2));
#pragma GCC unroll 4
  for (int q = 0; q < kQuads; q += 2) {
    const __m256i v = load_bytes(chunk + 32 * q);
    __m256i codes[2] = {_mm256_and_si256(v, nibble), _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int up = 4 - (BITS - 4) * (q + i);
      const __m256i moved = up >= 0 ? _mm256_slli_epi16(rest, up) : _mm256_srli_epi16(rest, -up);
      codes[i] = _mm256_or_si256(codes[i], _mm256_and_si256(moved, upper));
    }
#pragma GCC unroll 16
    for (int s = 0; s < STREAMS; ++s) {
      const __m256i a = spread(x[s] + at + 4 * q), b = spread(x[s] + at + 4 * q + 4);
#if defined(__AVXVNNI__)
      sums[s] = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sums[s], codes[0], a), codes[1], b);
#else
      const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], a), _mm256_maddubs_epi16(codes[1], b));
      add_now(sums[s], add_pairs(both));
#endif
    }
  }
}

// MB tokens of one panel. Stream s is plane s / MB of token s % MB.
template <int BITS, int PLANES, int MB>
static void integer_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  constexpr int STREAMS = MB * PLANES;
  constexpr int kChains = STREAMS == 1 && BITS == 8 ? 2 : 1;  // sums of even and odd lines, where few are in flight
  const int lines = w.group * BITS / 32;
  const int zero = (BITS == 8 && !kVnni ? 128 : 0) - w.integer_zero;  // what the codes were multiplied without
  const size_t values = group_index(first, 0, w.groups);               // all MB tokens lie in one tile
  const int8_t* x[STREAMS];
  __m256 acc[2][MB];
#pragma GCC unroll 16
  for (int s = 0; s < STREAMS; ++s) x[s] = a.codes[s / MB] + (size_t)(first + s % MB) * w.row_stride;
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) acc[0][m] = acc[1][m] = _mm256_setzero_ps();
  const uint8_t* line = panel;
  const bool bytes = w.scales == Scales::kByte;
  for (int g = 0; g < w.groups; ++g, line += 64 * lines) {
    __m256i sums[2][kChains][STREAMS];
#pragma GCC unroll 16
    for (int s = 0; s < STREAMS; ++s)
      for (int c = 0; c < kChains; ++c) sums[0][c][s] = sums[1][c][s] = _mm256_setzero_si256();
    const int column = g * w.group;
    if constexpr (BITS == 8) {
      for (int i = 0; i < lines; i += 2) {  // a group has a multiple of 32 columns
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          __builtin_prefetch(line + 64 * (i + j) + kPrefetchBytes);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            multiply_8<STREAMS>(load_bytes(line + 64 * (i + j) + 32 * half), x, column + 4 * (i + j),
                                sums[half][j % kChains]);
            if (STREAMS > 2) forget();
          }
        }
      }
    } else if constexpr (BITS == 5 || BITS == 6) {
      for (int i = 0; i < lines; i += chunk_lines(BITS)) {
        for (int j = 0; j < chunk_lines(BITS); ++j) __builtin_prefetch(line + 64 * (i + j) + kPrefetchBytes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          multiply_chunk<BITS, STREAMS>(line + 64 * i + 32 * half, x, column + i / chunk_lines(BITS) * chunk_columns(BITS),
                                        sums[half][0]);
          if (STREAMS > 1) forget();
        }
      }
    } else {
      for (int i = 0; i < lines; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) __builtin_prefetch(line + 64 * (i + j) + kPrefetchBytes);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          multiply_4<STREAMS>(line + 64 * i + 32 * half, x, column + 8 * i, sums[half][0]);
          if (STREAMS > 1) forget();
        }
      }
    }
    const size_t at = values + (size_t)g * kTileRows;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int lane = g * kLanes + 8 * half;
      const __m256 scale = load_scales(w, panel + w.scales_offset, lane);
      __m256 minimum = _mm256_setzero_ps();
      if (w.zero == Zero::kMinimum) {
        minimum = load_scales(w, panel + w.extra_offset, lane);
        if (bytes) minimum = _mm256_mul_ps(minimum, load_powers(w, panel, kLanes + 8 * half));
      }
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m) {
        const __m256 c = _mm256_mul_ps(_mm256_set1_ps(a.scales[at + m]), scale);
#pragma GCC unroll 2
        for (int plane = 0; plane < PLANES; ++plane) {
          const int s = plane * MB + m;
          const int32_t sum = a.sums[plane][at + m];
          __m256i total = _mm256_add_epi32(sums[half][0][s], _mm256_set1_epi32(zero * sum));
          if constexpr (kChains == 2) total = _mm256_add_epi32(total, sums[half][1][s]);
          if (w.zero == Zero::kAsymmetric) {
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(panel + w.extra_offset + lane)));
            total = _mm256_sub_epi32(total, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(sum)));
          }
          const __m256 factor = plane + 1 < PLANES ? _mm256_mul_ps(c, _mm256_set1_ps(128.0f)) : c;
          acc[half][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), factor, acc[half][m]);
        }
        if (w.zero == Zero::kMinimum)
          acc[half][m] = _mm256_fmadd_ps(_mm256_set1_ps(a.scaled_sums[at + m]), minimum, acc[half][m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m)
    for (int half = 0; half < 2; ++half) {
      const __m256 sum = bytes ? _mm256_mul_ps(acc[half][m], load_powers(w, panel, 8 * half)) : acc[half][m];
      _mm256_storeu_ps(out + m * kLanes + 8 * half, sum);
    }
}

// fp32, and bf16 without a bf16 instruction (products and sums in fp32, even column first). PANELS at once: one token alone
// would wait for its last sum.
template <bool BF16, int MB, int PANELS>
static void float_block(const Linear& w, const uint8_t* const* panel, const Activations& a, int first,
                        float* const* out) {
  __m256 acc[PANELS][MB][2];
#pragma GCC unroll 16
  for (int p = 0; p < PANELS; ++p)
    for (int m = 0; m < MB; ++m) acc[p][m][0] = acc[p][m][1] = _mm256_setzero_ps();
  const size_t start = (size_t)first * w.row_stride;
  if constexpr (BF16) {
    const uint16_t* x = a.bf16 + start;
    const __m256i upper = _mm256_set1_epi32((int32_t)0xffff0000);
    for (int k = 0; k < w.k_padded; k += 2) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        const uint8_t* line = panel[p] + (size_t)k * 32;
        __builtin_prefetch(line + kPrefetchBytes);
        const __m256i v[2] = {load_bytes(line), load_bytes(line + 32)};
        __m256 even[2], odd[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          even[half] = (__m256)_mm256_slli_epi32(v[half], 16);
          odd[half] = (__m256)_mm256_and_si256(v[half], upper);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m) {
          const __m256i pair = spread(x + (size_t)m * w.row_stride + k);
          const __m256 x0 = (__m256)_mm256_slli_epi32(pair, 16), x1 = (__m256)_mm256_and_si256(pair, upper);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            acc[p][m][half] = _mm256_fmadd_ps(odd[half], x1, _mm256_fmadd_ps(even[half], x0, acc[p][m][half]));
        }
      }
    }
  } else {
    const float* x = a.floats + start;
    for (int k = 0; k < w.k; ++k) {
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        const float* row = (const float*)panel[p] + (size_t)k * kLanes;
        __builtin_prefetch((const char*)row + kPrefetchBytes);
        const __m256 v[2] = {_mm256_loadu_ps(row), _mm256_loadu_ps(row + 8)};
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m) {
          const __m256 value = _mm256_set1_ps(x[(size_t)m * w.row_stride + k]);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) acc[p][m][half] = _mm256_fmadd_ps(v[half], value, acc[p][m][half]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m)
      for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out[p] + m * kLanes + 8 * half, acc[p][m][half]);
}

template <bool BF16>
static void float_panels(const Linear& w, const uint8_t* const* panel, int panels, const Activations& a, int first,
                         int count, float* const* out) {
  int m = 0;
  const auto at = [&](int p) { return out[p] + (size_t)m * kLanes; };
  while (m < count) {
    const int left = count - m, size = left >= kMostFloat ? kMostFloat : left >= 2 ? 2 : 1;
    for (int p = 0; p < panels; ++p) {
      float* const to[2] = {at(p), at(std::min(p + 1, panels - 1))};
      if (size == kMostFloat)
        float_block<BF16, kMostFloat, 1>(w, panel + p, a, first + m, to);
      else if (p + 1 < panels) {
        size == 2 ? float_block<BF16, 2, 2>(w, panel + p, a, first + m, to)
                  : float_block<BF16, 1, 2>(w, panel + p, a, first + m, to);
        ++p;
      } else {
        size == 2 ? float_block<BF16, 2, 1>(w, panel + p, a, first + m, to)
                  : float_block<BF16, 1, 1>(w, panel + p, a, first + m, to);
      }
    }
    m += size;
  }
}

// Every panel times the same tokens before the next: the tokens' codes stay in the first cache.
template <int BITS, int PLANES>
static void integer_panels(const Linear& w, const uint8_t* const* panel, int panels, const Activations& a, int first,
                           int count, float* const* out) {
  constexpr int kBlock = kMost / PLANES, kSome = 2 / PLANES;
  for (int m = 0; m < count;) {
    // A block lies in one tile.
    const int left = std::min(count - m, kTileRows - (first + m) % kTileRows);
    const int size = left >= kBlock ? kBlock : left >= kSome ? kSome : 1;
    for (int p = 0; p < panels; ++p) {
      float* to = out[p] + (size_t)m * kLanes;
      if (size == kBlock)
        integer_block<BITS, PLANES, kBlock>(w, panel[p], a, first + m, to);
      else if (size == kSome)
        integer_block<BITS, PLANES, kSome>(w, panel[p], a, first + m, to);
      else
        integer_block<BITS, PLANES, 1>(w, panel[p], a, first + m, to);
    }
    m += size;
  }
}

void linear_panels(const Linear& w, const uint8_t* const* panel, int panels, const int8_t* const*,
                   const Activations& a, int first, int count, float* const* out) {
  const auto run = w.kind == WeightKind::kFloat32    ? float_panels<false>
                   : w.kind == WeightKind::kBFloat16 ? float_panels<true>
                   : w.bits == 8 ? (w.planes == 1 ? integer_panels<8, 1> : integer_panels<8, 2>)
                   : w.bits == 6 ? (w.planes == 1 ? integer_panels<6, 1> : integer_panels<6, 2>)
                   : w.bits == 5 ? (w.planes == 1 ? integer_panels<5, 1> : integer_panels<5, 2>)
                                 : (w.planes == 1 ? integer_panels<4, 1> : integer_panels<4, 2>);
  run(w, panel, panels, a, first, count, out);
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
