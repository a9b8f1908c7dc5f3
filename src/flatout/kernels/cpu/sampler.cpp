// Greedy, temperature, top-k and top-p sampling; engine/sampler.py is the reference it must equal.
#include <algorithm>
#include <cmath>
#include <numeric>
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

}  // namespace

int32_t sample_token(const float* logits, int n, float temperature, int top_k, float top_p, uint64_t seed,
                     int64_t position) {
  if (temperature <= 0.0f) return (int32_t)(std::max_element(logits, logits + n) - logits);
  std::vector<float> scaled(n);
  for (int i = 0; i < n; ++i) scaled[i] = logits[i] / temperature;
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return scaled[a] != scaled[b] ? scaled[a] > scaled[b] : a < b; };
  int kept = n;
  if (top_k > 0 && top_k < n) {
    kept = top_k;
    std::partial_sort(order.begin(), order.begin() + kept, order.end(), before);
  } else {
    std::sort(order.begin(), order.end(), before);
  }
  std::vector<double> cumulative(kept);
  double total = 0.0;
  for (int i = 0; i < kept; ++i) cumulative[i] = total += std::exp((double)scaled[order[i]] - (double)scaled[order[0]]);
  if (top_p < 1.0f) {
    int last = 0;
    while (last < kept - 1 && cumulative[last] / total < (double)top_p) ++last;
    kept = last + 1;
    total = cumulative[last];
  }
  const double target = uniform(seed, position) * total;
  int i = 0;
  while (i < kept - 1 && cumulative[i] <= target) ++i;
  return order[i];
}

}  // namespace flatout
