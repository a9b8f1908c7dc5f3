// The encoder's forward pass. Threads own tokens of a chunk and go through every layer with them; they meet only where
// attention needs the keys of all. A chunk with too few tokens for that is split by rows of the weights instead.
#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "features.h"
#include "weights.h"

namespace flatout {

namespace {

constexpr int kQueryBlock = 16;    // queries of one head that attention takes together
constexpr int kTokensAThread = 64;  // from this many tokens a thread on, threads own tokens
constexpr int kChunkTokens = 128;   // of a thread, about: what it works on stays in the second-level cache
constexpr int kPagesAToken = 16;    // a chunk has at most one page every so many tokens: short texts use pages badly

// Floats from one token's row to the next: an odd number of cache lines, so that a column falls into all cache sets.
int row_stride(int columns) { return (round_up(columns, kLanes) / kLanes | 1) * kLanes; }

}  // namespace

Encoder::Encoder(const EncoderConfig& c, int threads, const std::string& isa)
    : config_(c),
      ops_(ops_for(isa)),
      pool_(threads),
      head_dim_padded_(round_up(c.head_dim, kLanes)),
      hidden_stride_(row_stride(c.hidden_size)),
      qkv_stride_(row_stride(3 * c.hidden_size)),
      up_stride_(row_stride(c.intermediate_size)),
      layers_(c.num_layers),
      arenas_(threads),
      scratch_(threads) {
  expect(head_dim_padded_ <= 256, "head_dim must be at most 256");
  expect(c.head_dim * c.num_heads == c.hidden_size, "num_heads * head_dim must be hidden_size");
  chunk_tokens_ = std::max(kChunkTokens * threads, round_up(c.max_positions, kTileRows));
  chunk_pages_ = std::max(chunk_tokens_ / kPagesAToken, (c.max_positions + kPage - 1) / kPage);
  page_bytes_ = kv_head_bytes(head_dim_padded_, c.cache_kind);
  const size_t rows = chunk_tokens_ + kTileRows;
  cache_ = Buffer(page_bytes_ * c.num_heads * chunk_pages_);
  x_ = Buffer(rows * hidden_stride_ * sizeof(float));
  qkv_ = Buffer(rows * qkv_stride_ * sizeof(float));
  attended_ = Buffer(rows * hidden_stride_ * sizeof(float));
  up_ = Buffer(rows * up_stride_ * sizeof(float));
  identity_.resize(chunk_pages_);
  for (int p = 0; p < chunk_pages_; ++p) identity_[p] = p;
}

void Encoder::set_vector(const std::string& name, const float* values, int count) {
  std::vector<float>* to = layer_field<Layer, std::vector<float>>(layers_, name,
                                                                  {{"qkv_bias", &Layer::qkv_bias},
                                                                   {"o_bias", &Layer::o_bias},
                                                                   {"attention_norm", &Layer::attention_norm},
                                                                   {"attention_norm_bias", &Layer::attention_norm_bias},
                                                                   {"up_bias", &Layer::up_bias},
                                                                   {"down_bias", &Layer::down_bias},
                                                                   {"output_norm", &Layer::output_norm},
                                                                   {"output_norm_bias", &Layer::output_norm_bias},
                                                                   {"qkv_factors", &Layer::qkv_factors},
                                                                   {"o_factors", &Layer::o_factors},
                                                                   {"up_factors", &Layer::up_factors},
                                                                   {"down_factors", &Layer::down_factors}});
  if (name == "embedding_norm") to = &embedding_norm_;
  if (name == "embedding_norm_bias") to = &embedding_norm_bias_;
  expect(to != nullptr, "unknown vector " + name);
  to->assign(values, values + count);
}

void Encoder::set_weight(const std::string& name, const Source& s) {
  if (name == "embedding" || name == "positions") {
    expect(s.kind != WeightKind::kInteger, name + " must be floats");
    const size_t values = (size_t)s.n * s.k;
    if (name == "positions") {
      expect(s.n == config_.max_positions && s.k == config_.hidden_size, "positions has the wrong shape");
      positions_.assign(s.values, s.values + values);
      return;
    }
    word_rows_ = s.n, word_columns_ = s.k;
    if (s.kind == WeightKind::kFloat32) {
      word_floats_.assign(s.values, s.values + values);
    } else {
      words_.resize(values);
      for (size_t i = 0; i < values; ++i) words_[i] = round_to_bf16(s.values[i]);
    }
    return;
  }
  Linear* to = layer_field<Layer, Linear>(
      layers_, name, {{"qkv", &Layer::qkv}, {"o", &Layer::o}, {"up", &Layer::up}, {"down", &Layer::down}});
  expect(to != nullptr, "unknown weight " + name);
  *to = pack_linear(s, false, arenas_, pool_);
}

void Encoder::finalize() {
  const EncoderConfig& c = config_;
  const int D = c.hidden_size, F = c.intermediate_size;
  LinearChecks linears;
  for (int i = 0; i < c.num_layers; ++i) {
    const Layer& l = layers_[i];
    const std::string at = "layers." + std::to_string(i) + ".";
    linears.check(l.qkv, 3 * D, D, at + "qkv");
    linears.check(l.o, D, D, at + "o");
    linears.check(l.up, F, D, at + "up");
    linears.check(l.down, D, F, at + "down");
    check_vector(l.qkv_bias, 3 * D, at + "qkv_bias");
    check_vector(l.o_bias, D, at + "o_bias");
    check_vector(l.attention_norm, D, at + "attention_norm");
    check_vector(l.attention_norm_bias, D, at + "attention_norm_bias");
    check_vector(l.up_bias, F, at + "up_bias");
    check_vector(l.down_bias, D, at + "down_bias");
    check_vector(l.output_norm, D, at + "output_norm");
    check_vector(l.output_norm_bias, D, at + "output_norm_bias");
    const auto check_factors = [&](const std::vector<float>& factors, int columns, const std::string& name) {
      if (!factors.empty()) check_vector(factors, columns, name);
    };
    check_factors(l.qkv_factors, D, at + "qkv_factors");
    check_factors(l.o_factors, D, at + "o_factors");
    check_factors(l.up_factors, D, at + "up_factors");
    check_factors(l.down_factors, F, at + "down_factors");
  }
  check_vector(embedding_norm_, D, "embedding_norm");
  check_vector(embedding_norm_bias_, D, "embedding_norm_bias");
  expect(!positions_.empty(), "positions is missing");
  expect(word_rows_ == c.vocab_size && word_columns_ == D, "embedding is missing or has the wrong shape");
  own_tokens_ = round_up((chunk_tokens_ + pool_.size() - 1) / pool_.size(), kTileRows) + kTileRows;
  shared_ = Buffer(activation_bytes(kTokensAThread * pool_.size() + kTileRows, linears.widest, linears.most_groups));
  for (ThreadScratch& s : scratch_) {
    s.activations = Buffer(activation_bytes(own_tokens_, linears.widest, linears.most_groups));
    s.panel = Buffer((size_t)2 * kLanes * linears.widest);
    s.row.resize(std::max(D, F));
  }
  finalized_ = true;
}

// Chunks of whole sequences, the pages of their keys, and the query blocks. A block ends where a tile of 16 tokens of its
// chunk ends, so that none lies across two threads' tokens.
void Encoder::plan(const Sequences& b) {
  expect(finalized_, "the encoder has weights missing: call finalize first");
  expect(b.count >= 1 && b.starts[0] == 0, "starts must begin with 0");
  chunks_.clear();
  blocks_.clear();
  first_block_.clear();
  first_page_.clear();
  slots_.resize(b.total);
  int pages = 0;
  for (int s = 0; s < b.count; ++s) {
    const int first = b.starts[s], end = b.end(s), length = end - first;
    expect(end <= b.total, "starts must lie below the number of tokens");
    expect(length >= 1 && length <= config_.max_positions,
           "a sequence has 1 to " + std::to_string(config_.max_positions) + " tokens, sequence " + std::to_string(s) +
               " has " + std::to_string(length));
    const int needed = (length + kPage - 1) / kPage;
    if (chunks_.empty() || chunks_.back().tokens + length > kChunkTokens * pool_.size() ||
        pages + needed > chunk_pages_) {
      chunks_.push_back({first, 0, s, 0});
      first_block_.push_back((int)blocks_.size());
      pages = 0;
    }
    Chunk& chunk = chunks_.back();
    for (int t = chunk.tokens; t < chunk.tokens + length;) {
      const int last = std::min(chunk.tokens + length, t / kQueryBlock * kQueryBlock + kQueryBlock);
      blocks_.push_back({s, t, last - t});
      t = last;
    }
    for (int i = 0; i < length; ++i) slots_[first + i] = pages * kPage + i;
    first_page_.push_back(pages);
    pages += needed;
    chunk.tokens += length;
    ++chunk.sequences;
  }
  first_block_.push_back((int)blocks_.size());
  for (int t = 0; t < b.total; ++t)
    expect(b.tokens[t] >= 0 && b.tokens[t] < config_.vocab_size,
           "token " + std::to_string(b.tokens[t]) + " is outside the vocabulary");
}

bool Encoder::by_token(int count) const { return count >= kTokensAThread * pool_.size(); }

Rows Encoder::own_rows(int count, int thread) const {
  const int tile = by_token(count) ? kTileRows : 1;
  const auto edge = [&](int i) {
    return std::min(count, round_up((int)((int64_t)count * i / pool_.size()), tile));
  };
  return {edge(thread), edge(thread + 1), 0};
}

uint8_t* Encoder::page(int head, int index) const {
  return cache_.data + ((size_t)head * chunk_pages_ + index) * page_bytes_;
}

void Encoder::embed(const Sequences& b, const Chunk& c, int thread) {
  const int D = config_.hidden_size;
  const Rows own = own_rows(c.tokens, thread);
  int s = c.first_sequence;
  for (int t = own.first; t < own.last; ++t) {
    const int at = c.first_token + t;
    while (at >= b.end(s)) ++s;
    const float* position = positions_.data() + (size_t)(at - b.starts[s]) * D;
    float* out = (float*)x_.data + (size_t)t * hidden_stride_;
    const size_t row = (size_t)b.tokens[at] * D;
    if (words_.empty()) {
      for (int d = 0; d < D; ++d) out[d] = word_floats_[row + d] + position[d];
      continue;
    }
    for (int d = 0; d < D; ++d) {
      const uint32_t bits = (uint32_t)words_[row + d] << 16;
      float word;
      std::memcpy(&word, &bits, 4);
      out[d] = word + position[d];
    }
  }
}

Activations Encoder::prepare(const Linear& w, const std::vector<float>& factors, float* x, int stride, int count,
                             const Norm* norm, int thread) {
  const bool alone = by_token(count);
  const Activations a = place_activations(w, alone ? scratch_[thread].activations.data : shared_.data,
                                          alone ? own_tokens_ : round_up(count, kTileRows));
  const Rows own = own_rows(count, thread);
  for (int r = own.first; r < own.last; ++r) {
    float* row = x + (size_t)r * stride;
    if (norm) ops_->layer_norm(row, norm->weight.data(), norm->bias.data(), config_.layer_norm_eps, w.k, row);
    if (!factors.empty()) {
      float* scaled = scratch_[thread].row.data();  // the next sum adds to what is in x
      ops_->scale_columns(row, factors.data(), w.k, scaled);
      row = scaled;
    }
    write_activations(*ops_, w, row, a, alone ? r - own.first : r);
  }
  if (alone || thread == 0) pad_activations(w, a, 0, alone ? own.count() : count);
  if (!alone) pool_.barrier(thread);
  return a;
}

void Encoder::linear(const Linear& w, const Activations& a, int count, Epilogue epilogue,
                     const std::vector<float>& bias, float* out, int stride, int thread) {
    const Output o{epilogue, bias.data(), false, out, stride};
  int8_t* scratch = (int8_t*)scratch_[thread].panel.data;
  if (by_token(count)) {
    multiply_panels(*ops_, w, a, {own_rows(count, thread)}, o, 0, w.pairs(), scratch);
  } else {
    multiply_panels(*ops_, w, a, {{0, count, 0}}, o, w.first_pair(thread), w.first_pair(thread + 1), scratch);
    pool_.barrier(thread);
  }
}

void Encoder::write_keys(const Chunk& c, int thread) {
  const Rows own = own_rows(c.tokens, thread);
  const int E = config_.head_dim, D = config_.hidden_size;
  for (int t = own.first; t < own.last; ++t) {
    const float* keys = (const float*)qkv_.data + (size_t)t * qkv_stride_ + D;
    const int slot = slots_[c.first_token + t];
    for (int h = 0; h < config_.num_heads; ++h)
      ops_->write_kv(keys + h * E, keys + D + h * E, E, head_dim_padded_, slot % kPage, config_.cache_kind,
                     page(h, slot / kPage));
  }
}

void Encoder::attention(const Sequences& b, const Layer& l, const Chunk& c, int thread) {
  const int index = (int)(&c - chunks_.data()), heads = config_.num_heads, E = config_.head_dim;
  const auto attend = [&](const Block& block, int head) {
    const size_t row = (size_t)block.first_token;
    Attention a;
    a.q = (const float*)qkv_.data + row * qkv_stride_ + (size_t)head * E;
    a.q_stride = qkv_stride_;
    a.out = (float*)attended_.data + row * hidden_stride_ + (size_t)head * E;
    a.out_stride = hidden_stride_;
    a.rows = block.rows;
    a.first_position = b.end(block.sequence) - b.starts[block.sequence] - 1;  // every query sees all keys
    a.step = 0;
    a.head_dim = E;
    a.head_dim_padded = head_dim_padded_;
    a.pages = identity_.data() + first_page_[block.sequence];
    a.cache = page(head, 0);
    a.page_stride = page_bytes_;
    a.scale = 1.0f / std::sqrt((float)E);
    a.cache_kind = config_.cache_kind;
    a.bf16_products = l.qkv.kind == WeightKind::kBFloat16;
    ops_->attend(a);
  };
  const int first = first_block_[index], end = first_block_[index + 1];
  if (by_token(c.tokens)) {
    const Rows own = own_rows(c.tokens, thread);
    for (int h = 0; h < heads; ++h)
      for (int i = first; i < end; ++i)
        if (blocks_[i].first_token >= own.first && blocks_[i].first_token < own.last) attend(blocks_[i], h);
  } else {
    const int items = (end - first) * heads, threads = pool_.size();
    for (int i = items * thread / threads; i < items * (thread + 1) / threads; ++i)
      attend(blocks_[first + i % (end - first)], i / (end - first));
  }
}

void Encoder::layers(const Sequences& b, const Chunk& c, int thread) {
  float *x = (float*)x_.data, *qkv = (float*)qkv_.data, *attended = (float*)attended_.data, *up = (float*)up_.data;
  const int T = c.tokens;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& l = layers_[i];
    const Norm before = i == 0 ? Norm{embedding_norm_, embedding_norm_bias_}
                               : Norm{layers_[i - 1].output_norm, layers_[i - 1].output_norm_bias};
    Activations a = prepare(l.qkv, l.qkv_factors, x, hidden_stride_, T, &before, thread);
    linear(l.qkv, a, T, Epilogue::kStore, l.qkv_bias, qkv, qkv_stride_, thread);
    if (by_token(T)) pool_.barrier(thread);  // nobody reads the last layer's keys any more
    write_keys(c, thread);
    pool_.barrier(thread);
    attention(b, l, c, thread);
    if (!by_token(T)) pool_.barrier(thread);
    a = prepare(l.o, l.o_factors, attended, hidden_stride_, T, nullptr, thread);
    linear(l.o, a, T, Epilogue::kAdd, l.o_bias, x, hidden_stride_, thread);
    const Norm between{l.attention_norm, l.attention_norm_bias};
    a = prepare(l.up, l.up_factors, x, hidden_stride_, T, &between, thread);
    linear(l.up, a, T, Epilogue::kGelu, l.up_bias, up, up_stride_, thread);
    a = prepare(l.down, l.down_factors, up, up_stride_, T, nullptr, thread);
    linear(l.down, a, T, Epilogue::kAdd, l.down_bias, x, hidden_stride_, thread);
  }
}

