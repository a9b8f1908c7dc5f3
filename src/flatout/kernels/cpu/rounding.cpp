// What rounding weights takes most of its time for; kernels/rounding.py and kernels/grids.py say what and why.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

// Four vectors of rows: their sums do not wait for each other, and a factor is fetched once for all.
constexpr int kVectors = kBlockRows / kLanes;
constexpr float kSmallest = 1e-30f;

void round_block(const RoundBlock& b, int first, int count) {
  alignas(64) float errors[kMostColumns][kVectors * kLanes];
  const auto lanes = [&](int v) { return std::clamp(count - v * kLanes, 0, kLanes); };
  for (int j = 0; j < b.columns; ++j) {
    const size_t at = (size_t)j * b.rows + first, group = (size_t)b.groups[j] * b.rows + first;
    f32x16 x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load_some(b.values + at + v * kLanes, lanes(v));
    for (int i = 0; i < j; ++i) {
      const f32x16 factor = splat(-b.factor[(size_t)i * b.columns + j]);
      for (int v = 0; v < kVectors; ++v) x[v] = fma(factor, load<f32x16>(errors[i] + v * kLanes), x[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      if (lanes(v) == 0) {
        store(errors[j] + v * kLanes, splat(0.0f));
        continue;
      }
      const auto read = [&](const float* p) { return load_some(p + v * kLanes, lanes(v)); };
      f32x16 origin = x[v], wanted = x[v];
      if (b.base) {
        origin = read(b.base + at);
        wanted = fma(splat(-b.gain[j]), x[v], origin);
      }
      const f32x16 step = max(read(b.steps + group), splat(kSmallest));  // rows that are not there have none
      const f32x16 inside = min(max(wanted / step, read(b.low + group)), read(b.high + group));
      const f32x16 level = to_float(round_to_int(inside)), error = fma(-level, step, origin);
      store(errors[j] + v * kLanes, error);
      store_some(b.levels + at + v * kLanes, level, lanes(v));
      store_some(b.errors + at + v * kLanes, error, lanes(v));
    }
  }
}

int nearest_grid(const Grids& g) {
  int best = 0;
  float least = kInfinity;
  for (int c = 0; c < g.candidates; ++c) {
    const f32x16 step = splat(g.steps[c * g.stride]);
    const float zero = g.zeros[c * g.stride];
    const f32x16 low = splat(g.low - zero), high = splat(g.high - zero);
    f32x16 errors = splat(0.0f);
    for (int i = 0; i < g.width; i += kLanes) {  // what pads a group is zero and rounds to zero
      const f32x16 w = load_some(g.weights + i, g.width - i);
      const f32x16 level = to_float(round_to_int(min(max(w / step, low), high)));
      const f32x16 lost = level * step - w;
      errors = fma(g.importance ? lost * load_some(g.importance + i, g.width - i) : lost, lost, errors);
    }
    const float error = sum(errors);
    if (error < least) best = c, least = error;
  }
  return best;
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
