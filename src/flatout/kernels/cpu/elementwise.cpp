// Norms, activation quantisation, rotary embedding, gated activations, softmax denominators: everything between matmuls.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

// out = x * (1 / sqrt(mean(x^2) + eps)) * weight
void rms_norm(const float* x, const float* weight, float eps, int d, float* out) {
  f32x16 squares = splat(0.0f);
  for (int i = 0; i < d; i += kLanes) {
    f32x16 v = load_some(x + i, d - i);
    squares = fma(v, v, squares);
  }
  float scale = 1.0f / std::sqrt(sum(squares) / (float)d + eps);
  for (int i = 0; i < d; i += kLanes) {
    f32x16 v = load_some(x + i, d - i) * splat(scale) * load_some(weight + i, d - i);
    store_some(out + i, v, d - i);
  }
}

static inline f32x16 greatest(const float* x, int count) {
  f32x16 m = splat(0.0f);
  for (int i = 0; i < count; i += kLanes) m = max(absolute(load_some(x + i, count - i)), m);
  return m;
}

static inline i32x16 clamp_code(i32x16 v) {
  v = (v > splat_i32(127)) ? splat_i32(127) : v;
  return (v < splat_i32(-127)) ? splat_i32(-127) : v;
}

void quantize(const float* x, int k, int k_padded, int group, int groups, int act_group, int8_t* codes, float* scales,
              int32_t* sums, float* scaled_sums) {
  float token_max = act_group == 0 ? max_lane(greatest(x, k)) : 0.0f;
  for (int g = 0; g < groups; ++g) {
    const int start = g * group, count = std::min(group, k - start);
    const float* in = x + start;
    const float amax = act_group == 0 ? token_max : max_lane(greatest(in, count));
    const float scale = amax / 127.0f, inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
    i32x16 total = {};
    for (int i = 0; i < count; i += kLanes) {
      i32x16 code = clamp_code(round_to_int(load_some(in + i, count - i) * splat(inverse)));
      total += code;
      if (count - i >= kLanes) {
        store_u8((uint8_t*)codes + start + i, code);
      } else {
        uint8_t part[kLanes];
        store_u8(part, code);
        std::memcpy(codes + start + i, part, count - i);
      }
    }
    sums[g] = sum(total);
    scales[g] = scale;
    scaled_sums[g] = scale * (float)sums[g];
  }
  if (k < k_padded) std::memset(codes + k, 0, k_padded - k);
}

void round_bf16(const float* x, int k, int k_padded, uint16_t* out) {
  for (int i = 0; i < k; ++i) out[i] = to_bf16(x[i]);
  if (k < k_padded) std::memset(out + k, 0, sizeof(uint16_t) * (k_padded - k));
}

// silu(x) = x / (1 + exp(-x));  gelu_tanh(x) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
void gated(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride) {
  for (int i = 0; i < count; ++i) {
    f32x16 x = load<f32x16>(gate + (size_t)i * kLanes);
    f32x16 z = gelu ? splat(1.5957691216057308f) * fma(splat(0.044715f) * x * x, x, x) : x;
    f32x16 v = x / (splat(1.0f) + exp(-z)) * load<f32x16>(up + (size_t)i * kLanes);
    store_some(out + (size_t)i * stride, v, lanes);
  }
}

// Dimension e turns with e + E / 2 (the Hugging Face pairing).
void rope(float* x, const float* table, int head_dim) {
  const int half = head_dim / 2;
  const float *cosine = table, *sine = table + half;
  for (int i = 0; i < half; i += kLanes) {
    const int count = half - i;
    f32x16 a = load_some(x + i, count), b = load_some(x + half + i, count);
    f32x16 c = load_some(cosine + i, count), s = load_some(sine + i, count);
    store_some(x + i, a * c - b * s, count);
    store_some(x + half + i, b * c + a * s, count);
  }
}

// Greatest value in `top`; returns log sum exp, summed in fp32 lanes per 4,096 values and in double across them.
float log_sum_exp(const float* row, int n) {
  f32x16 m = splat(-std::numeric_limits<float>::infinity());
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) m = max(load<f32x16>(row + i), m);
  float top = max_lane(m);
  for (int i = whole; i < n; ++i) top = std::max(top, row[i]);
  double total = 0.0;
  for (int start = 0; start < n; start += 4096) {
    const int stop = std::min(n, start + 4096);
    f32x16 part = splat(0.0f);
    for (int i = start; i < stop; i += kLanes) {
      f32x16 e = exp(load_some(row + i, stop - i) - splat(top));
      i32x16 inside = iota() < splat_i32(stop - i);
      part += select(inside, e, splat(0.0f));
    }
    total += sum(part);
  }
  return top + (float)std::log(total);
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
