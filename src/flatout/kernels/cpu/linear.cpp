// Linear layers: one panel of 16 output rows times a block of tokens.
//
// Integer numerics (the contract of kernels/linear.py, identical in every build and for every block size):
//   acc = 0; for each group g in order:
//     acc = fma(float(sum_k a[k] * (code[k] - zero)), a_scale[g] * w_scale[g], acc)
//     (minimum)  acc = fma(a_scale[g] * float(sum_k a[k]), w_minimum[g], acc)
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

template <int BITS, int MB>
static void integer_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  const uint8_t* scales = panel + w.scales_offset;
  const uint8_t* extra = panel + w.extra_offset;
  const uint8_t* line = panel;
  const int lines = w.group * BITS / 32;  // 64-byte lines a group
  f32x16 acc[MB];
  const int8_t* codes[MB];
  for (int m = 0; m < MB; ++m) {
    acc[m] = splat(0.0f);
    codes[m] = a.codes + (size_t)(first + m) * w.k_padded;
  }
  for (int g = 0; g < w.groups; ++g) {
    i32x16 dot[MB], dot_high[MB];
    for (int m = 0; m < MB; ++m) {
      int32_t sum_a = a.sums[(size_t)(first + m) * w.groups + g];
      dot[m] = splat_i32(-w.integer_zero * sum_a);
      dot_high[m] = splat_i32(0);
    }
    for (int i = 0; i < lines; ++i, line += 64) {
      // The stream runs on into the next panel, so fetching past this one is never wasted.
      __builtin_prefetch(line + kPrefetchBytes);
      u8x64 v = load<u8x64>(line);
      if constexpr (BITS == 8) {
        for (int m = 0; m < MB; ++m) dot[m] = dot_us(dot[m], v, four(codes[m] + 4 * i));
      } else {
        u8x64 lo = low_nibbles(v), hi = high_nibbles(v);
        for (int m = 0; m < MB; ++m) {
          dot[m] = dot_us(dot[m], lo, four(codes[m] + 8 * i));
          dot_high[m] = dot_us(dot_high[m], hi, four(codes[m] + 8 * i + 4));
        }
      }
    }
    f32x16 scale = load_scale(w, scales, g);
    for (int m = 0; m < MB; ++m) {
      size_t at = (size_t)(first + m) * w.groups + g;
      i32x16 total = BITS == 8 ? dot[m] : dot[m] + dot_high[m];
      if (w.zero == Zero::kAsymmetric) total -= load_zeros(extra, g) * splat_i32(a.sums[at]);
      acc[m] = fma(to_float(total), splat(a.scales[at]) * scale, acc[m]);
      if (w.zero == Zero::kMinimum) acc[m] = fma(splat(a.scaled_sums[at]), load_scale(w, extra, g), acc[m]);
      codes[m] += w.group;
    }
  }
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

// Integer weights times float activations: each group's sum of a * (code - zero) is formed in fp32, then scaled.
template <int BITS, int MB>
static void dequantized_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  const uint8_t* scales = panel + w.scales_offset;
  const uint8_t* extra = panel + w.extra_offset;
  const uint8_t* line = panel;
  const int quads = w.group / 4;
  f32x16 acc[MB];
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  for (int g = 0; g < w.groups; ++g) {
    i32x16 zero = w.zero == Zero::kAsymmetric ? load_zeros(extra, g) : splat_i32(w.integer_zero);
    f32x16 part[MB];
    for (int m = 0; m < MB; ++m) part[m] = splat(0.0f);
    f32x16 minimum = w.zero == Zero::kMinimum ? load_scale(w, extra, g) : splat(0.0f);
    f32x16 scale = load_scale(w, scales, g);
    for (int q = 0; q < quads; ++q) {
      u8x64 v = load<u8x64>(line);
      if constexpr (BITS == 8) {
        line += 64;
      } else {
        v = q % 2 ? high_nibbles(v) : low_nibbles(v);
        line += q % 2 ? 64 : 0;
      }
      typedef uint32_t u32x16 __attribute__((vector_size(64)));
      for (int j = 0; j < 4; ++j) {
        i32x16 code = (i32x16)(((u32x16)v >> (8 * j)) & (u32x16)splat_i32(0xff));
        f32x16 value = to_float(code - zero);
        if (w.zero == Zero::kMinimum) value = fma(value, scale, minimum);
        int column = g * w.group + 4 * q + j;
        for (int m = 0; m < MB; ++m)
          part[m] = fma(value, splat(a.floats[(size_t)(first + m) * w.k_padded + column]), part[m]);
      }
    }
    for (int m = 0; m < MB; ++m)
      acc[m] = w.zero == Zero::kMinimum ? acc[m] + part[m] : fma(part[m], scale, acc[m]);
  }
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

template <int MB>
static void float_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  f32x16 acc[MB];
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  const float* x = a.floats + (size_t)first * w.k_padded;
  const float* row = (const float*)panel;
  for (int k = 0; k < w.k; ++k, row += kLanes) {
    __builtin_prefetch((const char*)row + kPrefetchBytes);
    f32x16 v = load<f32x16>(row);
    for (int m = 0; m < MB; ++m) acc[m] = fma(v, splat(x[(size_t)m * w.k_padded + k]), acc[m]);
  }
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

// bf16 without a bf16 instruction: products and sums in fp32, even column first.
template <int MB>
static void bf16_block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  typedef uint32_t u32x16 __attribute__((vector_size(64)));
  f32x16 acc[MB];
  for (int m = 0; m < MB; ++m) acc[m] = splat(0.0f);
  const uint16_t* x = a.bf16 + (size_t)first * w.k_padded;
  const uint8_t* line = panel;
  for (int k = 0; k < w.k_padded; k += 2, line += 64) {
    u32x16 pair = load<u32x16>(line);
    f32x16 even = (f32x16)(pair << 16), odd = (f32x16)(pair & 0xffff0000u);
    for (int m = 0; m < MB; ++m) {
      uint32_t bits;
      std::memcpy(&bits, x + (size_t)m * w.k_padded + k, 4);
      acc[m] = fma(even, (f32x16)(u32x16{} + (bits << 16)), acc[m]);
      acc[m] = fma(odd, (f32x16)(u32x16{} + (bits & 0xffff0000u)), acc[m]);
    }
  }
  for (int m = 0; m < MB; ++m) store(out + (size_t)m * kLanes, acc[m]);
}

template <int MB>
static void block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  if (w.kind == WeightKind::kFloat32) return float_block<MB>(w, panel, a, first, out);
  if (w.kind == WeightKind::kBFloat16) return bf16_block<MB>(w, panel, a, first, out);
  if (w.integer_activation)
    return w.bits == 8 ? integer_block<8, MB>(w, panel, a, first, out) : integer_block<4, MB>(w, panel, a, first, out);
  return w.bits == 8 ? dequantized_block<8, MB>(w, panel, a, first, out)
                     : dequantized_block<4, MB>(w, panel, a, first, out);
}

void linear_panel(const Linear& w, const uint8_t* panel, const int8_t*, const Activations& a, int first, int count,
                  float* out) {
  int m = 0;
  for (; m + 8 <= count; m += 8) block<8>(w, panel, a, first + m, out + (size_t)m * kLanes);
  for (; m + 4 <= count; m += 4) block<4>(w, panel, a, first + m, out + (size_t)m * kLanes);
  for (; m < count; ++m) block<1>(w, panel, a, first + m, out + (size_t)m * kLanes);
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
