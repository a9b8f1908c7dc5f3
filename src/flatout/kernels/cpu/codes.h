// Codes of 4, 5 and 6 bits as bytes, in the layout of ops.h.
#pragma once

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

}  // namespace FLATOUT_ISA
}  // namespace flatout
