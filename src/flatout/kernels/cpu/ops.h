// What the forward pass asks of an instruction set: packed operands and one table of functions.
//
// Legend: M tokens in a step, N output rows, K input columns, D hidden size, H query heads, G key/value heads, E head
// size. A panel is 16 output rows; weights of a panel lie in the order the kernel reads them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flatout {

constexpr int kLanes = 16;     // rows of a panel, lanes of a vector
constexpr int kPage = 64;      // tokens of a KV page; also the block of the online softmax
constexpr int kTileRows = 16;  // activation buffers are padded to this many rows
constexpr int kPrefetchBytes = 2048;  // how far ahead of the multiply the weight stream is fetched

enum class WeightKind { kFloat32, kBFloat16, kInteger };
enum class Zero { kSymmetric, kAsymmetric, kMinimum };

// A packed (n, k) weight. Panel p of 16 rows starts at data + p * panel_bytes:
//   integer  [k / 4][16 rows][4 columns] codes (4 bits: byte b of line i holds column group 2i in its low nibble and
//            2i + 1 in its high nibble), then scales [groups][16], then minima [groups][16] or zeros [groups][16] bytes
//   fp32     [k][16]                   bf16  [k / 2][16][2]
// Integer codes are stored unsigned: w = scale * (code - zero), zero constant (symmetric), per group, or a float minimum.
struct Linear {
  WeightKind kind = WeightKind::kFloat32;
  int n = 0, k = 0, k_padded = 0, panels = 0;
  int bits = 32, group = 0, groups = 1;  // group: columns a scale covers (k_padded when one scale a row)
  Zero zero = Zero::kSymmetric;
  int integer_zero = 0;
  bool half_scales = false;  // scales and minima as IEEE half, otherwise float
  bool integer_activation = false;
  int activation_group = 0;  // 0: one activation scale a token
  size_t panel_bytes = 0, scales_offset = 0, extra_offset = 0;
  const uint8_t* data = nullptr;
};

// The input of a linear: M tokens in the form the weight needs.
struct Activations {
  int8_t* codes = nullptr;       // [M][k_padded], zero in the padding
  float* scales = nullptr;       // [M][groups]
  int32_t* sums = nullptr;       // [M][groups]: sum of codes
  float* scaled_sums = nullptr;  // [M][groups]: scales * float(sums)
  float* floats = nullptr;       // [M][k_padded]
  uint16_t* bf16 = nullptr;      // [M][k_padded]
};

// One query block against the cache of one sequence and one head.
struct Attention {
  const float* q = nullptr;  // [rows][q_stride], rotated
  float* out = nullptr;      // [rows][out_stride]
  int q_stride = 0, out_stride = 0, rows = 0;
  int first_position = 0;           // position of row 0; row r sees keys 0 .. first_position + r
  int window = 0;                   // keys further back than this are hidden; 0: no limit
  int head_dim = 0, head_dim_padded = 0;
  const int32_t* pages = nullptr;   // page table of the sequence
  const uint8_t* cache = nullptr;   // this layer and kv head: page p at cache + p * page_stride
  size_t page_stride = 0;
  float scale = 1.0f;               // 1 / sqrt(E)
};

// Layout of one page of one kv head, E padded to 16.
//   int8  keys [E / 4][64 tokens][4] as code + 128, values [64 / 4][E][4] signed, key scales [64], value scales [64]
//   bf16  keys [E][64 tokens], values [64 tokens][E]
inline size_t kv_head_bytes(int head_dim_padded, bool int8_cache) {
  return int8_cache ? 2 * (size_t)kPage * head_dim_padded + 2 * kPage * sizeof(float)
                    : 2 * (size_t)kPage * head_dim_padded * sizeof(uint16_t);
}

struct Ops {
  const char* name;
  // out = x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int d, float* out);
  // int8 codes with one scale a group: scale = max|x| / 127, code = round(x * (127 / max|x|))
  void (*quantize)(const float* x, int k, int k_padded, int group, int groups, int act_group, int8_t* codes,
                   float* scales, int32_t* sums, float* scaled_sums);
  void (*round_bf16)(const float* x, int k, int k_padded, uint16_t* out);
  // Unpack what linear_panel needs once a panel; scratch holds 16 * k_padded bytes. May be null.
  void (*prepare_panel)(const Linear&, const uint8_t* panel, int8_t* scratch);
  // out[i][0..15] = (row block of the panel) . (token first + i), i < count
  void (*linear_panel)(const Linear&, const uint8_t* panel, const int8_t* scratch, const Activations&, int first,
                       int count, float* out);
  // out[i * stride .. + 16) = act(gate[i][0..15]) * up[i][0..15], at most `lanes` of them
  void (*gated)(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride);
  // Rotate x (E values) by the angles of one position: cosines then sines, E / 2 each
  void (*rope)(float* x, const float* table, int head_dim);
  void (*write_kv)(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, bool int8_cache,
                   uint8_t* page);
  void (*attend)(const Attention&, bool int8_cache);
  // log(sum(exp(row))), and the row's greatest value
  float (*log_sum_exp)(const float* row, int n);
};

}  // namespace flatout
