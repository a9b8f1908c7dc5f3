// Every instruction set's kernels against plain C++, for machines where the Python tests cannot run. Prints one digest of
// all results that must be the same bits on every processor; exits with 1 when something is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/features.h"
#include "cpu/matmul.h"
#include "cpu/model.h"

using namespace flatout;

static void expect_near(const Floats& got, const std::vector<double>& want, double bound, const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    if (error <= bound) continue;
    return expect(false, what + ": value " + std::to_string(i) + " off by " + std::to_string(error));
  }
}

// 1.m * 2^e as an IEEE half, and as the float it stands for.
struct Half {
  uint16_t bits;
  float value;
};
static Half random_half() {
  const int mantissa = random_bits() % 1024, exponent = (int)(random_bits() % 40) - 30;  // some subnormal
  if (exponent < -14) return {(uint16_t)mantissa, std::ldexp((float)mantissa, -24)};
  return {(uint16_t)((exponent + 15) << 10 | mantissa), std::ldexp(1.0f + (float)mantissa / 1024, exponent)};
}

// -127 to 127 times a power of two that all of a row share.
static Half byte_half(size_t row) {
  const int code = (int)(random_bits() % 255) - 127, exponent = (int)(row % 25) - 20;
  const float value = std::ldexp((float)code, exponent);
  int power;
  const float fraction = std::frexp(std::fabs(value), &power);  // in [0.5, 1)
  const int biased = power - 1 + 15, sign = code < 0 ? 0x8000 : 0;
  const int bits = code == 0 ? 0 : biased > 0 ? biased << 10 | (int)(fraction * 2048 - 1024) : (int)std::ldexp(fraction, power + 24);
  return {(uint16_t)(sign | bits), value};
}

struct Format {
  const char* name;
  int bits, group, planes, activation_group;
  Zero zero;
  bool half, byte = false;  // scales
};
constexpr Format kFormats[] = {
    {"w8a8", 8, 0, 1, 0, Zero::kSymmetric, false},       {"w8a8-g64-asym", 8, 64, 1, 64, Zero::kAsymmetric, false},
    {"w4a8-g32", 4, 32, 1, 32, Zero::kSymmetric, false}, {"w4a8-g64-asym", 4, 64, 1, 64, Zero::kAsymmetric, false},
    {"w8a16", 8, 0, 2, 0, Zero::kSymmetric, false},      {"w4a16-g32", 4, 32, 2, 0, Zero::kSymmetric, false},
    {"q4_0", 4, 32, 1, 32, Zero::kSymmetric, true},      {"q4_1", 4, 32, 1, 32, Zero::kMinimum, true},
    {"q8_0", 8, 32, 1, 32, Zero::kSymmetric, true},      {"w6a8", 6, 0, 1, 0, Zero::kSymmetric, true},
    {"w5a8-g32", 5, 32, 1, 32, Zero::kSymmetric, false}, {"w5a16", 5, 0, 2, 0, Zero::kSymmetric, false},
    {"w6a16-g64-asym", 6, 64, 2, 0, Zero::kAsymmetric, false},
    {"q4_0-s8", 4, 32, 1, 32, Zero::kSymmetric, true, true},
    {"q4_1-s8", 4, 32, 1, 32, Zero::kMinimum, true, true},
};

