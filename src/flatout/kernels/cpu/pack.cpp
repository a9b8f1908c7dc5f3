#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "half.h"
#include "threads.h"

namespace flatout {

constexpr size_t kSmallPage = 1 << 12, kHugePage = 1 << 21;

Buffer::Buffer(size_t size) : bytes(size) {
  if (size == 0) return;
  // Fresh pages of the kernel are zero and take no memory until they are touched.
  const size_t page = size >= kHugePage ? kHugePage : kSmallPage;
  const size_t padded = (size + kPrefetchBytes + page - 1) / page * page;
  mapped_bytes_ = padded + page - kSmallPage;  // room to align in
  void* start = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  mapped_ = start;
  data = (uint8_t*)(((uintptr_t)start + page - 1) / page * page);
#if defined(MADV_HUGEPAGE)
  if (page == kHugePage) madvise(data, padded, MADV_HUGEPAGE);  // advice only: without it the buffer is merely slower
#endif
}
Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }
Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data, other.data);
  std::swap(bytes, other.bytes);
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_bytes_, other.mapped_bytes_);
  return *this;
}
Buffer::~Buffer() {
  if (mapped_) munmap(mapped_, mapped_bytes_);
}

uint8_t* Arena::take(size_t bytes) {
  constexpr size_t kBlock = 32 << 20;
  bytes = (bytes + 63) / 64 * 64;
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
    blocks_.emplace_back(bytes > kBlock ? bytes : kBlock);
    used_ = 0;
  }
  uint8_t* start = blocks_.back().data + used_;
  used_ += bytes;
  taken_ += bytes;
  return start;
}

size_t taken(std::span<const Arena> arenas) {
  size_t bytes = 0;
  for (const Arena& arena : arenas) bytes += arena.taken();
  return bytes;
}

uint16_t round_to_bf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

SourceRow source_row(const Source& s, int row, std::vector<uint8_t>& scratch) {
  const size_t k = s.k, groups = s.group ? k / s.group : 1, at = row * groups, width = s.half_scales ? 2 : 4;
  if (!s.blocks) {
    const uint8_t* minima = s.minima ? (const uint8_t*)s.minima + at * width : nullptr;
    return {s.codes + row * k, (const uint8_t*)s.scales + at * width, minima};
  }
  scratch.resize(k + 4 * groups);
  uint8_t *codes = scratch.data(), *scales = codes + k, *minima = scales + 2 * groups;
  const uint8_t* block = s.blocks + at * s.block_bytes();
  for (size_t g = 0; g < groups; ++g, block += s.block_bytes(), codes += 32) {
    std::memcpy(scales + 2 * g, block, 2);
    if (s.zero == Zero::kMinimum) std::memcpy(minima + 2 * g, block + 2, 2);
    const uint8_t* in = block + (s.zero == Zero::kMinimum ? 4 : 2);
    if (s.bits == 8) {
      std::memcpy(codes, in, 32);
      continue;
    }
    uint8_t packed[16];  // a copy, which the compiler knows to lie elsewhere than the codes
    std::memcpy(packed, in, 16);
    for (int i = 0; i < 16; ++i) codes[i] = packed[i] & 15;
    for (int i = 0; i < 16; ++i) codes[i + 16] = packed[i] >> 4;
  }
  return {scratch.data(), scales, minima};
}

