// What the forward pass asks of an instruction set: packed operands and one table of functions.
//
// Legend: M tokens in a step, N output rows, K input columns, D hidden size, H query heads, G key/value heads, E head
// size. A panel is 16 output rows; weights of a panel lie in the order the kernel reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace flatout {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kLanes = 16;     // rows of a panel, lanes of a vector
constexpr int kPage = 64;      // tokens of a KV page; also the block of the online softmax
constexpr int kChunk = 4;      // pages whose attention is summed by itself, so that threads can share a long context
constexpr int kTileRows = 16;  // activation buffers are padded to this many rows
constexpr int kTileMinimum = 6;  // fewer tokens than this are faster without tiles
constexpr int kPrefetchBytes = 16384;  // how far ahead of the multiply weights are fetched

inline int round_up(int v, int to) { return (v + to - 1) / to * to; }

// A chunk of codes with 5 or 6 bits: 64-byte lines, the last one of upper bits, and the columns that they hold.
constexpr int chunk_lines(int bits) { return bits == 5 ? 5 : 3; }
constexpr int chunk_columns(int bits) { return bits == 5 ? 32 : 16; }

enum class WeightKind { kFloat32, kBFloat16, kInteger };
enum class Zero { kSymmetric, kAsymmetric, kMinimum };
// Of scales and minima: floats, IEEE halves, or signed bytes that count a power of two of their row. A sum is made of bytes
// alone and multiplied by the power at its end, which gives the same bits.
enum class Scales { kFloat, kHalf, kByte };

// A packed (n, k) weight. Panels of 16 rows go in pairs, and each thread's pairs lie one after another, behind those of the
// weight that it multiplies before, so that fetching past an end is never wasted. In a panel:
//   integer  [k / 4][16 rows][4 columns] codes (4 bits: byte b of line i holds column group 2i in its low nibble and
//            2i + 1 in its high nibble; 5 and 6 bits: chunks of chunk_lines, the lower four bits of 32 or 16 columns
//            like that, then a line whose byte b holds the upper bits of column group 0 lowest, then of 1, 2, ...),
//            then scales [groups][16], then minima [groups][16] or zeros [groups][16] bytes; behind those
//            of bytes exponents of each row's powers, [16] of scales and [16] by which those of minima are more, 127 added
//   fp32     [k][16]                   bf16  [k / 2][16][2]
// Integer codes are stored unsigned: w = scale * (code - zero), zero constant (symmetric), per group, or a float minimum.
struct Linear {
  WeightKind kind = WeightKind::kFloat32;
  int n = 0, k = 0, k_padded = 0, panels = 0;
  int row_stride = 0;            // elements from one token's activations to the next
  int bits = 32, group = 0, groups = 1;  // group: columns a scale covers (k_padded when one scale a row)
  Zero zero = Zero::kSymmetric;
  int integer_zero = 0;
  Scales scales = Scales::kFloat;  // and minima
  int planes = 0;            // activations: 0 floats, 1 signed bytes, 2 signed 15-bit numbers as 128 * high + low
  int activation_group = 0;  // 0: one activation scale a token
  size_t panel_bytes = 0, scales_offset = 0, extra_offset = 0, powers_offset = 0;
  std::vector<const uint8_t*> shares;  // of each thread

  size_t scale_bytes() const {  // of a row
    return (size_t)groups * (scales == Scales::kByte ? 1 : scales == Scales::kHalf ? 2 : 4);
  }
  int pairs() const { return (panels + 1) / 2; }
  int first_pair(int share) const { return (int)((int64_t)pairs() * share / (int64_t)shares.size()); }
  const uint8_t* pair(int p) const {
    const int share = (int)((((int64_t)p + 1) * (int64_t)shares.size() - 1) / pairs());
    return shares[share] + (size_t)2 * (p - first_pair(share)) * panel_bytes;
  }
};

