// A linear over a block of tokens: activations in the form the weight needs, then panel pairs.
#pragma once

#include <vector>

#include "pack.h"

namespace flatout {

constexpr int kTokenBlock = 128;  // tokens a panel is multiplied by before its results are stored

enum class Epilogue { kStore, kAdd, kGated, kGelu };

// Where the results go: out[row * stride + column] (+ bias, + what is there, or gelu of it, or act(gate) * up of
// alternating panels).
struct Output {
  Epilogue epilogue = Epilogue::kStore;
  const float* bias = nullptr;
  bool gelu = false;
  float* out = nullptr;
  int stride = 0;
};

// Bytes that `rows` (a multiple of 16) activations of a weight with this row stride and number of groups may take.
size_t activation_bytes(int rows, int row_stride, int groups);
// The parts of such a buffer.
Activations place_activations(const Linear&, uint8_t* memory, int rows);
void write_activations(const Ops&, const Linear&, const float* x, const Activations&, int row);
// Zero scales and sums of the rows that fill the last tile of `count` rows from row `at` on. Tiles multiply these rows
// too, and what lay there may be denormal numbers, which take a hundred times as long.
void pad_activations(const Linear&, const Activations&, int at, int count);

// Tokens first .. last of a step, whose activations lie in rows `at` and on; `at` is a multiple of 16.
struct Rows {
  int first, last, at;
  int count() const { return last - first; }
};

// Panel pairs begin .. end of a weight times the tokens of `shares`; scratch holds 2 * 16 * k_padded bytes.
void multiply_panels(const Ops&, const Linear&, const Activations&, const std::vector<Rows>& shares, const Output&,
                     int begin, int end, int8_t* scratch);

// out (tokens, n) = x (tokens, k) times a weight on one thread: the linear of the forward pass by itself.
void linear_once(const Ops&, const Source&, const float* x, int tokens, float* out);

}  // namespace flatout
