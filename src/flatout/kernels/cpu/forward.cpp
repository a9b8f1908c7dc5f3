// The forward step: every thread runs the same sequence of phases and meets the others between them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"
#include "model.h"
#include "weights.h"

namespace flatout {

const char* const kPhaseNames[kPhases] = {"embedding", "qkv", "attention", "o", "gate_up", "down", "head", "other"};

namespace {

constexpr int kQueryBlock = 16;   // queries of one head that attention takes together
constexpr int kLocalRows = 8;     // up to this many rows every thread prepares its own copy instead of meeting
// From this many tokens a thread on, each thread takes tokens through the whole layer instead of rows of each weight:
// the weights are read once a thread, but no activation ever moves from core to core.
constexpr int kTokensAThread = 64;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A thread's tokens when the step is split by tokens: an early and a late chunk, so that causal attention balances.
std::vector<Rows> token_shares(int count, int thread, int threads) {
  const auto edge = [&](int i) {
    return std::min(count, round_up((int)((int64_t)count * i / (2 * threads)), kTileRows));
  };
  const int late = 2 * threads - 1 - thread, first = edge(thread), last = edge(thread + 1);
  return {{first, last, 0}, {edge(late), edge(late + 1), round_up(last - first, kTileRows)}};
}

}  // namespace

bool Model::by_token(int count) const { return pool_.size() > 1 && count >= kTokensAThread * pool_.size(); }

void Model::check(const Batch& b) const {
  expect(finalized_, "the model has weights missing: call finalize first");
  expect(b.sequences >= 1, "a step needs at least one sequence");
  expect(b.total <= kMaxStepTokens,
         "a step takes at most " + std::to_string(kMaxStepTokens) + " tokens, got " + std::to_string(b.total));
  int64_t total = 0;
  for (int s = 0; s < b.sequences; ++s) {
    expect(b.lengths[s] >= 1 && b.starts[s] >= 0, "lengths must be at least 1 and starts at least 0");
    const int64_t end = (int64_t)b.starts[s] + b.lengths[s];
    const int64_t needed = (end + kPage - 1) / kPage;
    expect(end <= positions_ && needed <= b.page_columns,
           "position " + std::to_string(end - 1) + " is beyond the page table, the cache or the model's context");
    for (int p = 0; p < needed; ++p) {
      const int32_t page = b.pages[(size_t)s * b.page_columns + p];
      expect(page >= 0 && page < num_pages_, "page " + std::to_string(page) + " does not exist");
    }
    total += b.lengths[s];
  }
  expect(total == b.total, "lengths must add up to the number of tokens");
  for (int t = 0; t < b.total; ++t)
    expect(b.tokens[t] >= 0 && b.tokens[t] < config_.vocab_size,
           "token " + std::to_string(b.tokens[t]) + " is outside the vocabulary");
}

void Model::begin(const Batch& b) {
  check(b);
  token_sequence_.clear();
  token_position_.clear();
  last_rows_.clear();
  blocks_.clear();
  for (int s = 0; s < b.sequences; ++s) {
    // Query blocks end where a tile of 16 tokens ends, so that none lies across two threads' tokens.
    const int start = (int)token_sequence_.size(), stop = start + b.lengths[s];
    for (int first = start; first < stop;) {
      const int last = std::min(stop, first / kQueryBlock * kQueryBlock + kQueryBlock);
      blocks_.push_back({s, first, last - first});
      first = last;
    }
    for (int i = 0; i < b.lengths[s]; ++i) {
      token_sequence_.push_back(s);
      token_position_.push_back(b.starts[s] + i);
    }
    last_rows_.push_back((int32_t)token_sequence_.size() - 1);
  }
  paced_ = b.total <= Pace::kMostTokens;  // fewer than are split by token
  team_ = paced_ ? pace_.team(b.total) : pool_.size();
  plan_attention(b.total);
  if (profiling_) last_mark_ = now();
}

void Model::run(const std::function<void(int)>& task) {
  const double start = now();
  pool_.run(task, team_);
  if (paced_) pace_.took(now() - start);
}

void Model::mark(Phase phase, int thread) {
  if (!profiling_ || thread != 0) return;
  const double t = now();
  timings_[phase] += t - last_mark_;
  last_mark_ = t;
}

std::vector<double> Model::take_timings() {
  std::vector<double> t(timings_, timings_ + kPhases);
  std::fill(timings_, timings_ + kPhases, 0.0);
  return t;
}

uint8_t* Model::page_head(int layer, int kv_head) const {
  return cache_.data + ((size_t)layer * config_.num_kv_heads + kv_head) * head_bytes_;
}

void Model::lookup(int32_t token, float* out) const {
  const Source& e = embedding_;
  const size_t row = (size_t)token * e.k;
  if (e.kind == WeightKind::kFloat32) {
    std::memcpy(out, embedding_codes_.data + row * 4, (size_t)e.k * 4);
  } else if (e.kind == WeightKind::kBFloat16) {
    for (int k = 0; k < e.k; ++k) {
      const uint32_t bits = (uint32_t)((const uint16_t*)embedding_codes_.data)[row + k] << 16;
      std::memcpy(out + k, &bits, 4);
    }
  } else {
    const int group = e.group ? e.group : e.k, groups = e.k / group;
    const auto value = [&](const Buffer& b, size_t i) {
      if (!e.half_scales) return ((const float*)b.data)[i];
      return half_to_float(((const uint16_t*)b.data)[i]);
    };
    for (int g = 0; g < groups; ++g) {
      const size_t at = (size_t)token * groups + g;
      const float scale = value(embedding_scales_, at);
      const float minimum = e.zero == Zero::kMinimum ? value(embedding_minima_, at) : 0.0f;
      const int zero = e.zero == Zero::kAsymmetric ? embedding_zeros_.data[at] : (e.bits < 8 && e.zero == Zero::kSymmetric ? 1 << (e.bits - 1) : 0);
      const bool is_signed = e.bits == 8 && e.zero == Zero::kSymmetric;
      for (int k = g * group; k < (g + 1) * group; ++k) {
        const int code = is_signed ? (int8_t)embedding_codes_.data[row + k] : embedding_codes_.data[row + k];
        out[k] = scale * (float)(code - zero) + minimum;
      }
    }
  }
  if (config_.embedding_scale != 1.0f)
    for (int k = 0; k < e.k; ++k) out[k] *= config_.embedding_scale;
}

Activations Model::prepare(const Linear& w, const float* x, int stride, const int32_t* rows, int count,
                           const std::vector<float>* norm, int thread) {
  // A buffer's layout depends on the weight, so threads that do not wait for each other need buffers of their own.
  const bool alone = by_token(count) || count <= kLocalRows;
  const Activations a = place_activations(w, alone ? scratch_[thread].activations.data : shared_.data,
                                          alone ? activation_rows_ : round_up(count, kTileRows));
  float* normed = (float*)scratch_[thread].normed.data;
  const auto prepare_row = [&](int r, int at) {
    const float* in = x + (size_t)(rows ? rows[r] : r) * stride;
    if (norm) {
      ops_->rms_norm(in, norm->data(), config_.rms_norm_eps, w.k, normed);
      in = normed;
    }
    write_activations(*ops_, w, in, a, at);
  };
  if (by_token(count)) {
    for (const Rows& share : token_shares(count, thread, team_)) {
      for (int r = share.first; r < share.last; ++r) prepare_row(r, share.at + r - share.first);
      pad_activations(w, a, share.at, share.count());
    }
  } else {
    for (int r = alone ? 0 : thread; r < count; r += alone ? 1 : team_) prepare_row(r, r);
    if (alone || thread == 0) pad_activations(w, a, 0, count);
    if (!alone) pool_.barrier(thread);
  }
  return a;
}

void Model::linear(const Linear& w, const Activations& a, int count, Epilogue epilogue, const float* bias, float* out,
                   int stride, int thread) {
  const Output o{epilogue, bias, config_.gelu, out, stride};
  int8_t* scratch = (int8_t*)scratch_[thread].panel.data;
  const int64_t pairs = w.pairs();
  if (by_token(count)) {
    multiply_panels(*ops_, w, a, token_shares(count, thread, team_), o, 0, (int)pairs, scratch);
  } else {
    multiply_panels(*ops_, w, a, {{0, count, 0}}, o, (int)(pairs * thread / team_), (int)(pairs * (thread + 1) / team_),
                    scratch);
    pool_.barrier(thread);
  }
}

// Rotate head h of token t, normalised where the model does; k heads follow the q heads and are stored with their v.
void Model::rotate(const Batch& b, int layer, int t, int h) {
  const Config& c = config_;
  const int position = token_position_[t];
  float* x = (float*)qkv_.data + (size_t)t * qkv_stride_ + (size_t)h * c.head_dim;
  if (c.qk_norm) {
    const std::vector<float>& weight = h < c.num_heads ? layers_[layer].q_norm : layers_[layer].k_norm;
    ops_->rms_norm(x, weight.data(), c.rms_norm_eps, c.head_dim, x);
  }
  ops_->rope(x, rope_.data() + (size_t)position * c.head_dim, c.head_dim);
  if (h < c.num_heads) return;
  const int32_t page = b.pages[(size_t)token_sequence_[t] * b.page_columns + position / kPage];
  ops_->write_kv(x, x + (size_t)c.num_kv_heads * c.head_dim, c.head_dim, head_dim_padded_, position % kPage,
                 c.cache_kind, page_head(layer, h - c.num_heads) + (size_t)page * page_bytes_);
}

// All heads of all tokens, before attention.
void Model::write_cache(const Batch& b, int layer, int thread) {
  const int heads = config_.num_heads + config_.num_kv_heads;
  const auto write = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) rotate(b, layer, i / heads, i % heads);
  };
  if (by_token(b.total)) {
    for (const Rows& share : token_shares(b.total, thread, team_)) write(share.first * heads, share.last * heads);
  } else {
    const int64_t items = (int64_t)b.total * heads, threads = team_;
    write((int)(items * thread / threads), (int)(items * (thread + 1) / threads));
  }
  pool_.barrier(thread);
}

