// Codes of 4, 5 and 6 bits as bytes, in the layout of ops.h.
#pragma once

#include "ops.h"
#include "simd.h"

namespace flatout {
namespace FLATOUT_ISA {

// Sixteen low and sixteen high nibbles a 32-bit lane: column groups 2i and 2i + 1.
static inline u8x64 low_nibbles(u8x64 v) { return v & (u8x64)splat_i32(0x0f0f0f0f); }
static inline u8x64 high_nibbles(u8x64 v) { return (u8x64)((u32x16)v >> 4) & (u8x64)splat_i32(0x0f0f0f0f); }

// Column group `q` of a chunk of 5 or 6 bits. `nibbles`: its line q / 2; `rest`: its last line.
template <int BITS>
static inline u8x64 chunk_codes(u8x64 nibbles, u8x64 rest, int q) {
  const int up = 4 - (BITS - 4) * q;  // from where the upper bits lie to bit 4
  const u32x16 moved = up >= 0 ? (u32x16)rest << up : (u32x16)rest >> -up;
  const u8x64 upper = (u8x64)moved & (u8x64)splat_i32(BITS == 5 ? 0x10101010 : 0x30303030);
  return (q % 2 ? high_nibbles(nibbles) : low_nibbles(nibbles)) | upper;
}

template <int BITS>
static inline void unpack_chunks(const Linear& w, const uint8_t* panel, u8x64 offset, uint8_t* to) {
  constexpr int kQuads = chunk_columns(BITS) / 4;
  for (int k = 0; k < w.k_padded; k += 4 * kQuads, panel += 64 * chunk_lines(BITS)) {
    const u8x64 rest = load<u8x64>(panel + 64 * (kQuads / 2));
    __builtin_prefetch(panel + 2 * w.panel_bytes + 64 * (kQuads / 2), 0, 2);
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q, to += 64) {
      if (q % 2 == 0) __builtin_prefetch(panel + 2 * w.panel_bytes + 64 * (q / 2), 0, 2);
      store(to, chunk_codes<BITS>(load<u8x64>(panel + 64 * (q / 2)), rest, q) - offset);
    }
  }
}

// A panel's codes of fewer than 8 bits, less `offset`, as bytes [k / 4][16 rows][4 columns]. Fetches the next pair's panel.
static inline void unpack_codes(const Linear& w, const uint8_t* panel, u8x64 offset, uint8_t* to) {
  if (w.bits == 6) return unpack_chunks<6>(w, panel, offset, to);
  if (w.bits == 5) return unpack_chunks<5>(w, panel, offset, to);
  for (int k = 0; k < w.k_padded; k += 8, panel += 64, to += 128) {
    __builtin_prefetch(panel + 2 * w.panel_bytes, 0, 2);
    const u8x64 v = load<u8x64>(panel);
    store(to, low_nibbles(v) - offset);
    store(to + 64, high_nibbles(v) - offset);
  }
}

}  // namespace FLATOUT_ISA
}  // namespace flatout
