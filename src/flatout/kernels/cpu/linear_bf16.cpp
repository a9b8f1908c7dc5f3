// bf16 weights times bf16 activations with vdpbf16ps: two columns an instruction, fp32 sums.
#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

template <int MB>
static void block(const Linear& w, const uint8_t* panel, const Activations& a, int first, float* out) {
  __m512 acc[MB];
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) acc[m] = _mm512_setzero_ps();
  const uint16_t* x = a.bf16 + (size_t)first * w.row_stride;
  const uint8_t* line = panel;
  for (int k = 0; k < w.k_padded; k += 2, line += 64) {
    __builtin_prefetch(line + kPrefetchBytes);
    __m512bh v = (__m512bh)_mm512_loadu_si512(line);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + (size_t)m * w.row_stride + k, 4);
      acc[m] = _mm512_dpbf16_ps(acc[m], v, (__m512bh)_mm512_set1_epi32(pair));
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MB; ++m) _mm512_storeu_ps(out + (size_t)m * kLanes, acc[m]);
}

void linear_panels_bf16(const Linear& w, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                        const Activations& a, int first, int count, float* const* out) {
  if (w.kind != WeightKind::kBFloat16) return linear_panels(w, panel, panels, scratch, a, first, count, out);
  for (int p = 0; p < panels; ++p) {
    int m = 0;
    for (; m + 16 <= count; m += 16) block<16>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
    for (; m + 4 <= count; m += 4) block<4>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
    for (; m < count; ++m) block<1>(w, panel[p], a, first + m, out[p] + (size_t)m * kLanes);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
