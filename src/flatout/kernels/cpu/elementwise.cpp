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

// Greatest |x|, lane by lane.
static inline f32x16 greatest(const float* x, int count) {
  f32x16 m = splat(0.0f);
  for (int i = 0; i < count; i += kLanes) m = max(absolute(load_some(x + i, count - i)), m);
  return m;
}

// One group of a token: its codes, and into `totals` the sums of 16 codes each.
template <int PLANES>
static inline void quantize_group(const float* x, int count, f32x16 inverse, int8_t* const* codes, i32x16* totals) {
  const auto code = [&](int i) { return round_to_int(load_some(x + i, count - i) * inverse); };
  // |x| * (limit / max|x|) exceeds the limit by a rounding error at most, so no code does.
  const auto high = [](i32x16 c) { return PLANES == 1 ? c : (c + splat_i32(64)) >> 7; };
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    i32x16 c[4], h[4];
    for (int j = 0; j < 4; ++j) c[j] = code(i + j * kLanes), h[j] = high(c[j]);
    totals[0] += (h[0] + h[1]) + (h[2] + h[3]);
    store_bytes<true>(codes[0] + i, h[0], h[1], h[2], h[3]);
    if constexpr (PLANES == 2) {
      for (int j = 0; j < 4; ++j) c[j] -= h[j] << 7;
      totals[1] += (c[0] + c[1]) + (c[2] + c[3]);
      store_bytes<true>(codes[1] + i, c[0], c[1], c[2], c[3]);
    }
  }
  for (; i < count; i += kLanes) {
    uint8_t part[kLanes];
    const i32x16 c = code(i), h = high(c);
    const int lanes = std::min(kLanes, count - i);
    totals[0] += h;
    store_u8(part, h);
    std::memcpy(codes[0] + i, part, lanes);
    if constexpr (PLANES == 2) {
      totals[1] += c - (h << 7);
      store_u8(part, c - (h << 7));
      std::memcpy(codes[1] + i, part, lanes);
    }
  }
}

// Sixteen groups at a time, so that their maxima, scales and sums are found together.
template <int PLANES>
static void quantize_planes(const Linear& w, const float* x, const Activations& row) {
  constexpr int32_t kLimit = PLANES == 1 ? 127 : 127 * 128;
  f32x16 tops[kLanes];
  i32x16 totals[2][kLanes];
  if (w.activation_group == 0) tops[0] = splat(max_lane(greatest(x, w.k)));
  for (int first = 0; first < w.groups; first += kLanes) {
    const int groups = std::min(kLanes, w.groups - first);
    const auto start = [&](int g) { return (first + g) * w.group; };
    const auto count = [&](int g) { return std::min(w.group, w.k - start(g)); };
    f32x16 amax = tops[0];
    if (w.activation_group) {
      for (int g = 0; g < groups; ++g) tops[g] = greatest(x + start(g), count(g));
      amax = max_rows(tops, groups);
    }
    alignas(64) float scale[kLanes], inverse[kLanes];
    alignas(64) int32_t sums[2][kLanes];
    store(scale, amax / splat((float)kLimit));
    store(inverse, select(amax > splat(0.0f), splat((float)kLimit) / amax, splat(0.0f)));
    for (int g = 0; g < groups; ++g) {
      int8_t* const codes[2] = {row.codes[0] + start(g), row.codes[PLANES - 1] + start(g)};
      i32x16 total[2] = {};
      quantize_group<PLANES>(x + start(g), count(g), splat(inverse[g]), codes, total);
      for (int p = 0; p < PLANES; ++p) totals[p][g] = total[p];
    }
    for (int p = 0; p < PLANES; ++p) store(sums[p], sum_rows(totals[p], groups));
    for (int g = 0; g < groups; ++g) {
      const size_t at = (size_t)(first + g) * kTileRows;
      row.scales[at] = scale[g];
      for (int p = 0; p < PLANES; ++p) row.sums[p][at] = sums[p][g];
      row.scaled_sums[at] = scale[g] * (float)sums[0][g];
    }
  }
  for (int p = 0; p < PLANES; ++p) std::memset(row.codes[p] + w.k, 0, w.k_padded - w.k);
}

void quantize(const Linear& w, const float* x, const Activations& row) {
  if (w.planes == 2)
    quantize_planes<2>(w, x, row);
  else
    quantize_planes<1>(w, x, row);
}

