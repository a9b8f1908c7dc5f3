// Greedy, temperature, top-k and top-p sampling; engine/sampler.py is the reference it must equal.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "model.h"

namespace flatout {

namespace {

// A counter-based generator: the number depends on seed and position only, never on how tokens were batched.
double uniform(uint64_t seed, int64_t position) {
  uint64_t x = seed + (uint64_t)(position + 1) * 0x9E3779B97F4A7C15ull;
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9ull;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBull;
  x ^= x >> 31;
  return (double)(x >> 11) * 0x1p-53;
}

// Sorts ascending to: greatest logit first, lowest id on ties. The float's bits are flipped so that they order as an
// unsigned number.
uint64_t sort_key(float logit, int32_t id) {
  uint32_t bits;
  std::memcpy(&bits, &logit, 4);
  bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  return (uint64_t)bits << 32 | (uint32_t)id;
}

}  // namespace

int32_t sample_token(const Ops& ops, const float* logits, int n, float temperature, int top_k, float top_p,
                     uint64_t seed, int64_t position) {
  const int32_t best = ops.argmax(logits, n);
  if (best < 0) return kNotFinite;
  if (temperature <= 0.0f) return best;
  std::vector<float> scaled(n);
  std::vector<uint64_t> keys(n);
  for (int i = 0; i < n; ++i) {
    scaled[i] = logits[i] / temperature + 0.0f;  // + 0: negative zero ties with zero
    keys[i] = sort_key(scaled[i], i);
  }
  const int candidates = top_k > 0 && top_k < n ? top_k : n;
  const float top = scaled[best];
  const auto weight = [&](float l) { return l - top < -60.0f ? 0.0 : std::exp((double)l - (double)top); };
  double total = 0.0;  // of all candidates
  if (candidates == n)
    for (float l : scaled) total += weight(l);
  // Sort as far as needed only: a few hundred tokens nearly always hold the mass that top_p or the draw asks for.
  const double u = uniform(seed, position);
  std::vector<double> cumulative;
  int sorted = 0;
  for (int want = candidates == n ? std::min(n, 256) : candidates;; want = std::min(n, want * 8)) {
    std::partial_sort(keys.begin() + sorted, keys.begin() + want, keys.end());
    for (; sorted < want; ++sorted)
      cumulative.push_back((sorted ? cumulative.back() : 0.0) + weight(scaled[(uint32_t)keys[sorted]]));
    if (candidates < n) total = cumulative.back();
    const bool nucleus = top_p < 1.0f;
    int kept = sorted;
    double kept_total = total;
    if (nucleus) {
      kept = 0;
      while (kept < sorted - 1 && cumulative[kept] / total < (double)top_p) ++kept;
      if (cumulative[kept] / total < (double)top_p && sorted < candidates) continue;
      kept_total = cumulative[kept++];
    }
    const double target = u * kept_total;
    int i = 0;
    while (i < kept - 1 && cumulative[i] <= target) ++i;
    if (cumulative[i] <= target && sorted < candidates && !nucleus) continue;
    return (int32_t)(uint32_t)keys[i];
  }
}

}  // namespace flatout
