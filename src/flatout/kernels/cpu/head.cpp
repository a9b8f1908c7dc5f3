// The head: logits of wanted rows, or of one row only the greatest.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"
#include "screen.h"
#include "weights.h"

namespace flatout {

// 32 lower parts are at most sqrt(32) * 3.5 long. One unit more takes care of rounding: the exact sum and its bound are each
// off by less than (groups + 4) * 2^-24 of 128 * sqrt(32) * scale * |codes|, which is half a unit for 1,000 groups.
static uint8_t bound_of(float squares) {
  return (uint8_t)std::min(255.0f, std::ceil(std::sqrt(squares) / kScreenUnit) + 1.0f);
}

// The lowest bit of each of four bytes, the first byte's lowest.
static uint32_t first_bits(uint32_t bytes) { return (bytes * 0x01020408u) >> 24 & 15; }

bool screenable(const Linear& w) {
  return w.kind == WeightKind::kInteger && w.bits == 8 && w.zero == Zero::kSymmetric && w.scales != Scales::kByte &&
         w.n % (2 * kLanes) == 0 &&
         w.k == w.k_padded && w.group % kScreenBlock == 0 && w.group <= 2 * kScreenBlock && w.groups <= 1000;
}

Linear pack_screen(const Source& s, const Linear& head, std::span<Arena> arenas, ThreadPool& pool) {
  constexpr size_t kBlockBytes = 5 * 64;
  Linear w = head;
  const int blocks = w.k / kScreenBlock;
  const size_t scale_bytes = w.scale_bytes();
  w.bits = 5;
  w.scales_offset = (size_t)blocks * kBlockBytes;
  w.extra_offset = w.scales_offset + kLanes * scale_bytes;
  w.panel_bytes = (w.extra_offset + (size_t)blocks * kLanes + 63) / 64 * 64;
  fill_panels(w, arenas, pool, [&](int p, uint8_t* panel) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const size_t row = (size_t)p * kLanes + lane;
      const uint8_t* codes = s.codes + row * w.k;
      for (int b = 0; b < blocks; ++b, codes += kScreenBlock) {
        uint8_t* block = panel + (size_t)b * kBlockBytes;
        for (int i = 0; i < kScreenBlock / 8; ++i) {
          uint64_t eight;
          std::memcpy(&eight, codes + 8 * i, 8);
          eight ^= 0x8080808080808080u;
          const uint64_t upper = eight >> 4 & 0x0f0f0f0f0f0f0f0fu, fifth = eight >> 3 & 0x0101010101010101u;
          const uint32_t nibbles = (uint32_t)upper | (uint32_t)(upper >> 32) << 4;
          std::memcpy(block + 64 * i + 4 * lane, &nibbles, 4);
          for (int high = 0; high < 2; ++high)
            block[64 * 4 + 16 * i + 8 * high + lane / 2] |=
                (uint8_t)(first_bits((uint32_t)(fifth >> 32 * high)) << lane % 2 * 4);
        }
        int squares = 0;  // of l - 3.5, less 3.5^2 each
        for (int i = 0; i < kScreenBlock; ++i) {
          const int low = codes[i] & 7;
          squares += low * (low - 7);
        }
        panel[w.extra_offset + (size_t)b * kLanes + lane] = bound_of((float)squares + 12.25f * kScreenBlock);
      }
      pack_scales(w, (const uint8_t*)s.scales + row * scale_bytes, lane, panel + w.scales_offset);
    }
  });
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

// The head is the embedding. Where it can be screened, which takes rows as well as panels, its own panels are packed when a
// step first needs them: one sequence that decodes greedily never does.
void Model::tie_head() {
  expect(embedding_.kind == WeightKind::kInteger, "a head can be tied to an integer embedding that was set before");
  head_source_ = embedding_;
  head_source_.blocks = nullptr;
  head_source_.codes = embedding_codes_.data;
  head_source_.scales = embedding_scales_.data;
  head_source_.minima = embedding_minima_.data;
  head_source_.zeros = embedding_zeros_.data;
  head_ = plan_linear(head_source_, false);
  if (!screenable(head_)) return pack_head();
  screen_ = pack_screen(head_source_, head_, arenas_, pool_);
  best_.resize(pool_.size());
  candidates_.resize(head_.n);
}

void Model::pack_head() {
  if (head_.shares.empty()) head_ = pack_linear(head_source_, false, arenas_, pool_);
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
  const size_t scale_bytes = head_.scale_bytes();
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
  // Flat logits leave many candidates. From a twenty-fourth of the rows on, collecting them costs what the screen saves:
  // then all are read for a while.
  candidates_lately_ = 0.75f * candidates_lately_ + 0.25f * (float)candidates;
  if (candidates_lately_ > (float)config_.vocab_size / 24) candidates_lately_ = 0, screen_pause_ = 32;
  return finite && best->row >= 0 ? best->row : kNotFinite;
}

}  // namespace flatout
