// Linear layers: one panel of 16 output rows times a block of tokens.
//
// Integer numerics (the contract of kernels/linear.py, identical in every build and for every block size):
//   acc = 0; for each group g in order:
//     acc = fma(float(sum_k a[k] * (code[k] - zero)), a_scale[g] * w_scale[g], acc)
//     (minimum)  acc = fma(a_scale[g] * float(sum_k a[k]), w_minimum[g], acc)
// With two activation planes (a = 128 * high + low) the fma is done for high with 128 * scale, then for low.
// Bytes: the panel once a call. Operations: 2 * 16 * K a token.
#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

static inline f32x16 load_scale(const Linear& w, const uint8_t* base, int g) {
  return w.half_scales ? from_half((const uint16_t*)base + g * kLanes) : load<f32x16>((const float*)base + g * kLanes);
}

static inline i32x16 load_zeros(const uint8_t* base, int g) {
  i32x16 z;
  for (int i = 0; i < kLanes; ++i) z[i] = base[g * kLanes + i];
  return z;
}

// Sixteen low and sixteen high nibbles a 32-bit lane: column groups 2i and 2i + 1.
static inline u8x64 low_nibbles(u8x64 v) { return v & (u8x64)splat_i32(0x0f0f0f0f); }
static inline u8x64 high_nibbles(u8x64 v) {
  typedef uint32_t u32x16 __attribute__((vector_size(64)));
  return (u8x64)((u32x16)v >> 4) & (u8x64)splat_i32(0x0f0f0f0f);
}

static inline int32_t four(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

template <int BITS, int PLANES, int MB>
static void integer_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  const uint8_t* scales = panel + w.scales_offset;
  const uint8_t* extra = panel + w.extra_offset;
  const uint8_t* line = panel;
  const int lines = w.group * BITS / 32;  // 64-byte lines a group
  f32x16 acc[MB];
  const int8_t* codes[PLANES][MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) {
    acc[m] = splat(0.0f);
    for (int p = 0; p < PLANES; ++p) codes[p][m] = a.codes[p] + (size_t)(first + m) * w.row_stride;
  }
  for (int g = 0; g < w.groups; ++g) {
    i32x16 dot[PLANES][MB], dot_high[PLANES][MB];
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m)
      for (int p = 0; p < PLANES; ++p) {
        dot[p][m] = splat_i32(-w.integer_zero * a.sums[p][group_index(first + m, g, w.groups)]);
        dot_high[p][m] = splat_i32(0);
      }
    for (int i = 0; i < lines; ++i, line += 64) {
      // The stream runs on into the next panel, so fetching past this one is never wasted.
      __builtin_prefetch(line + kPrefetchBytes);
      const u8x64 v = load<u8x64>(line);
      if constexpr (BITS == 8) {
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m)
          for (int p = 0; p < PLANES; ++p) dot[p][m] = dot_us(dot[p][m], v, four(codes[p][m] + 4 * i));
      } else {
        const u8x64 lo = low_nibbles(v), hi = high_nibbles(v);
#pragma GCC unroll 16
        for (int m = 0; m < MB; ++m)
          for (int p = 0; p < PLANES; ++p) {
            dot[p][m] = dot_us(dot[p][m], lo, four(codes[p][m] + 8 * i));
            dot_high[p][m] = dot_us(dot_high[p][m], hi, four(codes[p][m] + 8 * i + 4));
          }
      }
    }
    const f32x16 scale = load_scale(w, scales, g);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      const size_t at = group_index(first + m, g, w.groups);
      const f32x16 c = splat(a.scales[at]) * scale;
      for (int p = 0; p < PLANES; ++p) {
        i32x16 total = BITS == 8 ? dot[p][m] : dot[p][m] + dot_high[p][m];
        if (w.zero == Zero::kAsymmetric) total -= load_zeros(extra, g) * splat_i32(a.sums[p][at]);
        acc[m] = fma(to_float(total), p + 1 < PLANES ? c * splat(128.0f) : c, acc[m]);
        codes[p][m] += w.group;
      }
      if (w.zero == Zero::kMinimum) acc[m] = fma(splat(a.scaled_sums[at]), load_scale(w, extra, g), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
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
  typedef uint32_t u32x16 __attribute__((vector_size(64)));
  f32x16 acc[MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  const uint16_t* x = a.bf16 + (size_t)first * w.row_stride;
  const uint8_t* line = panel;
  for (int k = 0; k < w.k_padded; k += 2, line += 64) {
    u32x16 pair = load<u32x16>(line);
    f32x16 even = (f32x16)(pair << 16), odd = (f32x16)(pair & 0xffff0000u);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      uint32_t bits;
      std::memcpy(&bits, x + (size_t)m * w.row_stride + k, 4);
      acc[m] = fma(even, (f32x16)(u32x16{} + (bits << 16)), acc[m]);
      acc[m] = fma(odd, (f32x16)(u32x16{} + (bits & 0xffff0000u)), acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

template <int MB>
static void block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  if (w.kind == WeightKind::kFloat32) return float_block<MB>(w, panel, a, first, out);
  if (w.kind == WeightKind::kBFloat16) return bf16_block<MB>(w, panel, a, first, out);
  if (w.bits == 8)
    return w.planes == 1 ? integer_block<8, 1, MB>(w, panel, a, first, out)
                         : integer_block<8, 2, MB>(w, panel, a, first, out);
  return w.planes == 1 ? integer_block<4, 1, MB>(w, panel, a, first, out)
                       : integer_block<4, 2, MB>(w, panel, a, first, out);
}

void linear_panels(const Linear& w, const uint8_t* const* panel, int panels, const int8_t* const*,
                   const Activations& a, int first, int count, float* const* out) {
  for (int p = 0; p < panels; ++p) {
    int m = 0;
    for (; m + 8 <= count; m += 8) block<8>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
    for (; m + 4 <= count; m += 4) block<4>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
    for (; m < count; ++m) block<1>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
