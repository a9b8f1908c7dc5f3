// A head's likeliest row without reading all of its bits.
//
// A code u = 8 h + l of 8 bits (its sign flipped) has an upper part h of 5 bits and a lower part l of 3. A row times x is
//   sum_k s a (u - 128) = sum_k s a (8 h + 3.5 - 128) + sum_k s a (l - 3.5)
// and by Cauchy and Schwarz the second sum is at most |s| |l - 3.5| |a| for each block of 32 columns. So the upper parts and
// a byte a block for |l - 3.5| bound every row, and only rows whose bound reaches the best exact sum are multiplied whole:
// tens of 49,152. (With 4 bits it were thousands, and fetching those costs what was saved.)
// Bytes: 20 for 32 columns, and scales. Operations: as linear.cpp.
#include "screen.h"

#include "kernels.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

// The upper 4 bits of 64 codes, doubled, and their fifth bits.
static inline u8x64 add_bits(u8x64 doubled, const uint8_t* bits) {
#if defined(__AVX512F__)
  uint64_t mask;
  std::memcpy(&mask, bits, 8);
  return (u8x64)_mm512_mask_add_epi8((__m512i)doubled, mask, (__m512i)doubled, _mm512_set1_epi8(1));
#else
  alignas(64) uint8_t codes[64];
  store(codes, doubled);
  for (int i = 0; i < 64; ++i) codes[i] += bits[i / 8] >> i % 8 & 1;
  return load<u8x64>(codes);
#endif
}

template <int PLANES>
static void screen(const Linear& w, const uint8_t* panel, int panels, const Activations& a, const float* sizes,
                   float* bounds, float* best, int* best_row) {
  constexpr int kLines = 4;  // of a block
  const int of_group = w.group / kScreenBlock;
  f32x16 top = splat(-kInfinity);
  i32x16 at = {};
  for (int p = 0; p < panels; ++p, panel += w.panel_bytes) {
    const uint8_t *line = panel, *ahead = panel + kPrefetchBytes, *slack = panel + w.extra_offset;
    f32x16 value = splat(0.0f), bound = splat(0.0f);
    for (int g = 0; g < w.groups; ++g) {
      const f32x16 scale = load_scale(w, panel + w.scales_offset, g);
      f32x16 off = splat(0.0f);
      i32x16 dot[2][PLANES] = {};  // of low and high halves of bytes
      for (int b = g * of_group; b < (g + 1) * of_group; ++b, slack += kLanes) {
        const uint8_t* bits = line + 64 * kLines;
        __builtin_prefetch(ahead, 0, 2);
        ahead += 64;
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i, line += 64, ahead += 64) {
          __builtin_prefetch(ahead, 0, 2);
          const u8x64 v = load<u8x64>(line), even = (u8x64)splat_i32(0x1e1e1e1e);
          const u8x64 low = add_bits((u8x64)((u32x16)v << 1) & even, bits + 16 * i);
          const u8x64 high = add_bits((u8x64)((u32x16)v >> 3) & even, bits + 16 * i + 8);
          for (int plane = 0; plane < PLANES; ++plane) {
            int32_t first, second;
            std::memcpy(&first, a.codes[plane] + b * kScreenBlock + 8 * i, 4);
            std::memcpy(&second, a.codes[plane] + b * kScreenBlock + 8 * i + 4, 4);
            dot[0][plane] = dot_us(dot[0][plane], low, first);
            dot[1][plane] = dot_us(dot[1][plane], high, second);
          }
        }
        line += 64;
        off = fma(to_float(widen_u8(slack)), splat(sizes[b]), off);
      }
      __builtin_prefetch(ahead, 0, 2);
      ahead += (w.panel_bytes - w.scales_offset) / w.groups;
      for (int plane = 0; plane < PLANES; ++plane) {
        const float a_scale = a.scales[g * kTileRows] * (plane + 1 < PLANES ? 128.0f : 1.0f);
        const f32x16 offset = splat((3.5f - 128.0f) * (float)a.sums[plane][g * kTileRows]);
        const f32x16 sum = fma(to_float(dot[0][plane] + dot[1][plane]), splat(8.0f), offset);
        value = fma(sum, splat(a_scale) * scale, value);
      }
      bound = fma(off, absolute(scale), bound);
    }
    store(bounds + p * kLanes, value + bound);
    const i32x16 better = value > top;
    top = max(value, top);
    at = (better & splat_i32(p * kLanes)) | (~better & at);
  }
  *best = -kInfinity, *best_row = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (top[lane] > *best) *best = top[lane], *best_row = at[lane] + lane;
}

void screen_panels(const Linear& w, const uint8_t* panel, int panels, const Activations& a, const float* sizes,
                   float* bounds, float* best, int* best_row) {
  const auto run = w.planes == 1 ? screen<1> : screen<2>;
  run(w, panel, panels, a, sizes, bounds, best, best_row);
}

int at_least(const float* values, int count, float threshold, int32_t* indices) {
  int found = 0;
  for (int i = 0; i < count; i += kLanes) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + i), _mm512_set1_ps(threshold), _CMP_NLT_UQ);
    _mm512_mask_compressstoreu_epi32(indices + found, mask, (__m512i)(iota() + splat_i32(i)));
    found += __builtin_popcount(mask);
#else
    for (int lane = i; lane < i + kLanes; ++lane) {
      indices[found] = lane;
      found += !(values[lane] < threshold);
    }
#endif
  }
  return found;
}

#if defined(__AVX512F__)
// 16 rows of 16 words to 16 lines of a word of each row, by halves, quarters and so on.
static void transpose(const uint8_t* const* rows, size_t offset, __m512i flip, uint8_t* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_xor_si512(_mm512_loadu_si512(rows[i] + offset), flip);
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + 64 * i, r[i]);
}
#endif

template <class T>
static void collect_scales(const Linear& w, const uint8_t* scales, const int32_t* rows, uint8_t* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const T* row = (const T*)scales + (size_t)rows[lane] * w.groups;
    for (int g = 0; g < w.groups; ++g) ((T*)out)[(size_t)g * kLanes + lane] = row[g];
  }
}

void collect_panel(const Linear& w, const uint8_t* codes, const uint8_t* scales, const int32_t* rows, uint8_t* panel) {
  const uint8_t* from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = codes + (size_t)rows[lane] * w.k;
  int k = 0;
#if defined(__AVX512F__)
  for (; k + 64 <= w.k; k += 64) transpose(from, k, _mm512_set1_epi8((char)128), panel + (size_t)k * kLanes);
#endif
  for (; k < w.k; k += 4)
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t four;
      std::memcpy(&four, from[lane] + k, 4);
      four ^= 0x80808080u;
      std::memcpy(panel + (size_t)k * kLanes + 4 * lane, &four, 4);
    }
  for (; k < w.k_padded; k += 4) store(panel + (size_t)k * kLanes, splat_i32((int32_t)0x80808080u));
  if (w.scales == Scales::kHalf)
    collect_scales<uint16_t>(w, scales, rows, panel + w.scales_offset);
  else
    collect_scales<float>(w, scales, rows, panel + w.scales_offset);
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
