// Sixteen-lane vectors with one meaning on every instruction set.
//
// Each kernel file is compiled once per instruction set with FLATOUT_ISA naming its namespace. A logical vector always
// has 16 lanes (one AVX-512 register, two AVX2 registers, or plain loops), sums run in the same order everywhere and
// multiply-adds are always fused, so the three builds agree bit for bit in fp32 and in integers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace flatout {
namespace FLATOUT_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

// Spelled out: `f32x16{} + v` would keep an addition for the sake of negative zero.
static inline f32x16 splat(float v) { return f32x16{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
static inline i32x16 splat_i32(int32_t v) { return i32x16{} + v; }

template <class V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

static inline f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
  return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

static inline i32x16 iota() {
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
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
static inline f32x16 from_bf16(const uint16_t* p) {
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
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

struct Halves {
  __m256i lo, hi;
};
template <class V>
static inline Halves split(V v) {
  Halves h;
  std::memcpy(&h, &v, 64);
  return h;
}
template <class V>
static inline V join(__m256i lo, __m256i hi) {
  V v;
  Halves h{lo, hi};
  std::memcpy(&v, &h, 64);
  return v;
}
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  Halves x = split(a), y = split(b), z = split(c);
  __m256 lo = _mm256_fmadd_ps((__m256)x.lo, (__m256)y.lo, (__m256)z.lo);
  __m256 hi = _mm256_fmadd_ps((__m256)x.hi, (__m256)y.hi, (__m256)z.hi);
  return join<f32x16>((__m256i)lo, (__m256i)hi);
}
static inline f32x16 to_float(i32x16 v) {
  Halves x = split(v);
  return join<f32x16>((__m256i)_mm256_cvtepi32_ps(x.lo), (__m256i)_mm256_cvtepi32_ps(x.hi));
}
static inline i32x16 round_to_int(f32x16 v) {
  Halves x = split(v);
  return join<i32x16>(_mm256_cvtps_epi32((__m256)x.lo), _mm256_cvtps_epi32((__m256)x.hi));
}
static inline f32x16 max(f32x16 a, f32x16 b) {
  Halves x = split(a), y = split(b);
  return join<f32x16>((__m256i)_mm256_max_ps((__m256)x.lo, (__m256)y.lo),
                      (__m256i)_mm256_max_ps((__m256)x.hi, (__m256)y.hi));
}
static inline f32x16 min(f32x16 a, f32x16 b) {
  Halves x = split(a), y = split(b);
  return join<f32x16>((__m256i)_mm256_min_ps((__m256)x.lo, (__m256)y.lo),
                      (__m256i)_mm256_min_ps((__m256)x.hi, (__m256)y.hi));
}
static inline f32x16 from_half(const uint16_t* p) {
  return join<f32x16>((__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                      (__m256i)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8))));
}
static inline f32x16 from_bf16(const uint16_t* p) {
  __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8))), 16);
  return join<f32x16>(lo, hi);
}
static inline void store_u8(uint8_t* p, i32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = (uint8_t)v[i];
}
// vpmaddubsw would saturate for 8-bit codes, so bytes widen to 16 bits first: every sum stays exact.
static inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
  __m256i u_lo = _mm256_unpacklo_epi8(u, _mm256_setzero_si256());
  __m256i u_hi = _mm256_unpackhi_epi8(u, _mm256_setzero_si256());
  __m256i sign = _mm256_cmpgt_epi8(_mm256_setzero_si256(), s);
  __m256i s_lo = _mm256_unpacklo_epi8(s, sign), s_hi = _mm256_unpackhi_epi8(s, sign);
  __m256i p_lo = _mm256_madd_epi16(u_lo, s_lo), p_hi = _mm256_madd_epi16(u_hi, s_hi);
  return _mm256_add_epi32(acc, _mm256_hadd_epi32(p_lo, p_hi));
}
static inline i32x16 dot_us(i32x16 acc, u8x64 u, int32_t s4) {
  Halves x = split(acc), y = split(u);
  __m256i s = _mm256_set1_epi32(s4);
  return join<i32x16>(dot_half(x.lo, y.lo, s), dot_half(x.hi, y.hi, s));
}
static inline i32x16 dot_su(i32x16 acc, u8x64 s, int32_t u4) {
  Halves x = split(acc), y = split(s);
  __m256i u = _mm256_set1_epi32(u4);
  return join<i32x16>(dot_half(x.lo, u, y.lo), dot_half(x.hi, u, y.hi));
}

