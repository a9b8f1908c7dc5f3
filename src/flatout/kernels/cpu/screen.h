// Greedy decoding of one sequence reads two thirds of the head: screen.cpp says how.
#pragma once

#include "pack.h"

namespace flatout {

constexpr int kScreenBlock = 32;      // columns that share a bound
constexpr float kScreenUnit = 0.1f;   // of the byte that holds |l - 3.5| of a block

// Whether a head can be screened: signed 8-bit codes in whole panels, in groups of one block or two. (Where a row shares a
// scale, an outlier makes the other codes small, and their upper bits say little.)
bool screenable(const Linear&);
// The upper parts of a head's rows. A panel holds for each block 4 lines with 4 bits of its codes as ops.h describes
// for codes of 4 bits and a line with their fifth bits (8 bytes for the low, 8 for the high halves of each line), then
// scales, then bytes of [blocks][16] lengths of the lower parts.
Linear pack_screen(const Source&, const Linear& head, std::span<Arena> arenas, ThreadPool&);
// For each block of one token's activations: kScreenUnit * scale * |codes|, rounded up. `sizes` holds k_padded / 32.
void screen_sizes(const Linear&, const Activations&, float* sizes);

}  // namespace flatout