void Model::attention(const Batch& b, int layer, int thread) {
  const Config& c = config_;
  const int group = c.num_heads / c.num_kv_heads;
  const auto place = [&](const Block& block, int first_head, int heads) {
    Attention a;
    a.q = (const float*)qkv_.data + (size_t)block.first_token * qkv_stride_ + (size_t)first_head * c.head_dim;
    a.q_stride = qkv_stride_;
    a.out = (float*)attended_.data + (size_t)block.first_token * attention_stride_ + (size_t)first_head * c.head_dim;
    a.out_stride = attention_stride_;
    a.rows = block.rows;
    a.heads = heads;
    a.first_position = token_position_[block.first_token];
    a.window = c.sliding_window;
    a.head_dim = c.head_dim;
    a.head_dim_padded = head_dim_padded_;
    a.pages = b.pages + (size_t)block.sequence * b.page_columns;
    a.cache = page_head(layer, first_head / group);
    a.page_stride = page_bytes_;
    a.scale = 1.0f / std::sqrt((float)c.head_dim);
    a.cache_kind = c.cache_kind;
    a.bf16_products = layers_[layer].qkv.kind == WeightKind::kBFloat16;
    return a;
  };
  const auto first_page = [&](const Attention& a) {
    const int key = a.window ? std::max(0, a.first_position - a.window + 1) : 0;
    return a.cache + a.pages[a.partial ? a.chunk * kChunk : key / kPage] * a.page_stride;
  };
  if (by_token(b.total)) {
    for (const Rows& share : token_shares(b.total, thread, team_))
      for (int kv = 0; kv < c.num_kv_heads; ++kv)
        for (const Block& block : blocks_)
          if (block.first_token >= share.first && block.first_token < share.last)
            ops_->attend(place(block, kv * group, group));
    return;
  }
  const int items = (int)items_.size();
  const auto place_item = [&](const Item& item) {
    Attention a = place(blocks_[item.block], item.first_head, item.heads);
    if (item.split >= 0) {
      const Split& split = splits_[item.split];
      a.chunk = split.first_chunk + item.chunk;
      a.partial = partials_.data() + split.offset + (size_t)item.chunk * chunk_floats() +
                  (size_t)item.first_head * partial_floats(head_dim_padded_);
    }
    return a;
  };
  for (int i; (i = next_item_[layer].fetch_add(1, std::memory_order_relaxed)) < items;) {
    const Item& item = items_[i];
    if (write_with_attention_) {
      const int token = blocks_[item.block].first_token, kv = item.first_head / group;
      for (int h = item.first_head; h < item.first_head + item.heads; ++h) rotate(b, layer, token, h);
      rotate(b, layer, token, c.num_heads + kv);
    }
    Attention a = place_item(item);
    if (i + team_ < items) a.after = first_page(place_item(items_[i + team_]));
    ops_->attend(a);
  }
  pool_.barrier(thread);
  if (splits_.empty()) return;
  const int heads = c.num_heads, merges = (int)splits_.size() * heads;
  for (int i = thread; i < merges; i += team_) {
    const Split& split = splits_[i / heads];
    const int h = i % heads;
    float* out = (float*)attended_.data + (size_t)blocks_[split.block].first_token * attention_stride_;
    ops_->merge_chunks(partials_.data() + split.offset + (size_t)h * partial_floats(head_dim_padded_), split.chunks,
                       chunk_floats(), c.head_dim, head_dim_padded_, out + (size_t)h * c.head_dim);
  }
  pool_.barrier(thread);
}

