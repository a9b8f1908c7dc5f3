// Sixteen-lane vectors with one meaning on every instruction set.
//
// Each kernel file is compiled once per instruction set with FLATOUT_ISA naming its namespace. A logical vector always
// has 16 lanes (one AVX-512 register, two AVX2 registers, or four of 16 bytes), sums run in the same order everywhere and
// multiply-adds are always fused, so all builds agree bit for bit in fp32 and in integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "half.h"
#include "ops.h"
#include "pair.h"

namespace flatout {
namespace FLATOUT_ISA {

#if defined(__AVX512F__)
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef u32x16 UintPart;
#else
#if defined(__AVX2__)
constexpr int kPartBytes = 32;
#else
constexpr int kPartBytes = 16;
#endif
// What one register holds.
typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef int32_t IntPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t UintPart __attribute__((vector_size(kPartBytes)));
typedef uint8_t BytePart __attribute__((vector_size(kPartBytes)));
constexpr int kPartLanes = kPartBytes / 4;
using f32x16 = Sixteen<FloatPart>;
using i32x16 = Sixteen<IntPart>;
using u32x16 = Sixteen<UintPart>;
using u8x64 = Sixteen<BytePart>;
#endif

template <class V>
static inline V load(const void* p) {
  if constexpr (is_pair<V>) {
    using Half = decltype(V::lo);
    return V(load<Half>(p), load<Half>((const char*)p + sizeof(Half)));
  } else {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
}
template <class V>
static inline void store(void* p, V v) {
  if constexpr (is_pair<V>) {
    store(p, v.lo);
    store((char*)p + sizeof(v.lo), v.hi);
  } else {
    std::memcpy(p, &v, sizeof(V));
  }
}

#if defined(__AVX512F__)
// Spelled out: `f32x16{} + v` would keep an addition for the sake of negative zero.
static inline f32x16 splat(float v) { return f32x16{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
static inline i32x16 splat_i32(int32_t v) { return i32x16{} + v; }
#else
static inline f32x16 splat(float v) {
#if defined(__AVX2__)
  return repeat<f32x16>((FloatPart)_mm256_set1_ps(v));
#else
  return repeat<f32x16>(FloatPart{v, v, v, v});
#endif
}
static inline i32x16 splat_i32(int32_t v) { return repeat<i32x16>(IntPart{} + v); }
#endif

static inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const auto blend = [](IntPart m, FloatPart y, FloatPart n) {  // masks are all ones or all zeros
    return (FloatPart)_mm256_blendv_ps((__m256)n, (__m256)y, (__m256)m);
  };
  return each(blend, mask, yes, no);
#else
  return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
#endif
}

// Lane i from `yes` where bit i is set.
static inline f32x16 select_bits(uint16_t bits, f32x16 yes, f32x16 no) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_mask_mov_ps((__m512)no, bits, (__m512)yes);
#else
  alignas(64) static const int32_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return select((splat_i32(bits) & load<i32x16>(bit)) != splat_i32(0), yes, no);
#endif
}

static inline i32x16 iota() {
  alignas(64) static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<i32x16>(lanes);
}

#if defined(__AVX512F__)

static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
static inline f32x16 to_float(i32x16 v) { return (f32x16)_mm512_cvtepi32_ps((__m512i)v); }
static inline i32x16 round_to_int(f32x16 v) { return (i32x16)_mm512_cvtps_epi32((__m512)v); }
static inline f32x16 max(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
static inline f32x16 min(f32x16 a, f32x16 b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }
static inline f32x16 from_half(const uint16_t* p) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static inline void store_u8(uint8_t* p, i32x16 v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
}
// acc[lane] += sum over j of u[4 lane + j] * s[j]: unsigned vector times four broadcast signed bytes.
static inline i32x16 dot_us(i32x16 acc, u8x64 u, int32_t s4) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, _mm512_set1_epi32(s4));
}
// acc[lane] += sum over j of s[4 lane + j] * u[j]: signed vector times four broadcast unsigned bytes.
static inline i32x16 dot_su(i32x16 acc, u8x64 s, int32_t u4) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(u4), (__m512i)s);
}