// The input of a linear: M tokens in the form the weight needs.
struct Activations {
  int8_t* codes[2] = {};         // high and low plane: [M][row_stride], zero in the padding
  float* scales = nullptr;       // group values: [M / 16][groups][16 tokens]
  int32_t* sums[2] = {};         // likewise, of each plane: sum of codes
  float* scaled_sums = nullptr;  // likewise, one plane only: scales * float(sums)
  float* floats = nullptr;       // [M][row_stride]
  uint16_t* bf16 = nullptr;      // [M][row_stride]
};

// Index of token m's value of group g: the 16 tokens of a tile lie together.
inline size_t group_index(int m, int g, int groups) {
  return ((size_t)(m / kTileRows) * groups + g) * kTileRows + m % kTileRows;
}

// Layout of one page of one kv head, E padded to 16.
//   int8  keys [E / 4][64 tokens][4] as code + 128, values [64 / 4][E][4] signed, key scales [64], value scales [64]
//   bf16  keys [E / 2][64 tokens][2], values [64 / 2][E][2]
//   fp32  keys [E][64 tokens], values [64][E]
enum class CacheKind { kInt8, kBFloat16, kFloat32 };
inline size_t cached_bytes(CacheKind kind) { return kind == CacheKind::kInt8 ? 1 : kind == CacheKind::kBFloat16 ? 2 : 4; }
inline size_t kv_head_bytes(int head_dim_padded, CacheKind kind) {
  const size_t scales = kind == CacheKind::kInt8 ? 2 * kPage * sizeof(float) : 0;
  return 2 * (size_t)kPage * head_dim_padded * cached_bytes(kind) + scales;
}

// Up to 16 tokens' queries of a few query heads against the cache of one sequence and the kv head that they share.
struct Attention {
  const float* q = nullptr;  // [rows][q_stride], the heads' E values one after another, rotated
  float* out = nullptr;      // [rows][out_stride], likewise
  int q_stride = 0, out_stride = 0, rows = 0, heads = 1;
  int first_position = 0;           // position of row 0; row r sees keys 0 .. first_position + r * step
  int step = 1;                     // 0: every row sees the same keys (heads of one token, tokens of an encoder)
  int window = 0;                   // keys further back than this are hidden; 0: no limit
  int head_dim = 0, head_dim_padded = 0;
  const int32_t* pages = nullptr;   // page table of the sequence
  const uint8_t* cache = nullptr;   // this layer and kv head: page p at cache + p * page_stride
  const uint8_t* after = nullptr;   // the page that this thread is likely to read next
  size_t page_stride = 0;
  float scale = 1.0f;               // 1 / sqrt(E)
  CacheKind cache_kind = CacheKind::kInt8;
  bool bf16_products = false;  // bf16 cache: queries and probabilities may be rounded to bf16
  // One token: only this chunk of pages, its sums to `partial` ([heads][partial_floats(E)]) instead of `out`.
  int chunk = -1;
  float* partial = nullptr;
};
inline int partial_floats(int head_dim_padded) { return head_dim_padded + 3; }

// A block of columns that are rounded one after another; a column's values, one for each row of the weight, lie together.
// With x[j] = values[j] - sum over i < j of factor[i][j] errors[i], and w[j] = base[j] - gain[j] x[j] where there is a base:
//   levels[j] = round(clamp(w[j] / step, low, high)),  errors[j] = base[j] - levels[j] step,  without a base x[j] for both
constexpr int kMostColumns = 128;
struct RoundBlock {
  int columns = 0;
  size_t rows = 0;
  const float *values = nullptr, *base = nullptr;              // [columns][rows]
  const float *factor = nullptr, *gain = nullptr;              // [columns][columns], [columns]
  const int32_t* groups = nullptr;                             // [columns]: the row of steps, low and high
  const float *steps = nullptr, *low = nullptr, *high = nullptr;  // [groups][rows]
  float *levels = nullptr, *errors = nullptr;                  // [columns][rows]
};
constexpr int kBlockRows = 64;  // that round_block takes at a time