// What threads take one after another in attention. Heads of a group read the same pages and stay together unless there
// would be less work than threads; a single token's long context is split into chunks, whose sums are merged afterwards.
void Model::plan_attention(int tokens) {
  const Config& c = config_;
  items_.clear();
  splits_.clear();
  size_t floats = 0;
  const int group = c.num_heads / c.num_kv_heads, groups = (int)blocks_.size() * c.num_kv_heads;
  const int parts = std::min(group, (team_ + groups - 1) / groups);
  // Later blocks of a sequence see more keys: hand the longest out first.
  for (int i = (int)blocks_.size() - 1; i >= 0; --i) {
    const int last = token_position_[blocks_[i].first_token] + blocks_[i].rows - 1;
    const int begin = c.sliding_window ? std::max(0, last - c.sliding_window + 1) : 0;
    const int first_chunk = begin / kPage / kChunk, chunks = last / kPage / kChunk - first_chunk + 1;
    const bool split = blocks_[i].rows == 1 && chunks > 1 && team_ > 1;
    if (split) {
      splits_.push_back({i, first_chunk, chunks, floats});
      floats += (size_t)chunks * chunk_floats();
    }
    for (int kv = 0; kv < c.num_kv_heads; ++kv)
      for (int part = 0; part < parts; ++part) {
        const int first = kv * group + group * part / parts, end = kv * group + group * (part + 1) / parts;
        for (int chunk = 0; chunk < (split ? chunks : 1); ++chunk)
          items_.push_back({i, first, end - first, split ? (int)splits_.size() - 1 : -1, chunk});
      }
  }
  if (partials_.size() < floats) partials_.resize(floats);
  // A sequence's only token and a whole group: nobody else needs what is written.
  write_with_attention_ = !by_token(tokens) && (int)blocks_.size() == tokens && parts == 1 && splits_.empty();
  for (auto& next : next_item_) next.store(0, std::memory_order_relaxed);
}

