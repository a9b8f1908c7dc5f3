// Weights in the order the kernels stream them.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "ops.h"

namespace flatout {

class ThreadPool;

// Zeroed memory, aligned to 2 MiB pages where it is large, so that the weight stream misses the TLB rarely.
class Buffer {
 public:
  explicit Buffer(size_t bytes = 0);
  Buffer(Buffer&&) noexcept;
  Buffer& operator=(Buffer&&) noexcept;
  ~Buffer();
  uint8_t* data = nullptr;
  size_t bytes = 0;

 private:
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
};

// An (n, k) weight as the caller has it. Integer: codes signed (8-bit symmetric) or unsigned, scales and minima either
// half or float. Float: values.
struct Source {
  WeightKind kind = WeightKind::kFloat32;
  int n = 0, k = 0, bits = 32, group = 0;  // group 0: one scale a row
  Zero zero = Zero::kSymmetric;
  bool half_scales = false;
  bool byte_scales = false;  // halves that pack into Scales::kByte: -127 to 127 times a power of two of their row
  int planes = 0, activation_group = 0;  // as in Linear
  const uint8_t* codes = nullptr;
  const void *scales = nullptr, *minima = nullptr;
  const uint8_t* zeros = nullptr;
  const float* values = nullptr;
  const uint8_t* blocks = nullptr;  // instead of codes, scales and minima: rows of GGUF's Q4_0, Q4_1 or Q8_0 blocks

  size_t block_bytes() const { return (zero == Zero::kMinimum ? 4 : 2) + (size_t)group * bits / 8; }
};

// One row of an integer Source, codes a byte each.
struct SourceRow {
  const uint8_t* codes;
  const void *scales, *minima;
};
// Row `row`; those of blocks are unpacked into `scratch`.
SourceRow source_row(const Source&, int row, std::vector<uint8_t>& scratch);

// Weights one after another in blocks of huge pages, in the order they are set: one token streams them in that order.
class Arena {
 public:
  uint8_t* take(size_t bytes);  // zeroed, 64-byte aligned
  size_t taken() const { return taken_; }

 private:
  std::vector<Buffer> blocks_;
  size_t used_ = 0, taken_ = 0;
};
size_t taken(std::span<const Arena> arenas);

// `interleaved` weights hold two halves of n / 2 rows (gate, up): their panels alternate, each half padded to 16 rows.
// What a weight looks like when packed, without its memory.
Linear plan_linear(const Source&, bool interleaved);
// Each of `arenas` takes the share of one thread, which fills it panel by panel: the system puts the pages near the thread
// that touches them first.
void fill_panels(Linear&, std::span<Arena> arenas, ThreadPool&, const std::function<void(int panel, uint8_t* memory)>& fill);
// Raises std::invalid_argument for scales that the bytes asked for cannot hold.
Linear pack_linear(const Source&, bool interleaved, std::span<Arena> arenas, ThreadPool&);
// A row's scales or minima, floats or halves, into those of its panel.
void pack_scales(const Linear&, const void* in, int lane, uint8_t* out);

uint16_t round_to_bf16(float);

}  // namespace flatout