// A group of weights and grids that it may be rounded on: levels step[c] times low - zero[c] to high - zero[c].
struct Grids {
  const float *weights = nullptr, *importance = nullptr;  // [width]; importance may be null: all ones
  const float *steps = nullptr, *zeros = nullptr;         // of candidate c at c * stride
  int width = 0, candidates = 0;
  size_t stride = 0;
  float low = 0, high = 0;
};

struct Ops {
  const char* name;
  // out = x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int d, float* out);
  // One token's codes and group values, which lie kTileRows apart (see group_index).
  //   one plane   scale = max|x| / 127, code = round(x * (127 / max|x|)), the maximum over a group or the token
  //   two planes  the same with 16256 = 127 * 128 over the token; code = 128 * high + low, low in [-64, 63]
  void (*quantize)(const Linear&, const float* x, const Activations& row);
  void (*round_bf16)(const float* x, int k, int k_padded, uint16_t* out);
  // Unpack what linear_panel needs once a panel; scratch holds 16 * k_padded bytes. May be null.
  void (*prepare_panel)(const Linear&, const uint8_t* panel, int8_t* scratch);
  // Called by each thread around the panels of one linear, of which no share has more than `tokens`; may be null.
  void (*begin_linear)(const Linear&, int tokens);
  void (*end_linear)();
  // out[p][i][0..15] = (rows of panel p) . (token first + i) for 1 or 2 panels and i < count; out has room for count
  // rounded up to 16 rows
  void (*linear_panels)(const Linear&, const uint8_t* const* panel, int panels, const int8_t* const* scratch,
                        const Activations&, int first, int count, float* const* out);
  // One token times the upper halves of a head's codes, `panels` panels (screen.h): an upper bound of each row's sum, the
  // greatest sum with lower halves of 7.5, and its row, counted from the first panel
  void (*screen_panels)(const Linear&, const uint8_t* panel, int panels, const Activations&, const float* sizes,
                        float* bounds, float* best, int* best_row);
  // Indices, in order, of values that are not less than the threshold; `count` is a multiple of 16
  int (*at_least)(const float* values, int count, float threshold, int32_t* indices);
  // 16 rows of row-major signed 8-bit codes with their scales as a panel
  void (*collect_panel)(const Linear&, const uint8_t* codes, const uint8_t* scales, const int32_t* rows, uint8_t* panel);
  // out[i * stride .. + lanes) = tile[i] (+ bias) (+ what is there)
  void (*epilogue)(const float* tile, int count, int lanes, const float* bias, bool add, float* out, int stride);
  // out[i * stride .. + 16) = act(gate[i][0..15]) * up[i][0..15], at most `lanes` of them
  void (*gated)(const float* gate, const float* up, int count, int lanes, bool gelu, float* out, int stride);
  // out[i * stride .. + lanes) = gelu(tile[i] + bias), by the error function
  void (*bias_gelu)(const float* tile, int count, int lanes, const float* bias, float* out, int stride);
  // out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias; out may be x
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int d, float* out);
  void (*scale_columns)(const float* x, const float* factors, int d, float* out);
  // Rotate x (E values) by the angles of one position: cosines then sines, E / 2 each
  void (*rope)(float* x, const float* table, int head_dim);
  void (*write_kv)(const float* k, const float* v, int head_dim, int head_dim_padded, int slot, CacheKind kind,
                   uint8_t* page);
  void (*attend)(const Attention&);
  // out = the attention of one head from the partial sums of `chunks` chunks, `stride` floats apart
  void (*merge_chunks)(const float* partial, int chunks, int stride, int head_dim, int head_dim_padded, float* out);
  // Index of the greatest value, the lowest on ties; -1 when some value is not a number
  int (*argmax)(const float* row, int n);
  // log(sum(exp(row))), and the row's greatest value
  float (*log_sum_exp)(const float* row, int n);
  // Rows first .. first + count of a block, at most kBlockRows
  void (*round_block)(const RoundBlock&, int first, int count);
  // The candidate with the least sum of importance[i] (rounded(weights[i]) - weights[i])^2, the first of equal ones
  int (*nearest_grid)(const Grids&);
};

}  // namespace flatout