void Model::layers(const Batch& b, int thread) {
  float* x = (float*)x_.data;
  float* qkv = (float*)qkv_.data;
  float* attended = (float*)attended_.data;
  float* gated = (float*)gated_.data;
  const int T = b.total;
  if (by_token(T)) {
    for (const Rows& share : token_shares(T, thread, team_))
      for (int t = share.first; t < share.last; ++t) lookup(b.tokens[t], x + (size_t)t * hidden_stride_);
  } else {
    for (int t = thread; t < T; t += team_) lookup(b.tokens[t], x + (size_t)t * hidden_stride_);
    pool_.barrier(thread);
  }
  mark(kEmbedding, thread);
  for (int i = 0; i < config_.num_layers; ++i) {
    const Layer& l = layers_[i];
    Activations a = prepare(l.qkv, x, hidden_stride_, nullptr, T, &l.input_norm, thread);
    const float* bias = l.qkv_bias.empty() ? nullptr : l.qkv_bias.data();
    linear(l.qkv, a, T, Epilogue::kStore, bias, qkv, qkv_stride_, thread);
    mark(kQkv, thread);
    if (!write_with_attention_) write_cache(b, i, thread);
    attention(b, i, thread);
    mark(kAttention, thread);
    a = prepare(l.o, attended, attention_stride_, nullptr, T, nullptr, thread);
    linear(l.o, a, T, Epilogue::kAdd, nullptr, x, hidden_stride_, thread);
    mark(kO, thread);
    a = prepare(l.gate_up, x, hidden_stride_, nullptr, T, &l.post_norm, thread);
    linear(l.gate_up, a, T, Epilogue::kGated, nullptr, gated, gate_stride_, thread);
    mark(kGateUp, thread);
    a = prepare(l.down, gated, gate_stride_, nullptr, T, nullptr, thread);
    linear(l.down, a, T, Epilogue::kAdd, nullptr, x, hidden_stride_, thread);
    mark(kDown, thread);
  }
  if (by_token(T)) pool_.barrier(thread);  // the head may be split otherwise
}