namespace {

// Row of the source that lane `lane` of panel `panel` holds, or -1 for padding.
int row_of(const Source& s, bool interleaved, int panel, int lane) {
  if (!interleaved) {
    const int row = panel * kLanes + lane;
    return row < s.n ? row : -1;
  }
  const int half = s.n / 2, row = panel / 2 * kLanes + lane;
  return row < half ? row + panel % 2 * half : -1;
}

void pack_floats(const Source& s, const Linear& w, int lane, int row, uint8_t* panel) {
  const float* in = s.values + (size_t)row * s.k;
  if (w.kind == WeightKind::kFloat32) {
    float* out = (float*)panel;
    for (int k = 0; k < s.k; ++k) out[(size_t)k * kLanes + lane] = in[k];
  } else {
    uint16_t* out = (uint16_t*)panel;
    for (int k = 0; k < s.k; ++k) out[((size_t)(k / 2) * kLanes + lane) * 2 + k % 2] = round_to_bf16(in[k]);
  }
}

void pack_codes(const Source& s, const Linear& w, int lane, const uint8_t* in, uint8_t* panel) {
  // Signed codes become unsigned around 128.
  const uint32_t flip = s.bits == 8 && s.zero == Zero::kSymmetric ? 0x80808080u : 0;
  const int whole = s.k / 4;  // words before the last columns and the padding
  const auto load = [&](int i) {
    uint32_t four;
    std::memcpy(&four, in + 4 * i, 4);
    return four ^ flip;
  };
  const auto quad = [&](int i) {
    if (i < whole) return load(i);
    uint32_t four = 0x01010101u * (uint32_t)w.integer_zero ^ flip;  // past the last column
    if (4 * i < s.k) std::memcpy(&four, in + 4 * i, s.k % 4);
    return four ^ flip;
  };
  uint32_t* out = (uint32_t*)panel + lane;
  if (s.bits == 8) {
    for (int i = 0; i < whole; ++i) out[(size_t)i * kLanes] = load(i);
    for (int i = whole; i < w.k_padded / 4; ++i) out[(size_t)i * kLanes] = quad(i);
  } else if (s.bits == 4) {
    for (int i = 0; i < w.k_padded / 8; ++i) out[(size_t)i * kLanes] = (quad(2 * i) & 0x0f0f0f0f) | quad(2 * i + 1) << 4;
  } else {
    const int quads = chunk_columns(s.bits) / 4, upper_bits = s.bits - 4;
    const uint32_t upper = 0x01010101u * ((1u << upper_bits) - 1);
    for (int first = 0; first < w.k_padded / 4; first += quads, out += chunk_lines(s.bits) * kLanes) {
      uint32_t* rest = out + (size_t)quads / 2 * kLanes;
      *rest = 0;
      for (int q = 0; q < quads; q += 2) {
        const uint32_t low = quad(first + q), high = quad(first + q + 1);
        out[(size_t)q / 2 * kLanes] = (low & 0x0f0f0f0f) | (high & 0x0f0f0f0f) << 4;
        *rest |= (low >> 4 & upper) << q * upper_bits | (high >> 4 & upper) << (q + 1) * upper_bits;
      }
    }
  }
}

float half_at(const void* halves, int i) {
  uint16_t half;
  std::memcpy(&half, (const uint8_t*)halves + 2 * (size_t)i, 2);
  return half_to_float(half);
}

template <class T>
void pack_values(const Linear& w, const void* in, int lane, uint8_t* out) {
  for (int g = 0; g < w.groups; ++g)
    std::memcpy(out + ((size_t)g * kLanes + lane) * sizeof(T), (const uint8_t*)in + g * sizeof(T), sizeof(T));
}

// The least power of two that largest of `values` halves counts fewer than 128 times; of zeros any.
int power_of(const void* halves, int values) {
  float largest = 0.0f;
  for (int i = 0; i < values; ++i) largest = std::max(largest, std::fabs(half_at(halves, i)));
  return largest > 0.0f && std::isfinite(largest) ? std::ilogb(largest) - 6 : 0;
}

// Whether the bytes are the same numbers.
bool pack_bytes(const Linear& w, const void* halves, int power, int lane, uint8_t* out) {
  bool exact = true;
  const float per_unit = std::ldexp(1.0f, -power);
  for (int g = 0; g < w.groups; ++g) {
    const float code = half_at(halves, g) * per_unit;
    exact &= std::fabs(code) <= 127.0f && code == std::nearbyint(code);
    out[(size_t)g * kLanes + lane] = exact ? (uint8_t)(int8_t)code : 0;
  }
  return exact;
}

// A row's scales and minima; false where bytes cannot hold them.
bool pack_scales_and_minima(const Linear& w, const SourceRow& in, int lane, uint8_t* panel) {
  uint8_t *scales = panel + w.scales_offset, *minima = panel + w.extra_offset;
  const bool both = w.zero == Zero::kMinimum;
  if (w.scales != Scales::kByte) {
    pack_scales(w, in.scales, lane, scales);
    if (both) pack_scales(w, in.minima, lane, minima);
    return true;
  }
  const int of_scales = power_of(in.scales, w.groups), of_minima = both ? power_of(in.minima, w.groups) : of_scales;
  panel[w.powers_offset + lane] = (uint8_t)(of_scales + 127);
  panel[w.powers_offset + kLanes + lane] = (uint8_t)(of_minima - of_scales + 127);
  return pack_bytes(w, in.scales, of_scales, lane, scales) && (!both || pack_bytes(w, in.minima, of_minima, lane, minima));
}

bool pack_row(const Source& s, const Linear& w, int lane, int row, uint8_t* panel, std::vector<uint8_t>& scratch) {
  if (s.kind != WeightKind::kInteger) return pack_floats(s, w, lane, row, panel), true;
  const SourceRow in = source_row(s, row, scratch);
  pack_codes(s, w, lane, in.codes, panel);
  const bool exact = pack_scales_and_minima(w, in, lane, panel);
  if (s.zero == Zero::kAsymmetric)
    pack_values<uint8_t>(w, s.zeros + (size_t)row * w.groups, lane, panel + w.extra_offset);
  return exact;
}

}  // namespace