#elif defined(__AVX2__)

static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  const auto part = [](FloatPart x, FloatPart y, FloatPart z) {
    return (FloatPart)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
  };
  return each(part, a, b, c);
}
static inline f32x16 to_float(i32x16 v) {
  return each([](IntPart x) { return (FloatPart)_mm256_cvtepi32_ps((__m256i)x); }, v);
}
static inline i32x16 round_to_int(f32x16 v) {
  return each([](FloatPart x) { return (IntPart)_mm256_cvtps_epi32((__m256)x); }, v);
}
static inline FloatPart max(FloatPart a, FloatPart b) { return (FloatPart)_mm256_max_ps((__m256)a, (__m256)b); }
static inline f32x16 max(f32x16 a, f32x16 b) { return f32x16(max(a.lo, b.lo), max(a.hi, b.hi)); }
static inline f32x16 min(f32x16 a, f32x16 b) {
  return each([](FloatPart x, FloatPart y) { return (FloatPart)_mm256_min_ps((__m256)x, (__m256)y); }, a, b);
}
static inline f32x16 from_half(const uint16_t* p) {
  return f32x16((FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
}
static inline void store_u8(uint8_t* p, i32x16 v) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i lo = _mm256_and_si256((__m256i)v.lo, byte), hi = _mm256_and_si256((__m256i)v.hi, byte);
  const __m256i words = _mm256_packus_epi32(lo, hi), bytes = _mm256_packus_epi16(words, words);
  _mm_storeu_si128((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
// Sums of four products of bytes, `u` unsigned and `s` signed. vpmaddubsw would saturate, so bytes widen to 16 bits first.
static inline IntPart add_dots(IntPart acc, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return (IntPart)_mm256_dpbusd_avx_epi32((__m256i)acc, u, s);
#else
  const __m256i u_even = _mm256_and_si256(u, _mm256_set1_epi16(255)), u_odd = _mm256_srli_epi16(u, 8);
  const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
  return acc + ((IntPart)_mm256_madd_epi16(u_even, s_even) + (IntPart)_mm256_madd_epi16(u_odd, s_odd));
#endif
}
// acc[lane] += sum over j of u[4 lane + j] * s[j]: unsigned vector times four broadcast signed bytes.
static inline i32x16 dot_us(i32x16 acc, u8x64 u, int32_t s4) {
  return each([=](IntPart a, BytePart x) { return add_dots(a, (__m256i)x, _mm256_set1_epi32(s4)); }, acc, u);
}
// acc[lane] += sum over j of s[4 lane + j] * u[j]: signed vector times four broadcast unsigned bytes.
static inline i32x16 dot_su(i32x16 acc, u8x64 s, int32_t u4) {
  return each([=](IntPart a, BytePart x) { return add_dots(a, _mm256_set1_epi32(u4), (__m256i)x); }, acc, s);
}

#else

static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  const auto part = [](FloatPart x, FloatPart y, FloatPart z) {
    FloatPart r;
    for (int i = 0; i < kPartLanes; ++i) r[i] = std::fmaf(x[i], y[i], z[i]);
    return r;
  };
  return each(part, a, b, c);
}
static inline f32x16 to_float(i32x16 v) {
  return each([](IntPart x) { return __builtin_convertvector(x, FloatPart); }, v);
}
static inline i32x16 round_to_int(f32x16 v) {
  const auto part = [](FloatPart x) {
    IntPart r;
    for (int i = 0; i < kPartLanes; ++i) r[i] = (int32_t)std::nearbyintf(x[i]);
    return r;
  };
  return each(part, v);
}
// The second operand wins on NaN and on equal zeros, as in the vector instruction.
static inline f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }
static inline f32x16 min(f32x16 a, f32x16 b) { return select(a < b, a, b); }
static inline f32x16 from_half(const uint16_t* p) {
  float r[16];
  for (int i = 0; i < 16; ++i) r[i] = half_to_float(p[i]);
  return load<f32x16>(r);
}
static inline void store_u8(uint8_t* p, i32x16 v) {
  int32_t lanes[16];
  store(lanes, v);
  for (int i = 0; i < 16; ++i) p[i] = (uint8_t)lanes[i];
}
static inline i32x16 dot_us(i32x16 acc, u8x64 u, int32_t s4) {
  int8_t s[4];
  std::memcpy(s, &s4, 4);
  const auto part = [&](IntPart a, BytePart x) {
    for (int i = 0; i < kPartLanes; ++i)
      for (int j = 0; j < 4; ++j) a[i] += (int32_t)x[4 * i + j] * s[j];
    return a;
  };
  return each(part, acc, u);
}
static inline i32x16 dot_su(i32x16 acc, u8x64 s, int32_t u4) {
  uint8_t u[4];
  std::memcpy(u, &u4, 4);
  const auto part = [&](IntPart a, BytePart x) {
    for (int i = 0; i < kPartLanes; ++i)
      for (int j = 0; j < 4; ++j) a[i] += (int32_t)(int8_t)x[4 * i + j] * u[j];
    return a;
  };
  return each(part, acc, s);
}

#endif

static inline i32x16 widen_u8(const uint8_t* p) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return i32x16((IntPart)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                (IntPart)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))));
#else
  int32_t v[16];
  for (int i = 0; i < 16; ++i) v[i] = p[i];
  return load<i32x16>(v);