static void check_integer_linear(const Ops& ops, const Format& f, int m, int n, int k) {
  const int group = f.group ? f.group : k, groups = k / group, limit = f.planes == 1 ? 127 : 127 * 128;
  std::vector<uint8_t> codes((size_t)n * k), zeros((size_t)n * groups);
  Floats scales((size_t)n * groups), minima(scales);
  std::vector<uint16_t> half_scales(scales.size()), half_minima(scales.size());
  for (uint8_t& c : codes) c = (uint8_t)(random_bits() % (1u << f.bits));
  for (size_t i = 0; i < scales.size(); ++i) {
    const Half s = f.byte ? byte_half(i / groups) : random_half(), low = f.byte ? byte_half(i / groups + 1) : random_half();
    scales[i] = s.value, half_scales[i] = s.bits, minima[i] = low.value, half_minima[i] = low.bits;
    zeros[i] = (uint8_t)(random_bits() % (1u << f.bits));
  }
  Source source;
  source.kind = WeightKind::kInteger;
  source.n = n, source.k = k, source.bits = f.bits, source.group = f.group, source.zero = f.zero;
  source.half_scales = f.half, source.byte_scales = f.byte, source.planes = f.planes, source.activation_group = f.activation_group;
  source.codes = codes.data(), source.zeros = zeros.data();
  source.scales = f.half ? (const void*)half_scales.data() : scales.data();
  source.minima = f.half ? (const void*)half_minima.data() : minima.data();
  const Floats x = random_floats((size_t)m * k);
  Floats got((size_t)m * n), want((size_t)m * n);
  linear_once(ops, source, x.data(), m, got.data());
  for (int t = 0; t < m; ++t) {
    const float* row = x.data() + (size_t)t * k;
    const auto greatest = [&](int from, int count) {
      float top = 0;
      for (int i = from; i < from + count; ++i) top = std::fmax(top, std::fabs(row[i]));
      return top;
    };
    for (int r = 0; r < n; ++r) {
      float sum = 0;
      for (int g = 0; g < groups; ++g) {
        const float top = f.activation_group ? greatest(g * group, group) : greatest(0, k);
        const float a_scale = top / (float)limit, inverse = (float)limit / top;
        const size_t at = (size_t)r * groups + g;
        int64_t dot[2] = {}, total = 0;
        for (int i = g * group; i < (g + 1) * group; ++i) {
          const int a = (int)std::nearbyintf(row[i] * inverse), high = (a + 64) >> 7, code = codes[(size_t)r * k + i];
          const int w = f.zero == Zero::kAsymmetric ? code - zeros[at]
                        : f.zero == Zero::kMinimum  ? code
                        : f.bits == 8               ? (int8_t)code
                                                    : code - (1 << (f.bits - 1));
          dot[0] += (int64_t)(f.planes == 1 ? a : high) * w;
          dot[1] += (int64_t)(a - 128 * high) * w;
          total += a;
        }
        const float scale = a_scale * scales[at];
        if (f.planes == 2) {
          sum = std::fmaf((float)dot[0], scale * 128.0f, sum);
          sum = std::fmaf((float)dot[1], scale, sum);
        } else {
          sum = std::fmaf((float)dot[0], scale, sum);
        }
        if (f.zero == Zero::kMinimum) sum = std::fmaf(a_scale * (float)total, minima[at], sum);
      }
      want[(size_t)t * n + r] = sum;
    }
  }
  expect(std::memcmp(got.data(), want.data(), got.size() * 4) == 0,
         std::string(ops.name) + " " + f.name + " " + std::to_string(m) + " tokens");
  add_to_digest(got);
}

static void check_float_linear(const Ops& ops, bool bf16, int m, int n, int k) {
  Floats x = random_floats((size_t)m * k), w = random_floats((size_t)n * k), got((size_t)m * n);
  if (bf16)
    for (Floats* v : {&x, &w})
      for (float& value : *v) {
        const uint32_t bits = (uint32_t)round_to_bf16(value) << 16;
        std::memcpy(&value, &bits, 4);
      }
  Source source;
  source.kind = bf16 ? WeightKind::kBFloat16 : WeightKind::kFloat32;
  source.n = n, source.k = k, source.bits = bf16 ? 16 : 32, source.values = w.data();
  linear_once(ops, source, x.data(), m, got.data());
  std::vector<double> want((size_t)m * n);
  for (int t = 0; t < m; ++t)
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < k; ++i) want[(size_t)t * n + r] += (double)x[(size_t)t * k + i] * w[(size_t)r * k + i];
  expect_near(got, want, 8 * k * k * 0x1p-24, std::string(ops.name) + (bf16 ? " bf16" : " fp32"));
  if (!bf16) add_to_digest(got);
}

static void check_elementwise(const Ops& ops, int d) {
  const std::string name = ops.name;
  const Floats x = random_floats(d), weight = random_floats(d);
  Floats got(d);
  std::vector<double> want(d);
  double squares = 0;
  for (float v : x) squares += (double)v * v;
  for (int i = 0; i < d; ++i) want[i] = x[i] / std::sqrt(squares / d + 1e-5) * weight[i];
  ops.rms_norm(x.data(), weight.data(), 1e-5f, d, got.data());
  expect_near(got, want, 1e-5, name + " rms_norm");
  add_to_digest(got);
  const Floats gate = random_floats(5 * kLanes), up = random_floats(5 * kLanes);
  for (bool gelu : {false, true}) {
    Floats out(5 * kLanes);
    std::vector<double> expected(out.size());
    ops.gated(gate.data(), up.data(), 5, kLanes, gelu, out.data(), kLanes);
    for (size_t i = 0; i < out.size(); ++i) {
      const double g = gate[i], z = gelu ? 1.5957691216057308 * (g + 0.044715 * g * g * g) : g;
      expected[i] = g / (1 + std::exp(-z)) * up[i];
    }
    expect_near(out, expected, 1e-5, name + " gated");
    add_to_digest(out);
  }
  const Floats table = random_floats(d);
  Floats turned = x;
  ops.rope(turned.data(), table.data(), d);
  for (int i = 0; i < d / 2; ++i) {
    want[i] = (double)x[i] * table[i] - (double)x[d / 2 + i] * table[d / 2 + i];
    want[d / 2 + i] = (double)x[d / 2 + i] * table[i] + (double)x[i] * table[d / 2 + i];
  }
  expect_near(turned, want, 1e-5, name + " rope");
  add_to_digest(turned);
  int best = 0;
  double total = 0;
  for (int i = 0; i < d; ++i) best = x[i] > x[best] ? i : best, total += std::exp((double)x[i]);
  expect(ops.argmax(x.data(), d) == best, name + " argmax");
  expect(sample_token(ops, x.data(), d, 0.0f, 0, 1.0f, 1, 1) == best, name + " greedy token");
  expect(sample_token(ops, x.data(), d, 0.7f, 1, 0.9f, 1, 1) == best, name + " token of the best one");
  expect(std::fabs(ops.log_sum_exp(x.data(), d) - std::log(total)) < 1e-5, name + " log_sum_exp");
}

