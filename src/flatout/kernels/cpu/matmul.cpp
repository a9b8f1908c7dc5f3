#include "matmul.h"

#include <algorithm>
#include <cstring>

#include "threads.h"

namespace flatout {

size_t activation_bytes(int rows, int row_stride, int groups) {
  return (size_t)rows * (row_stride + 4 * groups) * sizeof(float);
}

Activations place_activations(const Linear& w, uint8_t* memory, int rows) {
  Activations a;
  if (w.kind == WeightKind::kInteger) {
    const size_t values = (size_t)rows * w.groups, codes = (size_t)rows * w.row_stride;
    a.scales = (float*)memory;
    a.scaled_sums = a.scales + values;
    a.sums[0] = (int32_t*)(a.scaled_sums + values);
    a.sums[1] = a.sums[0] + values;
    a.codes[0] = (int8_t*)(a.sums[1] + values);  // rows are a multiple of 16: the codes start on a cache line
    a.codes[1] = a.codes[0] + codes;
  } else if (w.kind == WeightKind::kBFloat16) {
    a.bf16 = (uint16_t*)memory;
  } else {
    a.floats = (float*)memory;
  }
  return a;
}

void write_activations(const Ops& ops, const Linear& w, const float* x, const Activations& a, int row) {
  const size_t at = (size_t)row * w.row_stride;
  if (w.kind == WeightKind::kInteger) {
    const size_t values = group_index(row, 0, w.groups);
    Activations to = a;
    to.scales += values;
    to.scaled_sums += values;
    for (int p = 0; p < 2; ++p) to.sums[p] += values, to.codes[p] += at;
    ops.quantize(w, x, to);
  } else if (w.kind == WeightKind::kBFloat16) {
    ops.round_bf16(x, w.k, w.k_padded, a.bf16 + at);
  } else {
    std::memcpy(a.floats + at, x, (size_t)w.k * sizeof(float));
  }
}

void pad_activations(const Linear& w, const Activations& a, int at, int count) {
  const int filled = count % kTileRows;
  if (w.kind != WeightKind::kInteger || filled == 0 || count < kTileMinimum) return;
  for (int g = 0; g < w.groups; ++g) {
    const size_t first = group_index(at + count, g, w.groups);
    std::fill_n(a.scales + first, kTileRows - filled, 0.0f);
    std::fill_n(a.scaled_sums + first, kTileRows - filled, 0.0f);
    for (int p = 0; p < w.planes; ++p) std::fill_n(a.sums[p] + first, kTileRows - filled, 0);
  }
}

void multiply_panels(const Ops& ops, const Linear& w, const Activations& a, const std::vector<Rows>& shares,
                     const Output& o, int begin, int end, int8_t* scratch_memory) {
  const bool gate = o.epilogue == Epilogue::kGated;  // panels of gate and up alternate
  const int width = gate ? w.n / 2 : w.n;
  int most = 0;
  for (const Rows& share : shares) most = std::max(most, share.count());
  const bool tiles = most >= kTileMinimum;
  const int8_t* scratch[2] = {scratch_memory, scratch_memory + (size_t)kLanes * w.k_padded};
  alignas(64) float tile[2][kTokenBlock * kLanes];
  float* const to[2] = {tile[0], tile[1]};
  if (ops.begin_linear && tiles) ops.begin_linear(w, most);
  for (int u = begin; u < end; ++u) {
    const int panels = std::min(2, w.panels - 2 * u);
    const uint8_t* first = w.pair(u);
    const uint8_t* panel[2] = {first, first + w.panel_bytes};
    for (int p = 0; ops.prepare_panel && tiles && p < panels; ++p)
      ops.prepare_panel(w, panel[p], scratch_memory + (size_t)p * kLanes * w.k_padded);
    for (const Rows& share : shares) {
      for (int m = share.first; m < share.last; m += kTokenBlock) {
        const int rows = std::min(kTokenBlock, share.last - m);
        ops.linear_panels(w, panel, panels, scratch, a, share.at + m - share.first, rows, to);
        float* row = o.out + (size_t)m * o.stride;
        if (gate) {
          const int column = u * kLanes;
          ops.gated(tile[0], tile[1], rows, std::min(kLanes, width - column), o.gelu, row + column, o.stride);
          continue;
        }
        for (int p = 0; p < panels; ++p) {
          const int column = (2 * u + p) * kLanes, lanes = std::min(kLanes, width - column);
          if (o.epilogue == Epilogue::kGelu)
            ops.bias_gelu(tile[p], rows, lanes, o.bias + column, row + column, o.stride);
          else
            ops.epilogue(tile[p], rows, lanes, o.bias ? o.bias + column : nullptr, o.epilogue == Epilogue::kAdd,
                         row + column, o.stride);
        }
      }
    }
  }
  if (ops.end_linear && tiles) ops.end_linear();
}

void linear_once(const Ops& ops, const Source& source, const float* x, int tokens, float* out) {
  Arena arena;
  ThreadPool alone(1);
  const Linear w = pack_linear(source, false, {&arena, 1}, alone);
  const int rows = (tokens + kTileRows - 1) / kTileRows * kTileRows;
  Buffer memory(activation_bytes(rows, w.row_stride, w.groups)), scratch((size_t)2 * kLanes * w.k_padded);
  const Activations a = place_activations(w, memory.data, rows);
  for (int r = 0; r < tokens; ++r) write_activations(ops, w, x + (size_t)r * w.k, a, r);
  pad_activations(w, a, 0, tokens);
  Output o;
  o.out = out;
  o.stride = w.n;
  multiply_panels(ops, w, a, {{0, tokens, 0}}, o, 0, w.pairs(), (int8_t*)scratch.data);
}

}  // namespace flatout