void round_bf16(const float* x, int k, int k_padded, uint16_t* out) { round_row(x, k, k_padded, out); }

// silu(x) = x / (1 + exp(-x));  gelu_tanh(x) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
void gated(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride) {
  for (int i = 0; i < count; ++i) {
    f32x16 x = load<f32x16>(gate + (size_t)i * kLanes);
    f32x16 z = gelu ? splat(1.5957691216057308f) * fma(splat(0.044715f) * x * x, x, x) : x;
    f32x16 v = x * sigmoid(z) * load<f32x16>(up + (size_t)i * kLanes);
    store_some(out + (size_t)i * stride, v, lanes);
  }
}

void epilogue(const float* tile, int count, int lanes, const float* bias, bool add, float* out, int stride) {
  const f32x16 shift = bias ? load_some(bias, lanes) : splat(0.0f);
  for (int i = 0; i < count; ++i) {
    f32x16 v = load<f32x16>(tile + (size_t)i * kLanes);
    float* to = out + (size_t)i * stride;
    if (bias) v += shift;
    if (add) v += load_some(to, lanes);
    store_some(to, v, lanes);
  }
}

// gelu(x) = x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), with log2(Phi(-a)) a polynomial that is exact at 0: the minimax fit
// of a * Phi(-a) on [0, 8]. The result is within 1.2e-7 of the exact one plus its own rounding.
void bias_gelu(const float* tile, int count, int lanes, const float* bias, float* out, int stride) {
  const f32x16 shift = load_some(bias, lanes);
  for (int i = 0; i < count; ++i) {
    const f32x16 x = load<f32x16>(tile + (size_t)i * kLanes) + shift;
    const f32x16 a = min(absolute(x), splat(8.0f));
    f32x16 p = splat(2.992548979818821e-05f);
    p = fma(p, a, splat(-0.0007398852030746639f));
    p = fma(p, a, splat(0.007977496832609177f));
    p = fma(p, a, splat(-0.05323823168873787f));
    p = fma(p, a, splat(-0.458915650844574f));
    p = fma(p, a, splat(-1.1511471271514893f));
    p = fma(p, a, splat(-1.0f));
    store_some(out + (size_t)i * stride, fma(-a, exp2(p), max(x, splat(0.0f))), lanes);
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int d, float* out) {
  const f32x16 zero = splat(0.0f);
  f32x16 sums = zero, squares = zero;
  for (int i = 0; i < d; i += kLanes) sums += load_some(x + i, d - i);
  const f32x16 mean = splat(sum(sums) / (float)d);
  for (int i = 0; i < d; i += kLanes) {
    f32x16 v = load_some(x + i, d - i) - mean;
    if (d - i < kLanes) v = select(iota() < splat_i32(d - i), v, zero);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.0f / std::sqrt(sum(squares) / (float)d + eps));
  for (int i = 0; i < d; i += kLanes) {
    const f32x16 v = (load_some(x + i, d - i) - mean) * scale;
    store_some(out + i, fma(v, load_some(weight + i, d - i), load_some(bias + i, d - i)), d - i);
  }
}

void scale_columns(const float* x, const float* factors, int d, float* out) {
  for (int i = 0; i < d; i += kLanes) store_some(out + i, load_some(x + i, d - i) * load_some(factors + i, d - i), d - i);
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

// Index of the greatest value, the lowest on ties; -1 when some value is not a number.
int argmax(const float* row, int n) {
  f32x16 top = splat(-std::numeric_limits<float>::infinity());
  i32x16 at = {}, numbers = splat_i32(-1);
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    const f32x16 v = load<f32x16>(row + i);
    const i32x16 better = v > top;
    numbers &= v == v;
    top = max(v, top);
    at = (better & splat_i32(i)) | (~better & at);
  }
  int best = -1;
  float best_value = -std::numeric_limits<float>::infinity();
  const auto take = [&](float value, int index) {
    if (best < 0 || value > best_value || (value == best_value && index < best)) best = index, best_value = value;
  };
  bool finite = true;
  for (int lane = 0; lane < std::min(n, kLanes) && whole; ++lane) {
    finite &= numbers[lane] != 0;
    take(top[lane], at[lane] + lane);
  }
  for (int i = whole; i < n; ++i) {
    finite &= row[i] == row[i];
    take(row[i], i);
  }
  return finite ? best : -1;
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