void pack_scales(const Linear& w, const void* in, int lane, uint8_t* out) {
  w.scales == Scales::kHalf ? pack_values<uint16_t>(w, in, lane, out) : pack_values<float>(w, in, lane, out);
}

Linear plan_linear(const Source& s, bool interleaved) {
  Linear w;
  w.kind = s.kind;
  w.n = s.n;
  w.k = s.k;
  w.bits = s.bits;
  w.zero = s.zero;
  w.scales = s.byte_scales ? Scales::kByte : s.half_scales ? Scales::kHalf : Scales::kFloat;
  w.planes = s.planes;
  w.activation_group = s.activation_group;
  w.panels = interleaved ? 2 * round_up(s.n / 2, kLanes) / kLanes : round_up(s.n, kLanes) / kLanes;
  w.k_padded = s.group ? s.k : round_up(s.k, 64);
  w.group = s.group ? s.group : w.k_padded;
  w.groups = w.k_padded / w.group;
  // An odd number of cache lines apart, so that the rows of a tile fall into different cache sets.
  const int line = s.kind == WeightKind::kInteger ? 64 : s.kind == WeightKind::kBFloat16 ? 32 : 16;
  w.row_stride = (round_up(w.k_padded, line) / line | 1) * line;
  if (s.kind == WeightKind::kInteger) {
    w.integer_zero = s.zero != Zero::kSymmetric ? 0 : 1 << (s.bits - 1);
    const size_t scale_bytes = kLanes * w.scale_bytes();
    w.scales_offset = (size_t)w.k_padded * kLanes * s.bits / 8;
    w.extra_offset = w.scales_offset + scale_bytes;
    w.panel_bytes = w.extra_offset;
    if (s.zero == Zero::kMinimum) w.panel_bytes += scale_bytes;
    if (s.zero == Zero::kAsymmetric) w.panel_bytes += (size_t)w.groups * kLanes;
    w.powers_offset = w.panel_bytes;
    if (w.scales == Scales::kByte) w.panel_bytes += 2 * kLanes;
    w.panel_bytes = (w.panel_bytes + 63) / 64 * 64;
  } else {
    w.panel_bytes = (size_t)w.k_padded * kLanes * s.bits / 8;
  }
  return w;
}

void fill_panels(Linear& w, std::span<Arena> arenas, ThreadPool& pool, const std::function<void(int, uint8_t*)>& fill) {
  w.shares.resize(arenas.size());
  for (int i = 0; i < (int)arenas.size(); ++i)
    w.shares[i] = arenas[i].take((size_t)2 * (w.first_pair(i + 1) - w.first_pair(i)) * w.panel_bytes);
  pool.run([&](int thread) {
    const int end = std::min(2 * w.first_pair(thread + 1), w.panels);
    for (int p = 2 * w.first_pair(thread); p < end; ++p)
      fill(p, const_cast<uint8_t*>(w.pair(p / 2)) + (size_t)(p % 2) * w.panel_bytes);
  }, pool.size());
}

Linear pack_linear(const Source& s, bool interleaved, std::span<Arena> arenas, ThreadPool& pool) {
  Linear w = plan_linear(s, interleaved);
  std::atomic<bool> exact = true;
  fill_panels(w, arenas, pool, [&](int p, uint8_t* panel) {
    std::vector<uint8_t> scratch;
    for (int lane = 0; lane < kLanes; ++lane)  // zero scales elsewhere: a padded row yields zero
      if (const int row = row_of(s, interleaved, p, lane); row >= 0)
        if (!pack_row(s, w, lane, row, panel, scratch)) exact = false;
  });
  if (!exact) throw std::invalid_argument("scales and minima must be -127 to 127 times a power of two of their row");
  return w;
}

}  // namespace flatout