#else

static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = std::fmaf(a[i], b[i], c[i]);
  return r;
}
static inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
static inline i32x16 round_to_int(f32x16 v) {
  i32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = (int32_t)std::nearbyintf(v[i]);
  return r;
}
// The second operand wins on NaN and on equal zeros, as in the vector instruction.
static inline f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }
static inline f32x16 min(f32x16 a, f32x16 b) { return select(a < b, a, b); }
static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 0) {
    float v = (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -v : v;
  }
  bits = exponent == 31 ? sign | 0x7f800000 | mantissa << 13 : sign | (exponent + 112) << 23 | mantissa << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
static inline f32x16 from_half(const uint16_t* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = half_to_float(p[i]);
  return r;
}
static inline f32x16 from_bf16(const uint16_t* p) {
  i32x16 r;
  for (int i = 0; i < 16; ++i) r[i] = (int32_t)((uint32_t)p[i] << 16);
  return (f32x16)r;
}
static inline void store_u8(uint8_t* p, i32x16 v) {
  for (int i = 0; i < 16; ++i) p[i] = (uint8_t)v[i];
}
static inline i32x16 dot_us(i32x16 acc, u8x64 u, int32_t s4) {
  int8_t s[4];
  std::memcpy(s, &s4, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc[i] += (int32_t)u[4 * i + j] * s[j];
  return acc;
}
static inline i32x16 dot_su(i32x16 acc, u8x64 s, int32_t u4) {
  uint8_t u[4];
  std::memcpy(u, &u4, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc[i] += (int32_t)(int8_t)s[4 * i + j] * u[j];
  return acc;
}

#endif

// Lanes [0, count) from p, zero elsewhere; never touches memory past count.
static inline f32x16 load_some(const float* p, int count) {
  if (count >= 16) return load<f32x16>(p);
#if defined(__AVX512F__)
  return (f32x16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  f32x16 v = {};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
#endif
}
static inline void store_some(float* p, f32x16 v, int count) {
  if (count >= 16) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  std::memcpy(p, &v, sizeof(float) * count);
#endif
}

// Reductions: halves are folded 16 -> 8 -> 4 -> 2 -> 1 on every instruction set, so the order never differs.
#if defined(__AVX2__)
static inline __m256 low_half(f32x16 v) {
  __m256 h;
  std::memcpy(&h, &v, 32);
  return h;
}
static inline __m256 high_half(f32x16 v) {
#if defined(__AVX512F__)
  return _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
#else
  __m256 h;
  std::memcpy(&h, (const char*)&v + 32, 32);
  return h;
#endif
}
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
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
#endif
}

static inline f32x16 absolute(f32x16 v) { return (f32x16)((i32x16)v & splat_i32(0x7fffffff)); }

// exp(x) to about 1 ulp for x in [-87, 88]; inputs outside are clamped. Cody-Waite reduction by ln 2 and the degree-6
// Taylor-like polynomial of Cephes' expf.
static inline f32x16 exp(f32x16 x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  i32x16 n = round_to_int(x * splat(1.44269504088896341f));
  f32x16 nf = to_float(n);
  f32x16 r = fma(nf, splat(-0.693359375f), x);
  r = fma(nf, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return (f32x16)((i32x16)p + (n << 23));
}

// float -> bf16, round to nearest even (finite inputs; NaN stays NaN by its quiet bit).
static inline uint16_t to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