// The last norm, and tokens or pooled sequences to `out`. Sums over tokens run in order, so that they do not depend on
// how sequences were packed.
void Encoder::write_out(const Sequences& b, const Chunk& c, Pooling pooling, bool normalize, float* out, int thread) {
  const int D = config_.hidden_size;
  const Layer& last = layers_.back();
  const Rows own = own_rows(c.tokens, thread);
  for (int t = own.first; t < own.last; ++t) {
    float* row = (float*)x_.data + (size_t)t * hidden_stride_;
    float* to = pooling == Pooling::kNone ? out + (size_t)(c.first_token + t) * D : row;
    ops_->layer_norm(row, last.output_norm.data(), last.output_norm_bias.data(), config_.layer_norm_eps, D, to);
  }
  pool_.barrier(thread);
  for (int i = thread; pooling != Pooling::kNone && i < c.sequences; i += pool_.size()) {
    const int s = c.first_sequence + i, length = pooling == Pooling::kMean ? b.end(s) - b.starts[s] : 1;
    const float* row = (const float*)x_.data + (size_t)(b.starts[s] - c.first_token) * hidden_stride_;
    float* to = out + (size_t)s * D;
    std::copy(row, row + D, to);
    for (int t = 1; t < length; ++t) {
      row += hidden_stride_;
      for (int d = 0; d < D; ++d) to[d] += row[d];
    }
    double squares = 0.0;
    for (int d = 0; d < D; ++d) {
      to[d] /= (float)length;
      squares += (double)to[d] * to[d];
    }
    const float norm = std::max((float)std::sqrt(squares), 1e-12f);
    for (int d = 0; normalize && d < D; ++d) to[d] /= norm;
  }
  pool_.barrier(thread);
}

void Encoder::forward(const Sequences& b, Pooling pooling, bool normalize, float* out) {
  plan(b);
  pool_.run([&](int thread) {
    for (const Chunk& chunk : chunks_) {
      embed(b, chunk, thread);
      layers(b, chunk, thread);
      write_out(b, chunk, pooling, normalize, out, thread);
    }
  }, pool_.size());
}

}  // namespace flatout
