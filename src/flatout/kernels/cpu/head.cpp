// The head: logits of wanted rows, or of one row only the greatest.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"
#include "screen.h"

namespace flatout {

// 32 lower parts are at most sqrt(32) * 3.5 long. One unit more takes care of rounding: the exact sum and its bound are each
// off by less than (groups + 4) * 2^-24 of 128 * sqrt(32) * scale * |codes|, which is half a unit for 1,000 groups.
constexpr size_t kBlockBytes = 5 * 64;

static uint8_t bound_of(float squares) {
  return (uint8_t)std::min(255.0f, std::ceil(std::sqrt(squares) / kScreenUnit) + 1.0f);
}

bool screenable(const Linear& w) {
  return w.kind == WeightKind::kInteger && w.group <= 2 * kScreenBlock && w.bits == 8 && w.zero == Zero::kSymmetric && w.n % (2 * kLanes) == 0 &&
         w.k == w.k_padded && w.group % kScreenBlock == 0 && w.groups <= 1000;
}

Linear pack_screen(const Source& s, const Linear& head, std::span<Arena> arenas) {
  Linear w = head;
  const int blocks = w.k / kScreenBlock;
  const size_t width = w.half_scales ? 2 : 4;
  w.bits = 5;
  w.scales_offset = (size_t)blocks * kBlockBytes;
  w.extra_offset = w.scales_offset + (size_t)w.groups * kLanes * width;
  w.panel_bytes = (w.extra_offset + (size_t)blocks * kLanes + 63) / 64 * 64;
  w.shares.assign(arenas.size(), nullptr);
  for (int i = 0; i < (int)arenas.size(); ++i)
    w.shares[i] = arenas[i].take((size_t)2 * (w.first_pair(i + 1) - w.first_pair(i)) * w.panel_bytes);
  for (int row = 0; row < w.n; ++row) {
    uint8_t* panel = const_cast<uint8_t*>(w.pair(row / kLanes / 2)) + (size_t)(row / kLanes % 2) * w.panel_bytes;
    const int lane = row % kLanes;
    const uint8_t* codes = s.codes + (size_t)row * w.k;
    for (int b = 0; b < blocks; ++b) {
      float squares = 0.0f;
      for (int i = 0; i < kScreenBlock; ++i) {
        const int code = codes[b * kScreenBlock + i] ^ 128, high = i % 8 / 4, byte = 4 * lane + i % 4;
        const float low = (float)(code & 7) - 3.5f;
        squares += low * low;
        uint8_t* block = panel + (size_t)b * kBlockBytes;
        block[64 * (i / 8) + byte] |= (uint8_t)(code >> 4 << 4 * high);
        block[64 * 4 + 16 * (i / 8) + 8 * high + byte / 8] |= (uint8_t)((code >> 3 & 1) << byte % 8);
      }
      panel[w.extra_offset + (size_t)b * kLanes + lane] = bound_of(squares);
    }
    for (int g = 0; g < w.groups; ++g)
      std::memcpy(panel + w.scales_offset + ((size_t)g * kLanes + lane) * width,
                  (const uint8_t*)s.scales + ((size_t)row * w.groups + g) * width, width);
  }
  return w;
}

void screen_sizes(const Linear& w, const Activations& a, float* sizes) {
  const int blocks = w.k / kScreenBlock;
  for (int b = 0; b < blocks; ++b) {
    float squares = 0.0f;
    for (int i = b * kScreenBlock; i < (b + 1) * kScreenBlock; ++i) {
      const float code = w.planes == 2 ? 128.0f * a.codes[0][i] + (float)a.codes[1][i] : (float)a.codes[0][i];
      squares += code * code;
    }
    const float scale = a.scales[(size_t)(b * kScreenBlock / w.group) * kTileRows];
    sizes[b] = std::sqrt(squares) * scale * kScreenUnit * 1.00001f;
  }
}

// Logits of `rows` of the hidden state; every thread returns once all are written.
void Model::head(const float* hidden, const int32_t* rows, int count, float* logits, int thread) {
  const Activations a = prepare(head_, hidden, hidden_stride_, rows, count, &norm_, thread);
  linear(head_, a, count, Epilogue::kStore, nullptr, logits, config_.vocab_size, thread);
  if (by_token(count)) pool_.barrier(thread);
  mark(kHead, thread);
}

// The greatest logit of one row, into best_[thread] of the rows that the thread took.
void Model::head_greedy(int32_t row, float* bounds, int thread) {
  const Activations a = prepare(head_, (const float*)x_.data, hidden_stride_, &row, 1, &norm_, thread);
  float* sizes = (float*)scratch_[thread].normed.data;
  screen_sizes(head_, a, sizes);
  Best& mine = best_[thread];
  mine = Best{};
  const int64_t pairs = screen_.pairs();
  const auto edge = [&](int64_t at) { return (int)(2 * kLanes * (pairs * at / team_)); };
  const int first = edge(thread), last = edge(thread + 1);
  for (int row = first; row < last; row += 2 * kLanes) {
    float best;
    int best_row;
    ops_->screen_panels(screen_, screen_.pair(row / 2 / kLanes), 2, a, sizes, bounds + row, &best, &best_row);
    if (best > mine.value || mine.row < 0) mine.value = best, mine.row = row + best_row;
  }
  pool_.barrier(thread);
  // Exact sums of 16 rows at a time: theirs, collected from the embedding, make a panel.
  alignas(64) float sums[kLanes];
  float* const to[1] = {sums};
  uint8_t* panel = scratch_[thread].panel.data;
  const uint8_t* const panels[1] = {panel};
  const auto multiply = [&](int32_t* rows, int count) {
    std::fill(rows + count, rows + kLanes, rows[0]);
    ops_->collect_panel(head_, embedding_codes_.data, embedding_scales_.data, rows, panel);
    ops_->linear_panels(head_, panels, 1, nullptr, a, 0, 1, to);
  };
  const size_t scale_bytes = (size_t)head_.groups * (head_.half_scales ? 2 : 4);
  const auto fetch_row = [&](int32_t row) {
    for (int k = 0; k < head_.k; k += 64) __builtin_prefetch(embedding_codes_.data + (size_t)row * head_.k + k);
    __builtin_prefetch(embedding_codes_.data + (size_t)(row + 1) * head_.k - 1);
    for (size_t i = 0; i < scale_bytes; i += 64) __builtin_prefetch(embedding_scales_.data + row * scale_bytes + i);
  };
  const Best* guess = &best_[0];
  for (int t = 1; t < team_; ++t)
    if (best_[t].value > guess->value) guess = &best_[t];
  int32_t rows[kLanes] = {guess->row};
  multiply(rows, 1);
  float threshold = sums[0];  // every row of which no more is known than a bound below this is out
  int32_t* candidates = candidates_.data() + first;
  const int found = ops_->at_least(bounds + first, last - first, threshold, candidates);
  pool_.barrier(thread);  // nobody looks at best_ any more
  mine = Best{};
  mine.candidates = found;
  // Rows lie far apart: while 16 are multiplied, the next are on their way.
  int32_t ready[2][kLanes];
  int next = 0;
  const auto collect = [&](int32_t* rows) {
    int count = 0;
    for (; next < found && count < kLanes; ++next) {
      const int32_t row = first + candidates[next];
      if (bounds[row] < threshold) continue;
      fetch_row(row);
      rows[count++] = row;
    }
    return count;
  };
  int side = 0;
  for (int count = collect(ready[0]); count > 0; side ^= 1) {
    const int following = collect(ready[side ^ 1]);
    multiply(ready[side], count);
    for (int j = 0; j < count; ++j) {
      if (sums[j] != sums[j]) mine.finite = false;
      const int32_t row = ready[side][j];
      if (sums[j] > mine.value || (sums[j] == mine.value && row < mine.row)) mine.value = sums[j], mine.row = row;
    }
    threshold = std::max(threshold, mine.value);
    count = following;
  }
  pool_.barrier(thread);
  mark(kHead, thread);
}

// What the threads of head_greedy found together.
int32_t Model::take_best() {
  const Best* best = &best_[0];
  int candidates = 0;
  bool finite = true;
  for (int t = 0; t < team_; ++t) {
    const Best& other = best_[t];
    candidates += other.candidates;
    finite &= other.finite;
    if (other.value > best->value || (other.value == best->value && other.row < best->row)) best = &other;
  }
  screened_ = candidates;
  // Flat logits leave many candidates, and collecting rows costs more than reading all: then do that for a while.
  if (candidates > config_.vocab_size / 32) screen_pause_ = 32;
  return finite && best->row >= 0 ? best->row : kNotFinite;
}

}  // namespace flatout