#endif
}
static inline i32x16 widen_i8(const int8_t* p) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return i32x16((IntPart)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
                (IntPart)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))));
#else
  int32_t v[16];
  for (int i = 0; i < 16; ++i) v[i] = p[i];
  return load<i32x16>(v);
#endif
}
// A panel's scales or minima of group g, bytes as they are.
static inline f32x16 load_scale(const Linear& w, const uint8_t* base, int g) {
  if (w.scales == Scales::kByte) return to_float(widen_i8((const int8_t*)base + g * kLanes));
  return w.scales == Scales::kHalf ? from_half((const uint16_t*)base + g * kLanes)
                                   : load<f32x16>((const float*)base + g * kLanes);
}
// The powers that a panel's bytes count: of scales, and of minima over those of scales.
static inline f32x16 scale_powers(const Linear& w, const uint8_t* panel) {
  return (f32x16)(widen_u8(panel + w.powers_offset) << 23);
}
static inline f32x16 minimum_powers(const Linear& w, const uint8_t* panel) {
  return (f32x16)(widen_u8(panel + w.powers_offset + kLanes) << 23);
}
// 64 integers in [-128, 127] (SIGNED) or [0, 255] as bytes.
template <bool SIGNED>
static inline void store_bytes(void* p, i32x16 a, i32x16 b, i32x16 c, i32x16 d) {
#if defined(__AVX512F__)
  // The packs work within 128-bit lanes, the permutation puts them in order.
  const __m512i ab = _mm512_packs_epi32((__m512i)a, (__m512i)b), cd = _mm512_packs_epi32((__m512i)c, (__m512i)d);
  const __m512i packed = SIGNED ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
#elif defined(__AVX2__)
  const auto pack = [](i32x16 x, i32x16 y) {
    const __m256i xx = _mm256_packs_epi32((__m256i)x.lo, (__m256i)x.hi);
    const __m256i yy = _mm256_packs_epi32((__m256i)y.lo, (__m256i)y.hi);
    const __m256i packed = SIGNED ? _mm256_packs_epi16(xx, yy) : _mm256_packus_epi16(xx, yy);
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  };
  _mm256_storeu_si256((__m256i*)p, pack(a, b));
  _mm256_storeu_si256((__m256i*)p + 1, pack(c, d));
#else
  uint8_t* to = (uint8_t*)p;
  store_u8(to, a), store_u8(to + 16, b), store_u8(to + 32, c), store_u8(to + 48, d);
#endif
}