static void check_attention(const Ops& ops, CacheKind kind, int tokens, int e) {
  const int padded = (e + 15) / 16 * 16, pages = (tokens + kPage - 1) / kPage;
  const Floats k = random_floats((size_t)tokens * e), v = random_floats((size_t)tokens * e);
  const Floats q = random_floats((size_t)tokens * e);
  Buffer cache(kv_head_bytes(padded, kind) * pages);
  std::vector<int32_t> table(pages);
  for (int p = 0; p < pages; ++p) table[p] = pages - 1 - p;
  Attention a;
  a.head_dim = e, a.head_dim_padded = padded, a.q_stride = a.out_stride = e, a.pages = table.data();
  a.cache = cache.data, a.page_stride = kv_head_bytes(padded, kind), a.scale = 1.0f / std::sqrt((float)e);
  a.cache_kind = kind;
  for (int t = 0; t < tokens; ++t)
    ops.write_kv(&k[(size_t)t * e], &v[(size_t)t * e], e, padded, t % kPage, kind,
                 cache.data + table[t / kPage] * a.page_stride);
  Floats got((size_t)tokens * e), alone(got);
  for (int t = 0; t < tokens; t += a.rows) {
    a.rows = std::min(kTileRows, tokens - t), a.first_position = t;
    a.q = &q[(size_t)t * e], a.out = &got[(size_t)t * e];
    ops.attend(a);
  }
  for (int t = 0; t < tokens; ++t) {
    a.rows = 1, a.first_position = t, a.q = &q[(size_t)t * e], a.out = &alone[(size_t)t * e];
    ops.attend(a);
  }
  std::vector<double> want(got.size());
  for (int t = 0; t < tokens; ++t) {
    double total = 0;
    for (int s = 0; s <= t; ++s) {
      double dot = 0;
      for (int i = 0; i < e; ++i) dot += (double)q[(size_t)t * e + i] * k[(size_t)s * e + i];
      const double p = std::exp(dot * a.scale);
      total += p;
      for (int i = 0; i < e; ++i) want[(size_t)t * e + i] += p * v[(size_t)s * e + i];
    }
    for (int i = 0; i < e; ++i) want[(size_t)t * e + i] /= total;
  }
  const int kept = (int)cached_bytes(kind);
  const std::string what = std::string(ops.name) + " attention, cache of bytes a value: " + std::to_string(kept);
  expect_near(got, want, kept == 4 ? 1e-5 : 0.1, what);  // 8 bits of key, value and weight, values up to 2
  expect(std::memcmp(got.data(), alone.data(), got.size() * 4) == 0, what + ": one query alone differs");
  add_to_digest(got);
}

int main() {
  uint64_t first = 0;
  for (const std::string& isa : usable_isas()) {
    const Ops& ops = *ops_for(isa);
    state = 1;
    start_digest();
    for (const Format& f : kFormats)
      for (int m : {1, 2, 5, 23}) check_integer_linear(ops, f, m, 40, 256);
    for (bool bf16 : {false, true})
      for (int m : {1, 3, 7, 33}) check_float_linear(ops, bf16, m, 37, 200);
    for (int d : {64, 200, 576}) check_elementwise(ops, d);
    for (CacheKind kind : {CacheKind::kInt8, CacheKind::kBFloat16, CacheKind::kFloat32})
      for (int e : {64, 24}) check_attention(ops, kind, 150, e);
    if (!first) first = digest;
    expect(digest == first, isa + " gives other bits than " + usable_isas()[0]);
    std::fprintf(stderr, "%s: %d wrong\n", isa.c_str(), failures);
  }
  std::printf("digest %016llx\n", (unsigned long long)first);
  return failures ? 1 : 0;
}
