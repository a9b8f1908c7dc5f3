// The head: logits of wanted rows, or of one row only the greatest.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"
#include "screen.h"

namespace flatout {

// 32 lower parts are at most sqrt(32) * 3.5 long. One unit more takes care of rounding: the exact sum and its bound are each
// off by less than (groups + 4) * 2^-24 of 128 * sqrt(32) * scale * |codes|, which is half a unit for 1,000 groups.
static uint8_t bound_of(float squares) {
  return (uint8_t)std::min(255.0f, std::ceil(std::sqrt(squares) / kScreenUnit) + 1.0f);
}

bool screenable(const Linear& w) {
  return w.kind == WeightKind::kInteger && w.bits == 8 && w.zero == Zero::kSymmetric && w.n % (2 * kLanes) == 0 &&
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
        float squares = 0.0f;
        uint8_t* block = panel + (size_t)b * kBlockBytes;
        for (int i = 0; i < kScreenBlock; ++i) {
          const int code = codes[i] ^ 128, high = i % 8 / 4, byte = 4 * lane + i % 4;
          const float low = (float)(code & 7) - 3.5f;
          squares += low * low;
          block[64 * (i / 8) + byte] |= (uint8_t)(code >> 4 << 4 * high);
          block[64 * 4 + 16 * (i / 8) + 8 * high + byte / 8] |= (uint8_t)((code >> 3 & 1) << byte % 8);
        }
        panel[w.extra_offset + (size_t)b * kLanes + lane] = bound_of(squares);
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

// A head that is the embedding is screened, which takes rows as well as panels. Its own panels are packed when a step first
// needs them: one sequence that decodes greedily never does.
bool Model::screen_head(const Source& s) {
  const Source& e = embedding_;
  const Linear w = plan_linear(s, false);
  if (!screenable(w) || e.kind != s.kind || e.n != s.n || e.k != s.k || e.bits != s.bits || e.group != s.group ||
      e.zero != s.zero || e.half_scales != s.half_scales)
    return false;
  const size_t k = s.k, scale_bytes = w.scale_bytes();
  std::atomic<bool> same = true;
  pool_.run([&](int thread) {
    std::vector<uint8_t> scratch;
    for (int row = thread; row < s.n && same; row += pool_.size()) {
      const SourceRow in = source_row(s, row, scratch);
      if (std::memcmp(in.codes, embedding_codes_.data + row * k, k) != 0 ||
          std::memcmp(in.scales, embedding_scales_.data + row * scale_bytes, scale_bytes) != 0)
        same = false;
    }
  }, pool_.size());
  if (!same) return false;
  head_source_ = s;
  head_source_.blocks = nullptr;
  head_source_.codes = embedding_codes_.data;
  head_source_.scales = embedding_scales_.data;
  head_ = w;
  screen_ = pack_screen(head_source_, w, arenas_, pool_);
  best_.resize(pool_.size());
  candidates_.resize(s.n);
  return true;
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