void Model::forward(const Batch& b, bool all, float* logits) {
  begin(b);
  pack_head();
  run([&](int thread) {
    layers(b, thread);
    const float* x = (const float*)x_.data;
    if (all)
      head(x, nullptr, b.total, logits, thread);
    else
      head(x, last_rows_.data(), b.sequences, logits, thread);
  });
}

void Model::score(const Batch& b, const int32_t* targets, float* out) {
  for (int t = 0; t < b.total; ++t)
    expect(targets[t] >= 0 && targets[t] < config_.vocab_size, "a target is outside the vocabulary");
  begin(b);
  pack_head();
  const size_t needed = (size_t)kTokenBlock * config_.vocab_size * sizeof(float);
  if (logits_.bytes < needed) logits_ = Buffer(needed);
  float* logits = (float*)logits_.data;
  run([&](int thread) {
    layers(b, thread);
    for (int t = 0; t < b.total; t += kTokenBlock) {
      const int count = std::min(kTokenBlock, b.total - t);
      head((const float*)x_.data + (size_t)t * hidden_stride_, nullptr, count, logits, thread);
      for (int r = thread; r < count; r += team_) {
        const float* row = logits + (size_t)r * config_.vocab_size;
        out[t + r] = row[targets[t + r]] - ops_->log_sum_exp(row, config_.vocab_size);
      }
      pool_.barrier(thread);
    }
    mark(kOther, thread);
  });
}

static void check_finite(const int32_t* tokens, int count) {
  for (int i = 0; i < count; ++i)
    if (tokens[i] == kNotFinite) throw std::runtime_error("the model's logits are not numbers: its weights are damaged");
}

void Model::sample(const Batch& b, const Sampling& s, bool all, int32_t* out) {
  begin(b);
  const int32_t* rows = all ? nullptr : last_rows_.data();
  const int count = all ? b.total : b.sequences;
  const size_t needed = (size_t)count * config_.vocab_size * sizeof(float);
  if (logits_.bytes < needed) logits_ = Buffer(needed);
  float* logits = (float*)logits_.data;
  screened_ = -1;
  if (count == 1 && s.temperature[0] <= 0.0f && !screen_.shares.empty() && screen_pause_ == 0) {
    run([&](int thread) {
      layers(b, thread);
      head_greedy(rows ? rows[0] : 0, logits, thread);
    });
    out[0] = take_best();
    check_finite(out, 1);
    return;
  }
  if (screen_pause_ > 0) --screen_pause_;
  pack_head();
  run([&](int thread) {
    layers(b, thread);
    head((const float*)x_.data, rows, count, logits, thread);
    for (int r = thread; r < count; r += team_) {
      const int t = rows ? rows[r] : r, of = token_sequence_[t];
      out[r] = sample_token(*ops_, logits + (size_t)r * config_.vocab_size, config_.vocab_size, s.temperature[of],
                            s.top_k[of], s.top_p[of], s.seeds[of], (int64_t)token_position_[t] + 1);
    }
    mark(kOther, thread);
  });
  check_finite(out, count);
}

}  // namespace flatout