// Lanes [0, count) from p, zero elsewhere; never touches memory past count.
static inline f32x16 load_some(const float* p, int count) {
  if (count >= 16) return load<f32x16>(p);
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  float v[16] = {};
  std::memcpy(v, p, sizeof(float) * count);
  return load<f32x16>(v);
#endif
}
static inline void store_some(float* p, f32x16 v, int count) {
  if (count >= 16) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  float lanes[16];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(float) * count);
#endif
}

// Reductions: halves are folded 16 -> 8 -> 4 -> 2 -> 1 on every instruction set, so the order never differs.
#if defined(__AVX2__)
#if defined(__AVX512F__)
static inline __m256 low_half(f32x16 v) { return _mm512_castps512_ps256((__m512)v); }
static inline __m256 high_half(f32x16 v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
}
#else
static inline __m256 low_half(f32x16 v) { return (__m256)v.lo; }
static inline __m256 high_half(f32x16 v) { return (__m256)v.hi; }
#endif
static inline float sum(f32x16 v) {
  __m256 a = _mm256_add_ps(low_half(v), high_half(v));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
static inline float max_lane(f32x16 v) {
  __m256 a = _mm256_max_ps(low_half(v), high_half(v));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#else
static inline float sum(f32x16 v) {
  float a[16];
  store(a, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}
static inline float max_lane(f32x16 v) {
  float a[16];
  store(a, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
}
#endif
static inline int32_t sum(i32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t lanes[16], total = 0;
  store(lanes, v);
  for (int i = 0; i < 16; ++i) total += lanes[i];
  return total;
#endif
}

static inline f32x16 absolute(f32x16 v) { return (f32x16)((i32x16)v & splat_i32(0x7fffffff)); }

// 2^x to about 2 ulp for x in [-126, 127]; inputs below are clamped. Adding 1.5 * 2^23 rounds x to the nearest
// integer n, which then stands in the low bits of the sum; the polynomial is the minimax fit of 2^r on [-0.5, 0.5] that
// is exact at 0 (relative error 9.2e-8 before rounding).
static inline f32x16 exp2(f32x16 x) {
  const f32x16 magic = splat(12582912.0f);
  x = max(x, splat(-126.0f));
  const f32x16 shifted = x + magic, r = x - (shifted - magic);
  f32x16 p = splat(0.001326472614891827f);
  p = fma(p, r, splat(0.009671512991189957f));
  p = fma(p, r, splat(0.05550733581185341f));
  p = fma(p, r, splat(0.24022242426872253f));
  p = fma(p, r, splat(0.6931470036506653f));
  p = fma(p, r, splat(1.0f));
  return (f32x16)((i32x16)p + ((i32x16)shifted << 23));
}
constexpr float kLog2E = 1.44269504088896341f;
static inline f32x16 exp(f32x16 x) { return exp2(min(x * splat(kLog2E), splat(127.0f))); }

// 1 / x to about 2 ulp for x in [1, 2^64]: a first guess by subtracting the exponent, then Newton's method three times.
// A division takes 16 cycles, and its hardware approximation differs from processor to processor.
static inline f32x16 reciprocal(f32x16 x) {
  f32x16 r = (f32x16)(splat_i32(0x7ef311c3) - (i32x16)x);
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) r = fma(r, fma(-x, r, splat(1.0f)), r);
  return r;
}

// 1 / (1 + exp(-x)), at least 2^-60
static inline f32x16 sigmoid(f32x16 x) {
  return reciprocal(splat(1.0f) + exp2(min(x * splat(-kLog2E), splat(60.0f))));
}

// v[r] of `rows` vectors -> lane r of the result, each folded by `op` as `one` folds a single vector: the same operations
// in the same order. Lanes from `rows` on mean nothing. Overwrites v.
template <class V, class Op, class One>
static inline V fold_rows(V* v, int rows, [[maybe_unused]] Op op, One one) {
#if defined(__AVX512F__)
  if (rows > 4) {
    // Each step folds two vectors into the halves of one, 16 x 16 lanes -> 8 x 16 -> 4 x 16 -> 2 x 16 -> 16.
    const auto at = [&](int i) { return (__m512)v[i]; };
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      v[i] = op((V)_mm512_shuffle_f32x4(at(i), at(i + 8), 0x44), (V)_mm512_shuffle_f32x4(at(i), at(i + 8), 0xee));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      v[i] = op((V)_mm512_shuffle_f32x4(at(i), at(i + 4), 0x88), (V)_mm512_shuffle_f32x4(at(i), at(i + 4), 0xdd));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      v[i] = op((V)_mm512_shuffle_ps(at(i), at(i + 2), 0x44), (V)_mm512_shuffle_ps(at(i), at(i + 2), 0xee));
    const V all = op((V)_mm512_shuffle_ps(at(0), at(1), 0x88), (V)_mm512_shuffle_ps(at(0), at(1), 0xdd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (V)_mm512_permutexvar_ps(order, (__m512)all);
  }
#elif defined(__AVX2__)
  using Part = decltype(V::lo);
  // Likewise for eight rows: 8 x 16 lanes -> 8 x 8 -> 4 x 8 -> 2 x 8 -> 8.
  const auto fold_eight = [&](const V* from) __attribute__((always_inline)) {
    __m256 x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = (__m256)op(from[i].lo, from[i].hi);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      x[i] = (__m256)op((Part)_mm256_permute2f128_ps(x[i], x[i + 4], 0x20),
                        (Part)_mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      x[i] = (__m256)op((Part)_mm256_shuffle_ps(x[i], x[i + 2], 0x44), (Part)_mm256_shuffle_ps(x[i], x[i + 2], 0xee));
    x[0] = (__m256)op((Part)_mm256_shuffle_ps(x[0], x[1], 0x88), (Part)_mm256_shuffle_ps(x[0], x[1], 0xdd));
    return (Part)_mm256_permutevar8x32_ps(x[0], _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7));
  };
  if (rows > 2) return V(fold_eight(v), rows > 8 ? fold_eight(v + 8) : Part{});
#endif
  alignas(64) decltype(one(v[0])) all[16] = {};
  for (int r = 0; r < rows; ++r) all[r] = one(v[r]);
  return load<V>(all);
}
template <class V>
static inline V sum_rows(V* v, int rows) {
  const auto add = [](auto a, auto b) {
    if constexpr (std::is_same_v<V, i32x16>)
      return (decltype(a))((UintPart)a + (UintPart)b);  // lanes that mean nothing may overflow
    else
      return a + b;
  };
  return fold_rows(v, rows, add, [](V x) { return sum(x); });
}
static inline f32x16 max_rows(f32x16* v, int rows) {
  return fold_rows(v, rows, [](auto a, auto b) { return max(a, b); }, [](f32x16 x) { return max_lane(x); });
}

// Sixteen pairs of bf16 as two vectors: the first and the second of each pair.
static inline void load_bf16_pairs(const uint16_t* p, f32x16* first, f32x16* second) {
  const i32x16 pairs = load<i32x16>(p);
  *first = (f32x16)(pairs << 16);
  *second = (f32x16)(pairs & splat_i32((int32_t)0xffff0000));
}

// float -> bf16, round to nearest even (finite inputs; NaN stays NaN by its quiet bit).
static inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` floats as bf16, and zeros up to `padded`, a multiple of 16.
static inline void round_row(const float* x, int count, int padded, uint16_t* out) {
#if defined(__AVX512BF16__)
  for (int i = 0; i < padded; i += 16) {
    const f32x16 v = i < count ? load_some(x + i, count - i) : splat(0.0f);
    _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
#else
  for (int i = 0; i < count; ++i) out[i] = to_bf16(x[i]);
  if (count < padded) std::memset(out + count, 0, sizeof(uint16_t) * (padded - count));
#endif
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
